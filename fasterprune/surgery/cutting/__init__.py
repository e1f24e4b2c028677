"""Carry a plan out on a model and on what its optimizer remembers

In: a model, a `Plan`, an optimizer. Out: the same objects, smaller; or as they were, if the plan does not fit.
"""
