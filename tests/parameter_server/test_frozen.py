"""Tasks that are stopped but not gone: an error that names them, and a chief that can end."""

import contextlib
import os
import re
import subprocess
import sys
import time

import pytest

from tests.multi_process import ROOT, start_workers
from tests.parameter_server import frozen_runs
from tests.parameter_server.cluster import ServerProcesses
from tests.parameter_server.frozen_runs import TIMEOUT_SECONDS

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(600)]

SLACK_SECONDS = 6.0  # two questions, and a machine that does other things
END_SECONDS = 20.0  # for the interpreter, with threads left behind


class Chief:
    """A real process, whose end is its own."""

    def __init__(self, cluster: ServerProcesses, call: str):
        script = f"from tests.parameter_server import frozen_runs as runs\nruns.{call}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **cluster.chief_environment},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed: list[str] = []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, pattern: str) -> re.Match:
        """The first line like it from here on."""
        for line in self.process.stdout:
            self.printed.append(line)
            if found := re.match(pattern, line):
                return found
        raise AssertionError("".join(self.printed))

    def go_on(self) -> None:
        """Lets it come back from `input()`."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def error(self, since: float) -> str:
        """The error that it printed in time, before it ended as it should."""
        kind, message, at = self.wait_for(r"(\w+): (.*) at ([\d.]+)$").groups()
        waited = float(at) - since
        assert TIMEOUT_SECONDS - 1 <= waited <= TIMEOUT_SECONDS + SLACK_SECONDS, waited
        assert self.process.wait(END_SECONDS) == 0
        return f"{kind}: {message}"


@contextlib.contextmanager
def chief_and_cluster(call: str):
    with ServerProcesses(workers=2, parameter_servers=2) as cluster, Chief(cluster, call) as chief:
        yield chief, cluster


def stop(cluster: ServerProcesses, job: str, index: int) -> float:
    cluster.stop(job, index)
    return time.monotonic()


def assert_names(error: str, kind: str, task: str) -> None:
    assert re.match(rf"{kind}: {task} \(127\.0\.0\.1:\d+\) has not answered for 4 s", error), error
    assert "`tfqcomm.callbacks.BackupAndRestore` resumes" in error


@pytest.mark.parametrize(
    ("kind", "server"), [("sync", 0), ("sync", 1), ("async", 0), ("leader", 1)]
)
def test_a_stopped_parameter_server_is_an_error(kind, server):
    with chief_and_cluster(f"train({kind!r})") as (chief, cluster):
        chief.wait_for("epoch 2: 2 workers")
        error = chief.error(since=stop(cluster, "ps", server))
    assert_names(error, "ServerLost", f"Parameter server {server}")


@pytest.mark.parametrize("kind", ["sync", "async", "leader"])
def test_a_stopped_worker_is_an_error(kind):
    with chief_and_cluster(f"train({kind!r})") as (chief, cluster):
        chief.wait_for("epoch 2: 2 workers")
        error = chief.error(since=stop(cluster, "worker", 1))
    assert_names(error, "RuntimeError", "Worker 1")


def test_a_server_that_is_stopped_before_the_chief_comes_is_an_error():
    with ServerProcesses(workers=2, parameter_servers=2) as cluster:
        with Chief(cluster, "evaluate()") as first:  # the cluster is up
            first.wait_for("made")
        cluster.stop("ps", 1)
        with Chief(cluster, "connect()") as chief:
            error = chief.wait_for(r"(\w+: .*) at ")[1]
            assert chief.process.wait(END_SECONDS) == 0
    assert_names(error, "ServerLost", "Parameter server 1")


@pytest.mark.parametrize("call", ["begin()", "evaluate()"])
def test_a_server_that_is_stopped_between_two_calls_is_an_error(call):
    with chief_and_cluster(call) as (chief, cluster):
        chief.wait_for("made")
        stopped = stop(cluster, "ps", 0)
        chief.go_on()
        error = chief.error(since=stopped)
    assert_names(error, "ServerLost", "Parameter server 0")


def test_a_backup_resumes_on_another_cluster(tmp_path):
    call = f"train('sync', {str(tmp_path)!r})"
    with chief_and_cluster(call) as (chief, cluster):
        chief.wait_for("epoch 2: 2 workers")
        assert "ServerLost" in chief.error(since=stop(cluster, "ps", 0))
    with chief_and_cluster(call) as (chief, _):
        assert int(chief.wait_for(r"begins with epoch (\d+)")[1]) >= 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_step_that_takes_long_is_none(mode):
    with (
        ServerProcesses(workers=2, parameter_servers=1) as cluster,
        start_workers(
            frozen_runs.compute_for_long,
            workers=1,
            args={"mode": mode},
            env=cluster.chief_environment,
        ) as chief,
    ):
        assert chief.wait(timeout=240)[0] > 6 * TIMEOUT_SECONDS
