"""A worker that dies, stops or never comes is an error of the others, never a hang."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.distribute import fault_functions as functions
from tests.multi_process import run_workers, start_workers

pytestmark = [pytest.mark.multi_process, pytest.mark.timeout(600)]

PATIENCE = 60  # seconds from the fault to the error


def error_after(fault, victim, **args):
    """Lets something happen to a worker that trains.

    Returns:
        The other worker's error, and how long the step took in which it came.
    """
    with start_workers(functions.train_for_ever, args=args) as running:
        for i in range(2):
            running.wait_for_output(i, "training, process", timeout=240)
        fault(running, victim)
        running.wait_for_output(1 - victim, "ended", timeout=2 * PATIENCE)
        running.kill(victim)
        return running.wait()[1 - victim]


def kill(running, victim):
    running.kill(victim)


def stop(running, victim):
    pid = re.search(r"training, process (\d+)\.", running.output(victim))[1]
    os.kill(int(pid), signal.SIGSTOP)


@pytest.mark.parametrize(
    "fault, victim",
    [
        (kill, 1),
        pytest.param(kill, 0, marks=pytest.mark.slow),
        pytest.param(stop, 1, marks=pytest.mark.slow),
        pytest.param(stop, 0, marks=pytest.mark.slow),
    ],
)
def test_the_other_worker_names_it(fault, victim):
    message, seconds = error_after(fault, victim)
    assert f"task:{victim}" in message
    assert seconds < PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("absent", [1, 0])
def test_a_worker_that_never_comes(absent):
    args = {"timeout_seconds": 5}
    with start_workers(functions.wait_for_the_others, args=args) as running:
        running.kill(absent)
        running.wait_for_output(1 - absent, "waiting", timeout=120)
        message, seconds = running.wait(timeout=PATIENCE)[1 - absent]
    assert "Timeout waiting for the cluster, timeout is 5 seconds" in message
    assert seconds < 20


@pytest.mark.slow
def test_several_strategies_one_after_the_other():
    first, second = run_workers(functions.several_strategies, timeout=300)
    assert len(first) == 3
    assert first == second
