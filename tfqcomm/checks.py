"""What several constructors ask of their arguments, in Keras' wording."""

from __future__ import annotations

import numbers
from collections.abc import Sequence


def ratio(value, name: str = "ratio") -> float:
    """Accepts a number in (0, 1]."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not 0 < value <= 1:  # NaN compares false
        raise ValueError(
            f"Argument `{name}` must be a number in (0, 1]. Received: {name}={value!r}"
        )
    return float(value)


def num_kept(ratio: float, n: int) -> int:
    """How many of `n` entries a sparsifier with `ratio` keeps: at least one of any."""
    return min(n, max(1, round(ratio * n)))


def one_of(name: str, value, supported: Sequence[str]) -> None:
    """Accepts one of `supported`."""
    if value not in supported:
        raise ValueError(
            f"Argument `{name}` must be one of {list(supported)}. Received: {name}={value!r}"
        )


def boolean(name: str, value) -> None:
    """Accepts True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"Argument `{name}` must be a bool. Received: {name}={value!r}")


def fraction(name: str, value, *, also: str = "") -> None:
    """Accepts a decay rate in [0, 1).

    Args:
        also: what else is allowed, for the message.
    """
    if not _is_float(value) or not 0 <= value < 1:
        raise ValueError(
            f"Argument `{name}` must be a float in [0, 1){also}. Received: {name}={value!r}"
        )


def positive(name: str, value) -> None:
    """Accepts a number above zero."""
    if not _is_float(value) or not value > 0:
        raise ValueError(f"Argument `{name}` must be a positive float. Received: {name}={value!r}")


def non_negative(name: str, value) -> None:
    """Accepts zero or a number above it."""
    if not _is_float(value) or not value >= 0:
        raise ValueError(
            f"Argument `{name}` must be a non-negative float. Received: {name}={value!r}"
        )


def positive_integer(name: str, value) -> None:
    """Accepts an integer above zero, of Python's own type: it may stand in a config."""
    if type(value) is not int or value < 1:
        raise ValueError(
            f"Argument `{name}` must be a positive integer. Received: {name}={value!r}"
        )


def non_negative_integer(name: str, value) -> None:
    """Accepts zero or an integer above it, of Python's own type."""
    if type(value) is not int or value < 0:
        raise ValueError(
            f"Argument `{name}` must be a non-negative integer. Received: {name}={value!r}"
        )


def positive_integer_or_none(name: str, value, or_else: str = "") -> None:
    """Accepts None or an integer above zero.

    Args:
        or_else: what the caller accepts besides, for the message.
    """
    if value is not None and (not _is_integer(value) or value < 1):
        raise ValueError(
            f"Argument `{name}` must be {or_else + ', ' if or_else else ''}None or a positive "
            f"integer. Received: {name}={value!r}"
        )


def integer_between(name: str, value, lowest: int, highest: int) -> None:
    """Accepts an integer from `lowest` to `highest`."""
    if not _is_integer(value) or not lowest <= value <= highest:
        raise ValueError(
            f"Argument `{name}` must be an integer from {lowest} to {highest}. "
            f"Received: {name}={value!r}"
        )


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_float(value) -> bool:
    return isinstance(value, (int, float))  # NaN, too, which compares false
