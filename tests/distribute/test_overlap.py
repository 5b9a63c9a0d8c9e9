"""Buckets travel while the gradients of the next ones are computed: read from a step's graph."""

import functools

import pytest

from tests.distribute import overlap_functions
from tests.multi_process import run_workers
from tests.rungs import slow_unless

pytestmark = pytest.mark.multi_process


@functools.cache
def reached(compressor, schedule):
    args = {"compressor": compressor, "schedule": schedule}
    return run_workers(overlap_functions.reached, workers=2, args=args)


@pytest.mark.parametrize(
    ("compressor", "schedule", "per_bucket"),
    slow_unless(
        lambda compressor, schedule, _: schedule == "all_gather",
        [("block_sign", "all_gather", 1), ("block_sign", "two_phase", 2), (None, "auto", 1)],
    ),
)
def test_the_first_collectives_do_not_wait_for_the_last_gradients(compressor, schedule, per_bucket):
    for waits, _ in reached(compressor, schedule):
        layers = overlap_functions.LAYERS
        assert len(waits) >= layers * per_bucket
        for bucket in range(layers):
            # That of the last layer first; gradients pass through the layers behind theirs.
            first_needed = layers - 1 - bucket
            expected = [layer >= first_needed for layer in range(layers)]
            for collective in waits[bucket * per_bucket : (bucket + 1) * per_bucket]:
                assert collective == expected


@pytest.mark.parametrize(
    ("compressor", "schedule"),
    slow_unless(lambda compressor, _: compressor, [("block_sign", "all_gather"), (None, "auto")]),
)
def test_payloads_are_in_flight_at_a_time(compressor, schedule):
    """None waits for the end of another."""
    for _, others in reached(compressor, schedule):
        assert others == [0] * overlap_functions.LAYERS
