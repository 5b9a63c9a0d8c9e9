"""Times are those of the quickest run, and no longer than what it takes of the processor."""

import time

import pytest

from tfqcomm.costs import timing


def work(seconds: float) -> None:
    """Keeps the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_quickest_run_counts_after_two():
    pauses = iter([0.0, 0.0, 0.03, 0.01, 0.02, 0.03, 0.02])
    assert timing.best_seconds(lambda: work(next(pauses)), 0.0) == pytest.approx(0.01, rel=0.3)
    assert next(pauses, None) is None


def test_what_others_take_does_not_count():
    def run():
        work(0.01)
        time.sleep(0.03)  # in place of another program's turn

    assert timing.best_seconds(run, 0.0) == pytest.approx(0.01, rel=0.3)


def test_short_runs_are_many_and_end():
    calls = []
    timing.best_seconds(lambda: calls.append(work(1e-4)), 60.0)
    assert len(calls) == 2 + timing.MOST
