"""Error feedback of rows in whole runs: against NumPy, what is conserved, and what it costs."""

import functools

import numpy as np
import pytest

from tests.multi_process import run_workers
from tests.parameter_server import feedback_runs as runs
from tests.parameter_server import row_reference

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(600)]


@functools.cache
def found():
    (result,) = run_workers(runs.everything, workers=1, timeout=500)
    return result


def reference(codec, mode, slots, initial):
    ids, targets = runs.make_data()
    workers = runs.WORKERS if mode == "sync" else 1
    return row_reference.tables_with_feedback(
        initial, ids[:, :workers], targets[:, :workers], codec, slots, runs.RATE
    )


@pytest.mark.parametrize("codec, mode, slots", runs.CASES)
def test_steps_are_those_of_the_reference(codec, mode, slots):
    """Also the one in which a worker finds a NaN: nobody's message counts, and nobody owes more."""
    result = found()["steps"][codec, mode, slots]
    initial, *tables = result["tables"]
    expected, owed = reference(codec, mode, slots, initial)
    assert len(tables) == len(expected) == 50
    for step, pair in enumerate(zip(tables, expected, strict=True), 1):
        np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6, err_msg=f"diverged in step {step}")
    assert result["skipped"] == 1
    without, _ = reference(codec, mode, None, initial)
    assert np.abs(without[-1] - expected[-1]).max() > 1e-4
    assert len(result["owed"]) == len(owed)
    for mine, right in zip(result["owed"], owed, strict=True):
        assert sorted(mine) == sorted(right)
        assert len(mine) == (runs.ROWS if slots == "all" else slots)
        for row, value in mine.items():
            np.testing.assert_allclose(value, right[row], rtol=1e-3, atol=1e-7)
    slots = runs.ROWS if slots == "all" else slots
    (route,) = result["routes"]
    assert route == f"rows of each batch, {codec}, pushed with error feedback in {slots} slots"


@pytest.mark.parametrize("way", runs.WAYS)
def test_what_is_sent_and_what_is_owed_is_the_sum_of_all_gradients(way):
    """Of rows that are looked up several times by one layer, and by two; in any order."""
    result = found()["conserved"][way]
    for moved, owed, gradients in zip(*result.values(), strict=True):
        np.testing.assert_allclose(moved + owed, gradients, rtol=1e-4, atol=2e-5)
        assert np.abs(owed).max() > 2e-4  # less is due to float32


def test_a_message_that_is_sent_again_leaves_what_is_owed():
    before, after, following = ([*owed[0].items()] for owed in found()["replayed"])
    assert len(before) > 5
    assert str(after) == str(before) != str(following)


def test_a_backup_has_nothing_of_it_and_what_is_owed_is_forgotten_with_it():
    before, after = found()["restored"]
    assert len(before[0]) > 5
    assert after == [{}]


def test_what_is_owed_is_not_multiplied_by_the_scale_of_losses():
    for owed in found()["scaled"]:
        largest = max(np.abs(row).max() for row in owed.values())
        assert 0 < largest < 1e-2


def test_worker_halves_on_servers_get_what_is_pushed():
    losses = found()["moments"]
    assert losses["all"] != losses[None]
    np.testing.assert_allclose(losses["all"], losses[None], rtol=1e-2)


def test_by_default_a_worker_keeps_nothing_and_sends_as_much():
    off, on = found()["words"][None], found()["words"][5]
    assert on["workers"] == off["workers"]
    assert off["kept"] == []
    assert on["kept"] == [[5], [5, runs.WIDTH], [], []]  # rounds: ids and rows are pending, too
    assert on["arguments"] == off["arguments"] + 4
    assert on["operations"] > off["operations"]
    assert not on["rows"] and not off["rows"]
