"""Modules:

- `fasterprune.surgery.settle`: Make a plan, try it out on fake tensors, and pin what cannot be cut, until one works"""

__version__ = "0.0.1"
