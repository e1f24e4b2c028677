"""Find out what a coupled model says about its channels

In: a `Coupling`. Out: constants (`constants`), channels that are dead (`dead`), residual branches that add the
same to everything (`branch`), what the model costs (`cost`, `latency`), and a score for each unit (`scores`).
"""
