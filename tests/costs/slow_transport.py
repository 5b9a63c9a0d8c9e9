"""A transport that takes as long as a network would, by the formulas of rings."""

import time
from collections.abc import Callable

import tensorflow as tf

from tfqcomm.costs.simulated import SimulatedTransport

ROUND, BYTE = 2e-3, 50e-9  # seconds: 160 Mbit/s


class Clock:
    """In place of the module `time`: nothing takes any, but for those who sleep."""

    def __init__(self):
        self._now = 0.0

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def perf_counter(self) -> float:
        return self._now

    def process_time(self) -> float:
        return 0.0


class SlowTransport(SimulatedTransport):
    """One process of `world`, whose peers send what it sends, late."""

    def __init__(self, world: int, sleep: Callable[[float], None] = time.sleep):
        super().__init__(world)
        self._sleep = sleep

    def gather_processes(self, stacked):
        others = self.processes - 1
        return self._after(super().gather_processes(stacked), stacked, others, others)

    def reduce_processes(self, value):
        others = self.processes - 1
        if self.processes == 2 and value.shape[0] < 2**18:  # as a gather
            return self._after(value, value, 1, 1)
        return self._after(value, value, 2 * others, 2 * others / self.processes)

    def exchange_processes(self, rows):
        return self._after(rows, rows, 1, (self.processes - 1) / self.processes)

    def _after(self, result, sent, rounds, times):
        seconds = rounds * ROUND + 4 * sent.shape.num_elements() * times * BYTE

        def wait(value):
            self._sleep(seconds)
            return value

        with tf.control_dependencies([sent]):
            late = tf.numpy_function(wait, [result], result.dtype)
        late.set_shape(result.shape)
        return late
