"""Predictions: formulas worked by hand, and what must grow or fall with what."""

import dataclasses

import pytest

from tfqcomm.aggregators import schedule as schedules
from tfqcomm.costs import prediction as costs
from tfqcomm.costs.prediction import Bucket, Compute, Line, Link, predict

COMPUTE = Compute(forward=10.0, backward=20.0, update=5.0)
BYTE = 8 * costs.FRAMING / 1e6  # seconds, at 1 Mbit/s


def free(line: Line) -> Link:
    """A link of which all collectives take the same."""
    return Link(line, line, line)


NOTHING = free(Line(0.0, 0.0))


@pytest.mark.parametrize("world", [2, 3, 4, 8, 1024])
@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_bytes_are_those_of_the_schedules(schedule, world):
    elements = 10**6
    payload = 4 * elements if schedule == "dense" else 125_000
    expected = schedules.bytes_per_worker(schedule, payload, elements, world)
    assert Bucket(schedule, payload).bytes_sent(world) == pytest.approx(expected)


def test_low_rank_sends_both_factors_once_around_each():
    assert Bucket("low_rank", 8000.0).bytes_sent(4) == pytest.approx(2 * 3 / 4 * 8000)
    rounds = [rounds for _, rounds, _ in costs.moves("low_rank", 8e6, 4)]
    assert rounds == [6, 6]


@pytest.mark.parametrize(
    ("schedule", "rounds"), [("dense", 2 * 3), ("all_gather", 3), ("two_phase", 1 + 3)]
)
def test_rounds_each_take_the_latency(schedule, rounds):
    assert free(Line(1.0, 0.0)).seconds(schedule, 8e6, 4) == rounds


def test_a_short_sum_of_two_workers_is_one_round_and_as_many_bytes():
    assert costs.moves("dense", 400.0, 2) == [("all_gather", 1, 400.0)]
    assert costs.moves("dense", 2.0**20, 2) == [("all_reduce", 2, 2.0**20)]


def test_a_network_takes_framed_bytes_and_its_latency():
    link = Link.of_network(bandwidth=1e6, latency=0.5)
    # a gather of 1000 bytes among 3: 2 rounds, 2000 bytes
    assert link.seconds("all_gather", 1000, 3) == pytest.approx(2 * 0.5 + 2000 * BYTE)


def test_a_network_behind_software_takes_the_sum():
    software = Link(Line(1, 2), Line(3, 4), Line(5, 6), processor_seconds=7)
    link = software.behind(bandwidth=1e6, latency=0.5)
    assert [line.round_seconds for line in link.lines] == [1.5, 3.5, 5.5]
    assert [line.byte_seconds for line in link.lines] == pytest.approx(
        [2 + BYTE, 4 + BYTE, 6 + BYTE]
    )
    assert link.processor_seconds == 7


def test_a_step_of_one_worker_is_its_compute():
    assert predict(COMPUTE, [Bucket("dense", 4e6)], NOTHING, 1).seconds == 35


def test_on_a_link_that_takes_nothing_a_step_is_compute_and_codec():
    buckets = [
        Bucket("all_gather", 100.0, ready=0.5, before=1, after=2, after_each=3),
        Bucket("two_phase", 100.0, ready=1.0, before=4, after=5),
    ]
    found = predict(COMPUTE, buckets, NOTHING, 2)
    assert found.codec_seconds == 1 + 2 + 2 * 3 + 4 + 5
    assert found.seconds == 35 + 18
    assert found.link_seconds == found.hidden_seconds == 0
    assert predict(COMPUTE, buckets, NOTHING, 4).codec_seconds == 18 + 2 * 3


def test_a_bucket_travels_while_the_next_gradients_are_computed():
    # processor   0 forward 10, half the backward pass 20, encode 21, the other half 31, encode 32
    # link        first 21 to 46, second 46 to 71
    # processor   decode 46 to 48, then 71 to 73, update 78
    link = free(Line(0.0, 1.0))
    buckets = [
        Bucket("all_gather", 25.0, ready=0.5, before=1, after=2),
        Bucket("all_gather", 25.0, ready=1.0, before=1, after=2),
    ]
    found = predict(COMPUTE, buckets, link, 2)
    assert found.link_seconds == 50 + costs.LOGS
    assert found.seconds == 78 + costs.LOGS
    # Of 50 on the link the processor was at work: 21 to 32 and 46 to 48.
    assert found.hidden_seconds == 11 + 2


def test_one_bucket_hides_behind_nothing():
    found = predict(COMPUTE, [Bucket("all_gather", 25.0, before=1, after=2)], free(Line(0, 1)), 2)
    assert found.hidden_seconds == 0
    assert found.seconds == 35 + 3 + 25 + costs.LOGS


def test_what_sending_takes_of_the_processor_does_not_hide():
    link = dataclasses.replace(free(Line(0.0, 0.1)), processor_seconds=0.1)
    buckets = [Bucket("all_gather", 100.0, ready=0.0), Bucket("all_gather", 100.0, ready=1.0)]
    found = predict(COMPUTE, buckets, link, 2)
    assert found.processor_seconds == pytest.approx(35 + 20)
    assert found.seconds == pytest.approx(35 + 20 + 0.1 * costs.LOGS)


BUCKETS = {
    "dense": [Bucket("dense", 4e6, 0.5, 0.1, 0.1), Bucket("dense", 4e6, 1.0, 0.1, 0.1)],
    "all_gather": [Bucket("all_gather", 1e5, 1.0, 0.2, 0.0, 0.1)],
    "two_phase": [Bucket("two_phase", 1e5, 0.7, 0.2, 0.3), Bucket("dense", 4e3)],
    "low_rank": [Bucket("low_rank", 1e5, 0.7, 0.2, 0.3)],
}


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_more_workers_never_make_a_step_shorter(buckets):
    link = Link.of_network(1e8, 1e-4)
    times = [predict(COMPUTE, buckets, link, 2**i).seconds for i in range(11)]
    assert times == sorted(times) and times[1] < times[10]


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_a_faster_link_never_makes_it_longer(buckets):
    rates = [10.0**i for i in range(5, 12)]
    times = [predict(COMPUTE, buckets, Link.of_network(r, 1e-4), 8).seconds for r in rates]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


@pytest.mark.parametrize("buckets", BUCKETS.values(), ids=BUCKETS)
def test_a_step_is_no_shorter_than_its_work_and_no_longer_than_all_of_it_in_turn(buckets):
    for rate in (1e6, 1e9):
        found = predict(COMPUTE, buckets, Link.of_network(rate, 1e-4), 4)
        work = COMPUTE.seconds + found.codec_seconds
        assert max(work, found.link_seconds) <= found.seconds <= work + found.link_seconds + 1e-9
        assert found.seconds == pytest.approx(work + found.link_seconds - found.hidden_seconds)


def test_gathers_grow_with_the_workers_and_two_phases_do_not():
    link = Link.of_network(1e8, 0.0)
    gather, two = ([Bucket(kind, 1e6)] for kind in ("all_gather", "two_phase"))
    ratio = [
        predict(COMPUTE, gather, link, w).link_seconds / predict(COMPUTE, two, link, w).link_seconds
        for w in (2, 64)
    ]
    assert ratio == pytest.approx([1, 32], rel=1e-3)  # W / 2
