"""A cluster of real processes that tests may kill: workers and servers run the launcher's server.

with ServerProcesses(workers=2, parameter_servers=2) as cluster:
    with start_workers(function, workers=1, env=cluster.chief_environment) as chief:
        cluster.kill("worker", 1)
        cluster.start("worker", 1)
"""

from __future__ import annotations

import contextlib
import os
import signal

from tests import processes
from tfqcomm.launch import cluster_of, reserve_ports, task_environment


class ServerProcesses:
    """All tasks but the chief."""

    def __init__(self, workers: int, parameter_servers: int):
        self._undo = contextlib.ExitStack()
        count = 1 + workers + parameter_servers
        ports = [self._undo.enter_context(port) for port in reserve_ports(count)]
        addresses = [f"127.0.0.1:{port.getsockname()[1]}" for port in ports]
        self._cluster = cluster_of(addresses, parameter_servers)
        self._processes: dict[tuple[str, int], processes.Process] = {}
        self._undo.callback(self._kill_all)

    def __enter__(self) -> ServerProcesses:
        for job in ("worker", "ps"):
            for index in range(len(self._cluster[job])):
                self.start(job, index)
        return self

    def __exit__(self, *_) -> None:
        self._undo.close()

    @property
    def chief_environment(self) -> dict[str, str]:
        """What makes a process the chief."""
        return task_environment(self._cluster, "chief", 0)

    def start(self, job: str, index: int) -> None:
        """Starts a task, perhaps again."""
        environment = {**os.environ, **task_environment(self._cluster, job, index)}
        self._processes[job, index] = processes.start(
            processes.run_module, ["tfqcomm.launch", "--serve"], environment=environment
        )

    def kill(self, job: str, index: int) -> None:
        """Kills a task as an out-of-memory killer would."""
        self._processes[job, index].kill()

    def stop(self, job: str, index: int) -> None:
        """Lets a task hang."""
        self._processes[job, index].send_signal(signal.SIGSTOP)

    def _kill_all(self) -> None:
        for process in self._processes.values():
            process.kill()
