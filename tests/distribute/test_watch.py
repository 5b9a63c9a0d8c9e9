"""What the workers know of each other: when a wait is without end, and who is to blame."""

from __future__ import annotations

import pytest

from tests.distribute import watch_functions as functions
from tests.multi_process import run_workers, start_workers
from tfqcomm.transport.watch import Pulse, verdict

NAMES = ["a:1", "b:1", "c:1"]
FIT, PREDICT = "the logs of a step of fit", "the outputs of predict"


def waits(number, place, seconds=10.0):
    return Pulse(number, number - 1, seconds, False, place)


def busy(number, place, seconds=10.0):
    return Pulse(number, number, seconds, False, place)


def ended(number, place):
    return Pulse(number, number, 10.0, True, place)


# ---------------------------------------------------------------------------------- without workers


def test_a_pulse_arrives_as_it_was_sent():
    pulse = Pulse(3, 2, 1.5, True, "the exchange of gradients, é")
    assert Pulse.from_words(pulse.to_words()) == pulse


def test_a_long_place_is_cut_and_a_count_may_overflow():
    words = Pulse(2**31 + 5, 2**31 + 4, 0.0, False, "x" * 1000).to_words()
    again = Pulse.from_words(words)
    assert (again.begun, again.ended) == (5, 4)
    assert again.place == "x" * 160


@pytest.mark.parametrize(
    "pulses",
    [
        [busy(5, FIT), busy(5, FIT), busy(5, FIT)],
        [waits(6, FIT), waits(6, FIT), busy(5, FIT)],  # somebody computes
        [waits(7, PREDICT), waits(6, FIT), waits(6, FIT)],  # somebody is ahead, of a slow transfer
        [waits(6, FIT, 1.0), waits(6, PREDICT, 1.0), busy(5, FIT)],  # a moment, seen in between
        [ended(6, FIT), waits(6, FIT), waits(6, FIT)],  # it has got all that the others still get
        [waits(6, FIT), waits(6, FIT), waits(6, FIT)],
    ],
)
def test_waits_that_will_end_are_left_alone(pulses):
    assert verdict(pulses, NAMES, timeout_seconds=60) is None


def test_workers_in_different_places_wait_for_ever():
    message = verdict([waits(6, FIT), waits(6, PREDICT), busy(5, FIT)], NAMES, 60)
    assert "wait for one another in different places" in message
    assert f"worker 0 (a:1) waits for 10 s in: {FIT}" in message
    assert f"worker 1 (b:1) waits for 10 s in: {PREDICT}" in message
    assert "must be called on all workers" in message


def test_a_worker_that_has_ended_does_not_come():
    message = verdict([ended(5, FIT), waits(6, FIT), waits(6, FIT)], NAMES, 60)
    assert "has come to its end while others wait" in message
    assert f"worker 0 (a:1) has ended; last in: {FIT}" in message


def test_a_wait_beyond_the_limit_names_who_is_busy():
    pulses = [waits(6, FIT, 61.0), busy(5, FIT, 61.0), waits(6, FIT, 3.0)]
    message = verdict(pulses, NAMES, 60)
    assert "A worker has waited 61 seconds for the others, and timeout_seconds=60" in message
    assert "worker 1 (b:1) is busy for 61 s" in message
    assert "raise `timeout_seconds`" in message
    assert verdict(pulses, NAMES, 0) is None  # without limit


# -------------------------------------------------------------------------------------- two workers


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, said",
    [
        ("predict on the chief", ["in different places", "an agreement with the others"]),
        ("a chief that is busy", ["has waited", "timeout_seconds=4", "worker 0", "is busy for"]),
    ],
)
def test_all_hear_why_they_wait_for_ever(name, said):
    # The process is started anew for each: after an abort no collective works.
    errors = run_workers(functions.wait_in_vain, args={"name": name}, timeout=120)
    for text in said:
        assert text in errors[1]
    assert errors[0] is None or said[0] in errors[0] or "aborted" in errors[0]


@pytest.mark.multi_process
@pytest.mark.slow
def test_a_worker_whose_script_ends_is_named_to_those_who_wait():
    with start_workers(functions.end_early) as running:
        running.wait_for_output(1, "ended by", timeout=120)
        output = running.output(1)
    assert "worker 0 (127.0.0.1:" in output
    assert "has ended; last in:" in output


@pytest.mark.multi_process
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thousands_of_steps_keep_their_threads_and_their_memory():
    for found in run_workers(functions.many_steps, args={"steps": 8000}, timeout=800):
        assert abs(found["threads"]) <= 5
        assert found["kilobytes a step"] < 1  # a new key alone would be 2 for each collective
        assert found["collectives a step"] == 2  # with five metrics; one is the payload
