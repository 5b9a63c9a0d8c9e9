"""The link is found by timing collectives: here those of a network that is played."""

import time

import pytest
import tensorflow as tf

from tfqcomm.costs import link as links
from tfqcomm.costs.simulated import SimulatedTransport

ROUND, BYTE = 2e-3, 50e-9  # seconds: 160 Mbit/s


class SlowTransport(SimulatedTransport):
    """Takes as long as a network would, by the formulas of rings."""

    def _gather_processes(self, stacked):
        others = self.processes - 1
        return self._after(super()._gather_processes(stacked), stacked, others, others)

    def _reduce_processes(self, value):
        others = self.processes - 1
        if self.processes == 2 and value.shape[0] < 2**18:  # as a gather
            return self._after(value, value, 1, 1)
        return self._after(value, value, 2 * others, 2 * others / self.processes)

    def _exchange_processes(self, rows):
        return self._after(rows, rows, 1, (self.processes - 1) / self.processes)

    def _after(self, result, sent, rounds, times):
        seconds = rounds * ROUND + 4 * sent.shape.num_elements() * times * BYTE

        def wait(value):
            time.sleep(seconds)
            return value

        with tf.control_dependencies([sent]):
            late = tf.numpy_function(wait, [result], result.dtype)
        late.set_shape(result.shape)
        return late


@pytest.mark.parametrize("world", [2, 4])
def test_rounds_and_bytes_are_told_apart(world, monkeypatch):
    monkeypatch.setattr(links, "_long", lambda transport, collective: 2**19)
    link = links.measure(SlowTransport(world))
    for line in link.lines:  # sleeping takes a little longer, never less
        assert ROUND <= line.round_seconds < 3 * ROUND
        assert line.byte_seconds == pytest.approx(BYTE, rel=0.5)
    assert 0 <= link.processor_seconds < BYTE


def test_messages_are_as_long_as_the_link_allows():
    assert links._long(SimulatedTransport(2), lambda x: x) == links.MOST

    def slow(x):
        return tf.numpy_function(lambda v: (time.sleep(len(v) * 1e-6), v)[1], [x], x.dtype)

    assert links._long(SimulatedTransport(2), slow) == 2**18  # the first beyond 0.15 s
