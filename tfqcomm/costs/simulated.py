"""A transport that goes nowhere: the work of one worker among many, without the others."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.transport.local import LocalTransport


class SimulatedTransport(LocalTransport):
    """One process of `world`, whose peers all send what it sends itself.

    What it encodes and decodes, and how many bytes it counts, is what it would be among them.

    Args:
        world: processes, W.
    """

    def __init__(self, world: int):
        super().__init__()
        self.processes = world

    def gather_processes(self, stacked):
        return tf.tile(stacked, [self.processes] + [1] * (stacked.shape.rank - 1))
