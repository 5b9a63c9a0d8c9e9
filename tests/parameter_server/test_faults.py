"""Killed tasks: training goes on without a worker, and is an error without a server."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.multi_process import ROOT, start_workers
from tests.parameter_server import runs
from tests.parameter_server.cluster import ServerProcesses

pytestmark = [pytest.mark.multi_process, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 240  # processes that import TensorFlow on a busy machine


def train_and(interfere, function, **args):
    """The result of a chief that trains while somebody interferes with its cluster."""
    with (
        ServerProcesses(workers=2, parameter_servers=2) as cluster,
        start_workers(function, workers=1, args=args, env=cluster.chief_environment) as chief,
    ):
        chief.wait_for_output(0, "epoch 2: 2 workers", timeout=PATIENCE)
        interfere(cluster, chief)
        return chief.wait(timeout=PATIENCE)[0]


def assert_no_message_counts_twice(result, mode):
    """Every message is 1: in a round their mean counts, else each of two workers' a half."""
    share = 1.0 if mode == "sync" else 0.5
    assert result["weight"] == -share * result["iterations"]
    messages = sum(worker["messages"] for worker in result["workers"])
    if mode == "sync":
        assert result["iterations"] == 20 * result["epochs"]
        assert result["iterations"] < messages < 2 * result["iterations"]
    else:
        assert result["iterations"] == messages == 40 * result["epochs"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_worker_is_done_without(mode):
    def kill(cluster, chief):
        cluster.kill("worker", 1)

    result = train_and(kill, runs.train_through_faults, mode=mode, until_back=False)
    assert [worker["alive"] for worker in result["workers"]] == [True, False]
    assert_no_message_counts_twice(result, mode)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_worker_that_is_started_again_takes_part_again(mode):
    def kill_and_restart(cluster, chief):
        cluster.kill("worker", 0)
        chief.wait_for_output(0, ": 1 workers", timeout=PATIENCE)
        cluster.start("worker", 0)

    result = train_and(kill_and_restart, runs.train_through_faults, mode=mode, until_back=True)
    assert [worker["alive"] for worker in result["workers"]] == [True, True]
    assert_no_message_counts_twice(result, mode)


@pytest.mark.parametrize("pull_ahead", [False, True])
def test_messages_of_workers_that_are_killed_at_any_time_are_taken_once_or_never(pull_ahead):
    kills = 4

    def kill_and_restart(cluster, chief):
        random = np.random.default_rng()
        for kill in range(kills):
            worker = kill % 2
            time.sleep(random.uniform(0.1, 1.0))  # into the steps of an epoch
            cluster.kill("worker", worker)
            chief.wait_for_output(0, f"lost {kill + 1} times", timeout=PATIENCE)
            cluster.start("worker", worker)
            chief.wait_for_output(0, f"back {kill + 1} times", timeout=PATIENCE)

    result = train_and(
        kill_and_restart,
        runs.train_through_faults,
        mode="async",
        until_back=True,
        faults=kills,
        pull_ahead=pull_ahead,
    )
    assert_no_message_counts_twice(result, "async")
    # The second server, too; but one of those that were killed may have reached one server only.
    assert abs(result["taken"][1] - result["taken"][0]) <= kills


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_no_row_counts_a_message_twice_of_workers_that_are_killed(mode):
    kills = 3

    def kill_and_restart(cluster, chief):
        random = np.random.default_rng()
        for kill in range(kills):
            time.sleep(random.uniform(0.1, 1.0))  # while rows are under way
            cluster.kill("worker", kill % 2)
            chief.wait_for_output(0, f"lost {kill + 1} times", timeout=PATIENCE)
            cluster.start("worker", kill % 2)
            chief.wait_for_output(0, f"back {kill + 1} times", timeout=PATIENCE)

    result = train_and(
        kill_and_restart,
        runs.train_rows_through_faults,
        mode=mode,
        until_back=True,
        faults=kills,
    )
    share = 1.0 if mode == "sync" else 0.5
    for server, rows in enumerate((result["rows"][:5], result["rows"][5:])):
        moved = share * result["taken"][server]
        assert (rows[:, 0] == -moved).all()  # each server: one step, one change of each
        # Of the others 8e-4 is left out of a message: it counts, but for what is owed in the end,
        # and was when a worker was killed.
        np.testing.assert_allclose(rows[:, 1], -0.3 * moved, atol=(2 + kills) / 254)
    assert abs(result["taken"][1] - result["taken"][0]) <= (kills if mode == "async" else 0)
    assert result["iterations"] == result["taken"][0]
    messages = sum(worker["messages"] for worker in result["workers"])
    pushed = sum(worker["bytes_pushed"] for worker in result["workers"])
    rows = 10 * 4 * 4  # of a message: each is asked for, named and sent, in two words
    assert pushed >= messages * rows
    if mode == "async":
        assert messages == result["iterations"] == 40 * result["epochs"]
        assert pushed <= messages * (rows + 40)


@pytest.mark.parametrize(("mode", "server"), [("sync", 0), ("sync", 1), ("async", 0)])
def test_a_killed_parameter_server_is_an_error(mode, server):
    def kill(cluster, chief):
        cluster.kill("ps", server)

    message = train_and(kill, runs.train_until_it_fails, mode=mode)
    assert message.startswith(f"Parameter server {server} (127.0.0.1:")
    assert "is gone, and its weights with it. Restart the cluster" in message


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_chief_that_lost_a_worker_for_good_ends_by_itself(mode):
    script = f"""
from tests.parameter_server import runs
runs.train_through_faults({mode!r}, until_back=False)
print("trained", flush=True)
"""
    with ServerProcesses(workers=2, parameter_servers=2) as cluster:
        chief = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **cluster.chief_environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with chief:
            lines = []
            for line in chief.stdout:
                lines.append(line)
                if line.startswith("epoch 2: 2 workers"):
                    cluster.kill("worker", 1)
            assert chief.wait(timeout=PATIENCE) == 0, "".join(lines)
    assert "trained\n" in lines
