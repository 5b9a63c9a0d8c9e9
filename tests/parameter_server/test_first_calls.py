"""Nobody calls a task while a graph is called there for the first time."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from tests.parameter_server import first_call_runs
from tests.processes import ROOT
from tfqcomm.parameter_server.first_calls import FirstCalls

SOON = 0.2  # seconds in which what may begin does begin
LATE = 10.0
LOGGED = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "cluster_function_library_runtime=1"}


class Thread:
    """A thread in a scope until it is told to leave."""

    def __init__(self, scope):
        self.inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(scope,), daemon=True)
        self._thread.start()

    def _stay(self, scope):
        with scope():
            self.inside.set()
            self._leave.wait(LATE)

    def leave(self):
        self._leave.set()
        self._thread.join(LATE)


def wait_until(condition):
    """Whether it became true in time."""
    deadline = time.monotonic() + LATE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def calls():
    return FirstCalls()


def test_known_calls_are_under_way_together(calls):
    one, two = Thread(calls.together), Thread(calls.together)
    assert one.inside.wait(LATE)
    assert two.inside.wait(LATE)
    one.leave()
    two.leave()


@pytest.mark.parametrize("other", ["together", "alone"])
def test_a_first_call_is_alone(calls, other):
    known = Thread(getattr(calls, other))
    assert known.inside.wait(LATE)
    first = Thread(calls.alone)
    assert not first.inside.wait(SOON)
    known.leave()
    assert first.inside.wait(LATE)
    late = Thread(calls.together)
    assert not late.inside.wait(SOON)
    first.leave()
    assert late.inside.wait(LATE)
    late.leave()


def test_who_waits_to_be_alone_comes_before_new_calls(calls):
    known = Thread(calls.together)
    assert known.inside.wait(LATE)
    firsts = [Thread(calls.alone) for _ in range(2)]
    assert not firsts[0].inside.wait(SOON)
    late = Thread(calls.together)
    assert not late.inside.wait(SOON)
    known.leave()
    assert wait_until(lambda: firsts[0].inside.is_set() or firsts[1].inside.is_set())
    assert not late.inside.wait(SOON)
    for first in firsts:
        first.leave()
    assert late.inside.wait(LATE)
    late.leave()


@pytest.mark.parametrize("scope", ["together", "alone"])
def test_a_call_that_fails_leaves(calls, scope):
    with pytest.raises(ValueError, match="failed"), getattr(calls, scope)():
        raise ValueError("failed")
    first = Thread(calls.alone)
    assert first.inside.wait(LATE)
    first.leave()


@pytest.fixture(scope="module")
def log():
    """What a process wrote that trained in every way."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parameter_server.first_call_runs"],
        cwd=ROOT,
        env={**os.environ, **LOGGED},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tensorflow_gives_graphs_to_tasks_in_first_calls_only(log):
    """A call that is cancelled beforehand has them made known: the call itself finds them there."""
    given = {True: [], False: []}  # whether alone -> the runtimes that gave
    alone = False
    for line in log.splitlines():
        if line in (first_call_runs.ALONE, first_call_runs.FREE):
            alone = line == first_call_runs.ALONE
        elif found := re.search(r"CFLR::Instantiate: .* \(this: (\w+)\)", line):
            given[alone].append(found[1])
    assert len(given[True]) > 20
    (chief,) = set(given[True])
    assert chief not in given[False]
