"""Try a plan before the cut, and hold the laws after it

In: a `Coupling` and what shall go. Out: a `Plan` that runs (`dry_run`, `solve`), also one that meets a measured time
(`latency_budget`); smaller kernels (`kernel_shape`), numbers that would be old (`stale`); `verify` compares outputs.
"""
