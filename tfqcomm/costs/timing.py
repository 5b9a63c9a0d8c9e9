"""How long something takes on a machine that does nothing else: the quickest of many runs."""

from __future__ import annotations

import time
from collections.abc import Callable

FEWEST, MOST = 5, 50


def best_seconds(function: Callable[[], object], seconds: float) -> float:
    """Seconds of the quickest of 5 to 50 runs, after two that compile and allocate.

    Others may use the machine, too: they make runs longer, and none shorter. What a run takes of
    the processor is an upper bound of what it would take alone, and counts where it is less.

    Args:
        function: computes, waits for nobody, and returns when it is done.
        seconds: for how long to run it, at about.
    """
    function()
    first = _seconds_of(function)
    runs = min(MOST, max(FEWEST, int(seconds / max(first, 1e-9))))
    return min(_seconds_of(function) for _ in range(runs))


def _seconds_of(function: Callable[[], object]) -> float:
    start, used = time.perf_counter(), time.process_time()
    function()
    return min(time.perf_counter() - start, time.process_time() - used)
