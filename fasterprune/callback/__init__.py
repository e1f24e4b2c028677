"""Sparsify and prune while fastai trains

In: a learner's training, event by event. Out: zeros that stay (`keep_zeros`, `sparsify`), fewer channels (`prune`,
`prune_callback`), and other ways to train sparse networks. All callbacks are on in `fit` only (`base`).
"""
