"""One participant for each process: what replicas of a process have in common travels once."""

from __future__ import annotations

from tfqcomm.transport.base import Transport


class ProcessTransport(Transport):
    """A view of a transport in which a process takes part once, however many replicas it has.

        replicas    r0 r1 ... r(L-1)    rL ... r(2L-1)      world P x L
        processes          p0                 p1            world P

    It moves words over the other's collectives, in the same order, from each process' first device.

    Args:
        replicas: the transport between all replicas.
    """

    member = "process"

    def __init__(self, replicas: Transport):
        super().__init__(replicas.processes, replicas.process, [replicas.device])
        self._replicas = replicas

    def together(self):
        return self._replicas.together()

    def agree(self, topic, facts, notes, **more):
        return self._replicas.agree(topic, facts, notes, **more)

    def gather_processes(self, stacked):
        return self._replicas.gather_processes(stacked)

    def reduce_processes(self, value):
        return self._replicas.reduce_processes(value)

    def exchange_processes(self, rows):
        return self._replicas.exchange_processes(rows)

    def broadcast_processes(self, value, source, processes):
        return self._replicas.broadcast_processes(value, source, processes)
