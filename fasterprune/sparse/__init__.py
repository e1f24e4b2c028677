"""Choose what becomes zero, without a trainer

In: a model, a granularity, a criterion and a sparsity. Out: `Masks`, a value outside the model, and zeros in it.
"""
