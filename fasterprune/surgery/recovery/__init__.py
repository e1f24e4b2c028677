"""Make up for what a cut takes from the outputs

In: a model, its plan, and data. Out: BatchNorm statistics of the smaller model (`recalibrate`), means in biases
(`compensate`), weights by least squares (`rescale`).
"""
