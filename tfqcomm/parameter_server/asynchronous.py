"""Each message is applied as it arrives, scaled by 1 / W."""

from __future__ import annotations

import threading

from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.worker import Worker

POLL_SECONDS = 0.2  # between looks whether a lost worker is back
CLOSE_SECONDS = 60.0  # that a step may still take at the end


class Asynchronous:
    """Workers that never wait for one another, unless staleness has a bound.

    The staleness of a message is the number of server steps between the pull of the weights it was
    computed at and its own. With a bound b a message waits before it is applied if some other
    could then not keep to b: the r-th oldest of those under way will have, at the least, the steps
    since its pull and r more. With b >= W - 1 the oldest may always go, so nobody waits for ever,
    and no message is dropped.

    Args:
        fleet: what it drives.
        max_staleness: the bound b; None for none.
    """

    def __init__(self, fleet: Fleet, max_staleness: int | None = None):
        self._fleet = fleet
        self._bound = max_staleness
        self._changed = threading.Condition()  # guards all below
        self._open = False  # whether steps of this epoch may start
        self._to_start = 0  # of these, how many
        self._handled = 0  # messages of this epoch: applied, or dropped as not finite
        self._expected = 0  # of these, at the end of the current round
        self._pulled: dict[Worker, int] = {}  # version at which a worker under way began
        self._staleness: list[int] = []
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), daemon=True)
            for worker in fleet.workers
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def share(workers: int) -> float:
        """The weight of a message in a server's step."""
        return 1.0 / workers

    def begin_epoch(self, rounds: int) -> None:
        """Lets workers start all steps of an epoch: `rounds` for each of them on average."""
        with self._changed:
            self._open = True
            self._to_start = rounds * len(self._fleet.workers)
            self._handled = self._expected = 0
            self._changed.notify_all()

    def round(self) -> None:
        """Waits for as many messages as there are workers, whoever sends them."""
        with self._changed:
            self._expected += len(self._fleet.workers)
        self._fleet.alive()  # or an error
        while not self._round_is_over():
            self._fleet.alive()

    def _round_is_over(self) -> bool:
        with self._changed:
            if self._handled < self._expected and self._error is None:
                self._changed.wait(timeout=1.0)
            if self._error is not None:
                raise self._error
            return self._handled >= self._expected

    def end_epoch(self) -> None:
        """Starts no more steps, waits for those under way, and raises what ended one of them."""
        with self._changed:
            self._end()
            while self._pulled and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def staleness(self) -> list[int]:
        """Of the messages applied since the last call."""
        with self._changed:
            seen, self._staleness = self._staleness, []
            return seen

    def close(self) -> None:
        """Lets workers finish what they are at, and waits for it."""
        with self._changed:
            self._closed = True
            self._end()
            self._changed.notify_all()
        for thread in self._threads:  # one that outlives the interpreter would abort it
            thread.join(CLOSE_SECONDS)

    def _end(self) -> None:
        """No step may start any more, not even in place of one that is lost."""
        self._open = False
        self._to_start = 0

    def _work(self, worker: Worker) -> None:
        """The life of a worker, in a thread of its own."""
        try:
            while self._take(worker):
                report = self._fleet.attempt(worker, worker.step)
                if report is not None:
                    self._hand_in(worker)
                with self._changed:
                    if report is None:
                        self._give_back(worker)
                    del self._pulled[worker]
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self, worker: Worker) -> bool:
        """Waits for a step to do; False at the end."""
        with self._changed:
            while not (self._to_start and worker.alive):
                if self._closed:
                    return False
                self._changed.wait(None if worker.alive else POLL_SECONDS)
            self._to_start -= 1
            self._pulled[worker] = self._fleet.applied
            return True

    def _give_back(self, worker: Worker) -> None:
        """It was lost in its step: somebody else is to do it, or this one when it is back."""
        self._to_start += self._open

    def _hand_in(self, worker: Worker) -> None:
        """It has taken its step."""
        with self._changed:
            if worker.report.healthy:
                while not self._may_go(worker):
                    self._changed.wait()
                self._staleness.append(self._fleet.applied - worker.report.version)
                self._fleet.apply([worker])
            else:
                self._fleet.skip([worker])
            self._handled += 1

    def _may_go(self, worker: Worker) -> bool:
        """Whether all others under way could still keep to the bound, one after the other."""
        if self._bound is None or self._error is not None:
            return True
        others = sorted(version for w, version in self._pulled.items() if w is not worker)
        after = self._fleet.applied + 1
        return all(after + r - version <= self._bound for r, version in enumerate(others))
