"""Which of a test's parameters the default run tries, and which it leaves to the slow rung.

What is left out takes nearly the same way as what is not; `make test-slow` runs it, and so does CI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def slow_unless(quick: Callable[..., bool], values: Sequence) -> list:
    """Parameters for `pytest.mark.parametrize`, marked slow where `quick` says False.

    Args:
        quick: of a value, or of the parts of a tuple.
        values: of one parameter, or tuples for several.
    """
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*p, marks=[] if quick(*p) else [pytest.mark.slow]) for p in parts]
