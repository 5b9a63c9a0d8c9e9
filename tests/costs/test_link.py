"""The link is found by timing collectives: here those of a network that is played."""

import time

import pytest
import tensorflow as tf

from tests.costs.slow_transport import BYTE, ROUND, SlowTransport
from tfqcomm.costs import link as links
from tfqcomm.costs.simulated import SimulatedTransport


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
