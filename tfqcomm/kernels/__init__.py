"""Graph code that codecs are made of."""

from tfqcomm.kernels import counting, least_squares, numerics, positions, rounding, selection, wire

__all__ = [
    "counting",
    "least_squares",
    "numerics",
    "positions",
    "rounding",
    "selection",
    "wire",
]
