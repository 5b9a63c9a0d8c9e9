"""The link is found by timing collectives: here those of a network that is played."""

import pytest
import tensorflow as tf

from tests.costs.slow_transport import BYTE, ROUND, Clock, SlowTransport
from tfqcomm.costs import link as links
from tfqcomm.costs.simulated import SimulatedTransport


@pytest.mark.parametrize("world", [2, 4])
def test_rounds_and_bytes_are_told_apart(world, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(links, "time", clock)
    monkeypatch.setattr(links, "_long", lambda transport, collective: 2**19)
    link = links.measure(SlowTransport(world, clock.sleep))
    for line in link.lines:
        assert line.round_seconds == pytest.approx(ROUND, rel=0.02)  # with its 64 words
        assert line.byte_seconds == pytest.approx(BYTE, rel=0.02)
    assert link.processor_seconds == 0


def test_messages_are_as_long_as_the_link_allows(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(links, "time", clock)
    assert links._long(SimulatedTransport(2), lambda x: x) == links.MOST

    def slow(x):
        return tf.numpy_function(lambda v: (clock.sleep(len(v) * 1e-6), v)[1], [x], x.dtype)

    assert links._long(SimulatedTransport(2), slow) == 2**18  # the first beyond 0.15 s
