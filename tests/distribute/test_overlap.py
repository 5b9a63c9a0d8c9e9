"""Buckets travel while the gradients of the next ones are computed: read from a step's graph."""

import pytest

from tests.distribute import overlap_functions
from tests.multi_process import run_workers

pytestmark = pytest.mark.multi_process


@pytest.mark.parametrize(
    ("compressor", "schedule", "per_bucket"),
    [("block_sign", "all_gather", 1), ("block_sign", "two_phase", 2), (None, "auto", 1)],
)
def test_the_first_collectives_do_not_wait_for_the_last_gradients(compressor, schedule, per_bucket):
    args = {"compressor": compressor, "schedule": schedule}
    for waits, _ in run_workers(overlap_functions.reached, workers=2, args=args):
        layers = overlap_functions.LAYERS
        assert len(waits) >= layers * per_bucket
        for bucket in range(layers):
            # That of the last layer first; gradients pass through the layers behind theirs.
            first_needed = layers - 1 - bucket
            expected = [layer >= first_needed for layer in range(layers)]
            for collective in waits[bucket * per_bucket : (bucket + 1) * per_bucket]:
                assert collective == expected


@pytest.mark.parametrize(("compressor", "schedule"), [("block_sign", "all_gather"), (None, "auto")])
def test_payloads_are_in_flight_at_a_time(compressor, schedule):
    """None waits for the end of another."""
    args = {"compressor": compressor, "schedule": schedule}
    for _, others in run_workers(overlap_functions.reached, workers=2, args=args):
        assert others == [0] * overlap_functions.LAYERS
