"""Find which channels of which layers must go together

In: a `Trace` of the example and of other calls (`witness`). Out: a `Coupling`: a label for each position of each
dimension (`labels`), joined by one rule per operator (`rules`, `domain`), and the groups that follow (`groups`).
"""
