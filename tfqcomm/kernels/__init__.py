"""Graph code that codecs are made of."""

from tfqcomm.kernels import (
    counting,
    entries,
    kept_values,
    least_squares,
    low_rank,
    numerics,
    positions,
    rounding,
    selection,
    wire,
)

__all__ = [
    "counting",
    "entries",
    "kept_values",
    "least_squares",
    "low_rank",
    "numerics",
    "positions",
    "rounding",
    "selection",
    "wire",
]
