"""Find out what a coupled model says about its channels

In: a `Coupling`. Out: channels that are dead and the constants they leave (`dead`), residual branches that add the
same to everything (`branch`), what the model costs (`cost`, `latency`), and a score for each unit (`scores`).
"""
