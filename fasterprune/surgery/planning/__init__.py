"""Say what will be cut, as a value

In: a `Coupling` and which units go (`selection`, `budget`). Out: a `Plan` (`plan`, `cuts`): slices, attributes,
constants that move (`folding`), and source that says other sizes (`source`, `sizes`, `divisors`). It can be read,
stored and checked (`values`).
"""
