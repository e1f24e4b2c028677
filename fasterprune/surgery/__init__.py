"""Physically remove channels from any model, and prove that the smaller one computes the same

In: a model, an example input and what shall go. Out: the same model, smaller, and a `Report`.
capture → coupling → analysis → planning → cutting → checking → recovery: each folder is a step that imports
from those before it only; `transaction` carries a plan out as a whole, `pruner` is all of it in one call.
"""
