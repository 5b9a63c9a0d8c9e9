"""Graph code that codecs are made of."""

from tfqcomm.kernels import least_squares, numerics, rounding, selection, wire

__all__ = [
    "least_squares",
    "numerics",
    "rounding",
    "selection",
    "wire",
]
