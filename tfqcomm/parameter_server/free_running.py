"""Workers that take steps in threads of their own, and do not wait for one another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.fleet import Fleet

POLL_SECONDS = 0.2  # between looks whether a lost worker is back
CLOSE_SECONDS = 60.0  # that a step may still take at the end


class Errands(Protocol):
    """What a way of training does around each worker's steps, in the worker's thread."""

    def before_step(self, worker) -> None:
        """Called when the worker is about to take a step."""

    def after_step(self, worker, report, steps: FreeRunning) -> None:
        """Called with what its step returned; calls `steps.count` once."""

    def lost(self, worker, steps: FreeRunning) -> bool:
        """Called when it was lost in its step; whether that counts, and `steps.count` was called.

        If not, another step is taken in its place.
        """


class FreeRunning:
    """A driver that lets workers start steps as soon as they can.

    Args:
        fleet: what it drives.
        errands: what is done around each step.

    Attributes:
        changed: guards all that is below, and is told of changes.
        under_way: for each worker in a step the fleet's version when it began.
        error: what ended a step; no more are waited for.
    """

    def __init__(self, fleet: Fleet, errands: Errands):
        self._fleet = fleet
        self._errands = errands
        self.changed = threading.Condition()
        self.under_way: dict[BaseWorker, int] = {}
        self.error: BaseException | None = None
        self._open = False  # whether steps of this epoch may start
        self._to_start = 0  # of these, how many
        self._handled = 0  # messages of this epoch: applied, or dropped as not finite
        self._expected = 0  # of these, at the end of the current round
        self._staleness: list[int] = []
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), daemon=True)
            for worker in fleet.workers
        ]
        for thread in self._threads:
            thread.start()

    def begin_epoch(self, rounds: int) -> None:
        """Lets workers start all steps of an epoch: `rounds` for each of them on average."""
        with self.changed:
            self._open = True
            self._to_start = rounds * len(self._fleet.workers)
            self._handled = self._expected = 0
            self.changed.notify_all()

    def round(self) -> None:
        """Waits for as many messages as there are workers, whoever sends them."""
        with self.changed:
            self._expected += len(self._fleet.workers)
        self._fleet.alive()  # or an error
        while not self._round_is_over():
            self._fleet.alive()

    def _round_is_over(self) -> bool:
        with self.changed:
            if self._handled < self._expected and self.error is None:
                self.changed.wait(timeout=1.0)
            if self.error is not None:
                raise self.error
            return self._handled >= self._expected

    def end_epoch(self) -> None:
        """Starts no more steps, waits for those under way, and raises what ended one of them."""
        with self.changed:
            self._end()
            while self.under_way and self.error is None:
                self.changed.wait()
            if self.error is not None:
                raise self.error

    def count(self, staleness: Sequence[int]) -> None:
        """Notes that a message was handled; to be called with `changed` held.

        Args:
            staleness: of what was taken on this occasion, in steps of the fleet.
        """
        self._handled += 1
        self._staleness += staleness

    def staleness(self) -> list[int]:
        """Of the messages applied since the last call."""
        with self.changed:
            seen, self._staleness = self._staleness, []
            return seen

    def close(self) -> None:
        """Lets workers finish what they are at, and waits for it."""
        with self.changed:
            self._closed = True
            self._end()
            self.changed.notify_all()
        for thread in self._threads:  # one that outlives the interpreter would abort it
            thread.join(CLOSE_SECONDS)

    def _end(self) -> None:
        """No step may start any more, not even in place of one that is lost."""
        self._open = False
        self._to_start = 0

    def _work(self, worker: BaseWorker) -> None:
        """The life of a worker, in a thread of its own."""
        try:
            while self._take(worker):
                report = self._fleet.attempt(worker, worker.step)
                if report is not None:
                    self._errands.after_step(worker, report, self)
                    counts = True
                else:
                    counts = self._errands.lost(worker, self)
                with self.changed:
                    if not counts:
                        self._to_start += self._open  # by another, or by this one when it is back
                    del self.under_way[worker]
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _take(self, worker: BaseWorker) -> bool:
        """Waits for a step to do; False at the end."""
        with self.changed:
            while not (self._to_start and worker.alive):
                if self._closed:
                    return False
                self.changed.wait(None if worker.alive else POLL_SECONDS)
            self._to_start -= 1
            self.under_way[worker] = self._fleet.applied
        self._errands.before_step(worker)
        return True
