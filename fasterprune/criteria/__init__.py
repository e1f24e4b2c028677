"""Say what matters: scores of weights and of units

In: weights, and statistics of a model at work (`statistic`, `listen`, `batches`, `runs`, `evidence`). Out: scores,
high for what stays. A criterion is a value (`base`); the families are `norm`, `correlation`, `activation`,
`information`, `taylor` and `curvature`; `normalize` makes the scores of different layers comparable.
"""
