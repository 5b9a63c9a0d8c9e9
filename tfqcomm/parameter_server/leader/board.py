"""Who leads, who shows its weights, and who pulls which: the chief's book, without TensorFlow.

    every step of a worker       its mean loss is noted; the total count goes up by one
    every W * period in total    each group elects: the lowest loss leads
    the leader's next step       it shows its weights: they go to the servers
    everybody else's next step   it pulls towards what was shown last, once

Nobody waits: a worker does what there is for it to do after a step, and takes the next one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence


@dataclasses.dataclass(eq=False)
class Buffer:
    """Room for one leader's weights on the servers.

    Attributes:
        variables: one on each server.
        users: slots that show it, workers that read it, a worker that fills it.
    """

    variables: Sequence
    users: int = 0


@dataclasses.dataclass
class Slot:
    """The leader of one group.

    Attributes:
        ranks: its members.
        pull: how far they go towards the leader.
        elected: who is to show its weights; None once it has begun to.
        leader: whose weights are shown.
        shown: where they are.
        number: of weights shown so far.
        shown_at: the total count then.
    """

    ranks: range
    pull: float
    elected: int | None = None
    leader: int | None = None
    shown: Buffer | None = None
    number: int = 0
    shown_at: int = 0


@dataclasses.dataclass(frozen=True)
class Errand:
    """What a worker has to do between two steps.

    Attributes:
        show: where to put its weights, None for nowhere.
        slots: that will show them.
        pulls: (weight, buffer) of each leader to be pulled to.
        ages: steps of all workers since each of these leaders showed its weights.
    """

    show: Buffer | None
    slots: tuple[Slot, ...]
    pulls: tuple[tuple[float, Buffer], ...]
    ages: tuple[int, ...]


class LeaderBoard:
    """Elections and errands. Not thread-safe: its driver holds a lock.

    Args:
        levels: of `LeaderSGD`: `groups`, `period` and `pull` of each; the last is that of all.
        workers: W.
        make_buffer: makes room on the servers.

    Attributes:
        total: steps of all workers.
        times_led: for each worker, how often it was the leader of all.
        slots: of each level its period in total steps, and the leaders of its groups.
        buffers: made so far, at most one for each slot and each worker that is reading.
    """

    def __init__(self, levels: Sequence, workers: int, make_buffer: Callable[[], Buffer]):
        self.total = 0
        self.times_led = [0] * workers
        self.buffers: list[Buffer] = []
        self._losses = [math.inf] * workers
        self.make_buffer = make_buffer
        self.slots = []  # (period, slots) of each level
        for level in levels:
            size = workers // level.groups
            groups = [range(start, start + size) for start in range(0, workers, size)]
            slots = [Slot(ranks, level.pull) for ranks in groups]
            self.slots.append((workers * level.period, slots))
        self._seen = [[0] * len(levels) for _ in range(workers)]

    def after_step(self, rank: int, loss: float) -> Errand:
        """Notes a step of a worker and its mean loss, inf for one that must not lead."""
        self._losses[rank] = loss if math.isfinite(loss) else math.inf
        self.total += 1
        for period, slots in self.slots:
            if self.total % period == 0:
                for slot in slots:
                    self._elect(slot)
        return self._errand(rank)

    def done(self, rank: int, errand: Errand, *, shown: bool) -> None:
        """The worker has been on its errand.

        Args:
            shown: whether it has filled `errand.show`.
        """
        for _, buffer in errand.pulls:
            buffer.users -= 1
        if errand.show is None:
            return
        if shown:
            for slot in errand.slots:
                self._show(slot, rank, errand.show)
        errand.show.users -= 1

    def lose(self, rank: int) -> None:
        """The worker is gone: it leads nobody, and another one shows its weights instead."""
        self._losses[rank] = math.inf
        for _, slots in self.slots:
            for slot in slots:
                if slot.elected == rank:
                    self._elect(slot)

    def _elect(self, slot: Slot) -> None:
        """Ties go to the lowest rank, as in `LeaderSGD`."""
        best = min(slot.ranks, key=lambda rank: self._losses[rank])
        slot.elected = best if math.isfinite(self._losses[best]) else None

    def _errand(self, rank: int) -> Errand:
        to_show = tuple(slot for _, slots in self.slots for slot in slots if slot.elected == rank)
        for slot in to_show:
            slot.elected = None
        pulls: dict[Buffer, float] = {}
        ages = []
        for level, (_, slots) in enumerate(self.slots):
            slot = next(slot for slot in slots if rank in slot.ranks)
            if slot.number == self._seen[rank][level]:
                continue
            self._seen[rank][level] = slot.number
            if slot.shown is not None and slot.leader != rank:  # the leader does not move
                pulls[slot.shown] = pulls.get(slot.shown, 0.0) + slot.pull
                ages.append(self.total - slot.shown_at)
        for buffer in pulls:
            buffer.users += 1
        show = self._free_buffer() if to_show else None
        return Errand(show, to_show, tuple((w, b) for b, w in pulls.items()), tuple(ages))

    def _show(self, slot: Slot, rank: int, buffer: Buffer) -> None:
        if slot.shown is not None:
            slot.shown.users -= 1
        buffer.users += 1
        slot.leader, slot.shown, slot.shown_at = rank, buffer, self.total
        slot.number += 1
        if len(slot.ranks) == len(self._losses):
            self.times_led[rank] += 1

    def _free_buffer(self) -> Buffer:
        buffer = next((buffer for buffer in self.buffers if not buffer.users), None)
        if buffer is None:
            buffer = self.make_buffer()
            self.buffers.append(buffer)
        buffer.users += 1
        return buffer
