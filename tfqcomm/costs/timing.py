"""How long something takes: the median of many runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

FEWEST, MOST = 5, 50


def median_seconds(function: Callable[[], object], seconds: float) -> float:
    """Wall time of a run, the median of 5 to 50, after two that trace, compile and allocate.

    Args:
        function: returns what can be waited for: tensors or nothing.
        seconds: for how long to run it, at about.
    """
    function()
    times = [_time_of(function)]
    runs = min(MOST, max(FEWEST, int(seconds / max(times[0], 1e-9))))
    times = [_time_of(function) for _ in range(runs)]
    return float(np.median(times))


def _time_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
