"""The harness of the multi-process tests, tested: no result may be lost and no process left."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from tests import multi_process_functions as functions
from tests.multi_process import (
    ROOT,
    WITHOUT_TENSORFLOW,
    WorkersFailed,
    run_workers,
    start_workers,
)
from tests.network import Traffic, network


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.multi_process
def test_results_come_in_order_and_no_process_is_left():
    results = run_workers(functions.describe, workers=3, args={"word": "ñ"})
    assert [r["task"] for r in results] == [{"type": "worker", "index": i} for i in range(3)]
    assert len(set(results[0]["cluster"]["worker"])) == 3
    assert {r["word"] for r in results} == {"ñ"}
    assert not any(is_alive(r["pid"]) for r in results)


@pytest.mark.slow
@pytest.mark.multi_process
def test_failure_ends_all_and_shows_every_output():
    start = time.monotonic()
    with pytest.raises(WorkersFailed) as error:
        run_workers("tests.multi_process_functions:fail_on_worker_1")
    assert time.monotonic() - start < 20
    message = str(error.value)
    assert message.startswith("Worker 1 failed")
    assert "ValueError: a mistake of worker 1" in message
    assert error.value.exit_codes[1] == 1


@pytest.mark.slow
@pytest.mark.multi_process
def test_timeout_says_where_the_workers_hang():
    with start_workers(functions.sleep, args={"seconds": 60}) as running:
        for i in range(2):
            running.wait_for_output(i, "asleep")
        with pytest.raises(WorkersFailed, match=r"Waited 0.2 s for the results(.|\n)* in sleep\n"):
            running.wait(timeout=0.2)


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_worker_can_be_killed_and_restarted(tmp_path):
    with start_workers(
        functions.wait_for_second_life, args={"directory": str(tmp_path)}
    ) as running:
        running.wait_for_output(1, "asleep")
        running.kill(1)
        assert running.exit_code(1) == -9
        assert running.wait() == ["finished", None]
        running.restart(1)
        assert running.wait() == ["finished", "finished"]


@pytest.mark.multi_process
def test_workers_end_with_a_killed_parent(tmp_path):
    script = """
        import multiprocessing
        from tests.multi_process import start_workers
        multiprocessing.set_forkserver_preload([])  # else the first process waits for TensorFlow
        from tests import multi_process_functions as functions
        running = start_workers(functions.sleep, args={"seconds": 60})
        running.wait_for_output(0, "asleep")
        print(*[p.pid for p in running._processes], flush=True)
        running.wait()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TENSORFLOW + textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # It cannot tidy up.
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.multi_process
def test_logical_devices():
    assert run_workers(functions.count_logical_devices, workers=1, devices=3) == [3]


def test_function_must_be_importable():
    with pytest.raises(ValueError, match="it is not top-level"):
        run_workers(lambda: None)


@pytest.mark.network
def test_network_counts_and_limits_what_workers_send():
    count = 2_000_000
    with network(2, rate=20_000_000) as net:
        results = run_workers(functions.send, args={"count": count}, network=net)
    counted_inside, seconds = zip(*results, strict=True)
    assert 0.85 < min(seconds) / (count / (20e6 / 8)) < 2
    for traffic in (counted_inside, results.traffic):
        assert count < traffic[0].sent < 1.06 * count
        assert traffic[1].received == pytest.approx(traffic[0].sent, rel=0.01)
        assert traffic[1].sent < 0.06 * count


@pytest.mark.network
def test_network_is_silent():
    with network(2) as net:
        time.sleep(0.5)
        assert net.traffic() == [Traffic(0, 0)] * 2
