"""How long something takes on a machine that does nothing else: the quickest of many runs."""

from __future__ import annotations

import time
from collections.abc import Callable

FEWEST, MOST = 5, 50


def best_seconds(function: Callable[[], object], seconds: float) -> float:
    """Wall time of the quickest of 5 to 50 runs, after two that compile and allocate.

    Others may use the machine, too: they make runs longer, and none shorter.

    Args:
        function: returns when it is done.
        seconds: for how long to run it, at about.
    """
    function()
    first = seconds_of(function)
    runs = min(MOST, max(FEWEST, int(seconds / max(first, 1e-9))))
    return min(seconds_of(function) for _ in range(runs))


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
