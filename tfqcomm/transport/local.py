"""Replicas of one process: nothing leaves it."""

from __future__ import annotations

from collections.abc import Sequence

from tfqcomm.transport.base import Transport


class LocalTransport(Transport):
    """All replicas live in this process: nothing leaves it."""

    def __init__(self, devices: Sequence[str | None] = (None,)):
        super().__init__(1, 0, devices)

    def agree(self, topic, facts, notes, **more):
        return True

    def gather_processes(self, stacked):
        return stacked

    def reduce_processes(self, value):
        return value

    def exchange_processes(self, rows):
        return rows

    def broadcast_processes(self, value, source, processes):
        return value
