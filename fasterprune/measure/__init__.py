"""Say what sparsity and pruning are worth

In: models, masks and measurements, as values. Out: numbers, tables and pictures.
"""
