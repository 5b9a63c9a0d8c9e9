"""Graph code that codecs are made of."""

from tfqcomm.kernels import least_squares, low_rank, numerics, rounding, selection, wire

__all__ = [
    "least_squares",
    "low_rank",
    "numerics",
    "rounding",
    "selection",
    "wire",
]
