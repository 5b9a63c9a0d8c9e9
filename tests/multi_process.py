"""Runs a function in several worker processes that form one TensorFlow cluster.

    results = run_workers("tests.some_module:function", workers=2, args={"steps": 3})

    with start_workers(function, workers=3) as running:   # to watch, kill and restart workers
        running.wait_for_output(1, "step 5")
        running.kill(1)
        results = running.wait()                          # [result, None, result]

The function must be at the top level of its module: a worker imports it by name.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests import processes
from tests.multi_process_worker import work
from tests.network import Network, Traffic
from tests.processes import ROOT
from tfqcomm.launch import cluster_of, reserve_ports, task_environment

PORT = 2222  # in a namespace of its own, where all are free
POLL_SECONDS = 0.05
TAIL_LINES = 60  # of each worker's output in an error

# Put before a program that uses nothing of tfqcomm but its launcher: `import tfqcomm` would import
# TensorFlow, which takes seconds.
WITHOUT_TENSORFLOW = f"""
import sys, types
sys.modules["tfqcomm"] = types.ModuleType("tfqcomm")
sys.modules["tfqcomm"].__path__ = [{str(ROOT / "tfqcomm")!r}]
"""


class WorkersFailed(RuntimeError):
    """A worker failed or took too long. The message ends with what each worker printed last."""

    def __init__(self, message: str, exit_codes: list[int | None]):
        super().__init__(message)
        self.exit_codes = exit_codes  # per worker; negative: a signal; None: was still running


class Results(list):
    """What each worker's function returned; with a network, also what each worker sent."""

    traffic: list[Traffic] | None = None


def run_workers(
    function: str | Callable,
    workers: int = 2,
    args: Mapping[str, Any] | None = None,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    devices: int = 1,
    network: Network | None = None,
) -> Results:
    """Runs `function(**args)` in each worker and returns the results in the workers' order.

    Args:
        function: A function, or its name "module:function". What it takes and returns is pickled.
        workers: The number of processes.
        args: Keyword arguments of the function.
        timeout: Seconds until all workers are killed.
        env: Environment variables on top of ours and TF_CONFIG.
        devices: Logical CPU devices in each worker.
        network: Run worker i in namespace i of this network. Then `.traffic` of the results says
            how many bytes each worker sent and received; inside a worker,
            `tests.network.interface_bytes()` does.

    Raises:
        WorkersFailed: A worker raised, died, or has no result after `timeout` seconds.
    """
    with start_workers(function, workers, args, env, devices, network) as running:
        results = Results(running.wait(timeout))
        results.traffic = running.traffic() if network else None
    return results


def start_workers(
    function: str | Callable,
    workers: int = 2,
    args: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    devices: int = 1,
    network: Network | None = None,
) -> Workers:
    """Starts what `run_workers` waits for. The end of the context kills all workers."""
    return Workers(_name_of(function), workers, dict(args or {}), env or {}, devices, network)


class Workers:
    """Running workers."""

    def __init__(self, function, count, args, env, devices, network):
        self._network = network
        self._undo = contextlib.ExitStack()
        self._directory = pathlib.Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
        self._arguments = [function, devices, args]
        self._before = network.traffic() if network else []
        cluster = cluster_of(self._addresses(count))
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # for what a worker starts
        self._environments = [
            {**os.environ, "PYTHONPATH": path, **task_environment(cluster, "worker", i), **env}
            for i in range(count)
        ]
        self._processes: list[processes.Process | None] = [None] * count
        self._killed: set[int] = set()
        self._undo.callback(self._kill_all)
        try:
            for i in range(count):
                self._start(i)
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        self._undo.close()

    def kill(self, i: int, number: int = signal.SIGKILL) -> None:
        """Kills worker i and waits for its end. Its result is None, unless it is restarted."""
        self._killed.add(i)
        self._processes[i].kill(number)

    def restart(self, i: int) -> None:
        """Starts worker i again, under its old address. Its output goes on in the same place."""
        self.kill(i)
        self._result(i).unlink(missing_ok=True)
        self._start(i)
        self._killed.discard(i)

    def exit_code(self, i: int) -> int | None:
        """Returns the exit code of worker i, None while it runs."""
        return self._processes[i].poll()

    def output(self, i: int) -> str:
        """Returns all that worker i has printed."""
        path = self._directory / f"output{i}"
        return path.read_text(errors="replace") if path.exists() else ""

    def traffic(self) -> list[Traffic]:
        """Returns what each worker has sent and received since the workers were started."""
        pairs = zip(self._network.traffic(), self._before, strict=True)
        return [now.since(before) for now, before in pairs]

    def wait_for_output(self, i: int, text: str, timeout: float = 60) -> None:
        """Waits until worker i has printed `text`."""
        self._wait_until(lambda: text in self.output(i), timeout, f"worker {i} to print {text!r}")

    def wait(self, timeout: float = 120) -> list[Any]:
        """Waits for all workers that were not killed and returns the results."""
        waited = [i for i in range(len(self._processes)) if i not in self._killed]
        self._wait_until(
            lambda: all(self._result(i).exists() for i in waited), timeout, "the results"
        )
        return [
            pickle.loads(self._result(i).read_bytes()) if i in waited else None
            for i in range(len(self._processes))
        ]

    def _start(self, i: int) -> None:
        self._processes[i] = processes.start(
            work,
            [*self._arguments, self._result(i)],
            environment=self._environments[i],
            output=self._directory / f"output{i}",
            namespace=self._network.namespaces[i] if self._network else None,
        )

    def _wait_until(self, reached: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while True:
            failed = self._failed()  # first: what a worker did before it ended counts
            if reached():
                return
            if failed:
                self._fail(f"Worker {failed[0]} failed")
            if time.monotonic() > deadline:
                for process in self._processes:
                    process.send_signal(signal.SIGUSR1)  # It prints where it hangs.
                time.sleep(0.5)
                self._fail(f"Waited {timeout} s for {what}")
            time.sleep(POLL_SECONDS)

    def _failed(self) -> list[int]:
        ended = [i for i, process in enumerate(self._processes) if process.poll() is not None]
        return [i for i in ended if i not in self._killed]

    def _fail(self, message: str) -> None:
        codes = [process.poll() for process in self._processes]
        for i, code in enumerate(codes):
            tail = "\n".join(self.output(i).splitlines()[-TAIL_LINES:])
            message += f"\n---- worker {i}, exit code {code}, printed last:\n{tail}"
        raise WorkersFailed(message, codes)

    def _addresses(self, count: int) -> list[str]:
        if self._network:
            return [f"{address}:{PORT}" for address in self._network.addresses[:count]]
        ports = [self._undo.enter_context(port) for port in reserve_ports(count)]
        return [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]

    def _result(self, i: int) -> pathlib.Path:
        return self._directory / f"result{i}"

    def _kill_all(self) -> None:
        for process in filter(None, self._processes):
            process.kill()


def _name_of(function: str | Callable) -> str:
    if isinstance(function, str):
        return function
    if "." in function.__qualname__:
        raise ValueError(f"A worker cannot import {function.__qualname__}: it is not top-level.")
    return f"{function.__module__}:{function.__qualname__}"
