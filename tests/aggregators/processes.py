"""Several processes played by threads of this one: a transport without a network.

It runs the code that tells processes apart (ranks, owners, who holds which residual) in
milliseconds; `tests/distribute` runs it over TCP.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence

import tensorflow as tf

from tfqcomm.transport.base import Transport


class Meeting:
    """Where the threads hand each other their values."""

    def __init__(self, processes: int):
        self.barrier = threading.Barrier(processes, timeout=240)  # less than the test may take
        self._values = [None] * processes

    def exchange(self, process: int, value: tf.Tensor) -> list[tf.Tensor]:
        """The values of all, in rank order; every process calls it as often as the others."""
        self._values[process] = value
        self.barrier.wait()
        values = list(self._values)
        self.barrier.wait()
        return values


class ThreadTransport(Transport):
    """One process' end; eager mode only."""

    def __init__(self, meeting: Meeting, processes: int, process: int, devices: Sequence[str]):
        super().__init__(processes, process, devices)
        self._meeting = meeting

    def agree(self, topic, facts, notes):
        pass

    def gather_processes(self, stacked):
        return tf.concat(self._meeting.exchange(self.process, stacked), 0)

    def reduce_processes(self, value):
        return tf.add_n(self._meeting.exchange(self.process, value))

    def exchange_processes(self, rows):
        received = self._meeting.exchange(self.process, rows)
        return tf.stack([row[self.process] for row in received])

    def broadcast_processes(self, value, source, processes):
        return self._meeting.exchange(self.process, value)[int(source)]


def run_processes(processes: int, local: int, function: Callable[[Transport], object]) -> list:
    """Calls `function` with the transport of each process; returns the results in rank order."""
    meeting = Meeting(processes)

    def run(process):
        try:
            return function(ThreadTransport(meeting, processes, process, ["CPU:0"] * local))
        except BaseException:
            meeting.barrier.abort()
            raise

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(run, process) for process in range(processes)]
        concurrent.futures.wait(futures)
    errors = [f.exception() for f in futures if f.exception() is not None]
    first = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)] or errors
    if first:
        raise first[0]
    return [future.result() for future in futures]
