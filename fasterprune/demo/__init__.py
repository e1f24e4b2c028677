"""The whole job on one small network

In: the options of the command `fasterprune`. Out: what was measured (`job`), and one HTML file of it (`page`).
"""
