"""What a learner does between two steps: it takes fragments, answers, or lets servers merge."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.alone import Pace
from tfqcomm.parameter_server.diloco.report import LearnerReport
from tfqcomm.parameter_server.diloco.rounds import Delivery, Round, Rounds
from tfqcomm.parameter_server.diloco.server import DiLoCoServer
from tfqcomm.parameter_server.diloco.worker import DiLoCoWorker
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.free_running import FreeRunning


class DiLoCoErrands:
    """After each step a learner does what the book has for it; meanwhile the others go on.

    Whoever finds that a round has ended lets the servers merge its fragment, which is a call to
    them, and no wait for another learner.

    Args:
        fleet: whose learners these are.
        rounds: the book.
        mixing: share of the global weights in what a learner goes on from.
        merging: held while servers merge.
        pace: their learning rates.
    """

    def __init__(
        self,
        fleet: Fleet[DiLoCoWorker],
        rounds: Rounds,
        mixing: float,
        merging: threading.Lock,
        pace: Pace,
    ):
        self._fleet = fleet
        self._rounds = rounds
        self._mixing = mixing
        self._merging = merging
        self._book = threading.Lock()
        self._began: dict[int, float] = {}  # rank -> when its step did
        self._pace = pace

    def before_step(self, worker: DiLoCoWorker) -> None:
        """Sets its learning rate; gives one that was started anew all fragments."""
        self._pace.set(worker)
        with self._book:
            anew = self._rounds.rejoin(worker.index, worker.lives)
        if anew:
            self._do_all(worker)
        self._began[worker.index] = time.monotonic()

    def after_step(self, worker: DiLoCoWorker, report: LearnerReport, steps: FreeRunning) -> None:
        """Counts the step, and does what the book asks for."""
        seconds = time.monotonic() - self._began[worker.index]
        with self._book:
            self._note_who_is_lost()
            examples = report.examples if report.healthy else 0
            self._rounds.took_step(worker.index, examples, seconds)
            if not report.sane:
                self._rounds.spoil(worker.index)
        ages = self._do_all(worker)
        with steps.changed:
            if report.healthy:
                self._fleet.take([worker])
            else:
                self._fleet.skip([worker])
            steps.count(ages)

    def lost(self, worker: DiLoCoWorker, steps: FreeRunning) -> bool:
        """Nobody waits for its answers."""
        self._lose(worker)
        return False

    def _lose(self, worker: DiLoCoWorker) -> None:
        with self._book:
            self._rounds.lose(worker.index)

    def _note_who_is_lost(self) -> None:
        """Also those of whom the chief has heard it between their steps."""
        for worker in self._fleet.workers:
            if not worker.alive:
                self._rounds.lose(worker.index)

    def _do_all(self, worker: DiLoCoWorker) -> list[int]:
        """All that there is to do now; returns the ages of the fragments that it took."""
        ages: list[int] = []
        while (errand := self._next(worker, ages)) is not None:
            if not errand():
                self._lose(worker)
                break
        return ages

    def _next(self, worker: DiLoCoWorker, ages: list[int]) -> Callable[[], bool] | None:
        """What is to be done next; it returns whether the learner is still there."""
        rank = worker.index
        with self._book:
            if (delivery := self._rounds.delivery(rank)) is not None:
                if delivery.age is not None:
                    ages.append(delivery.age)
                return functools.partial(self._deliver, worker, delivery)
            if (one := self._rounds.to_answer(rank)) is not None:
                return functools.partial(self._answer, worker, one)
            if (one := self._rounds.to_merge()) is not None:
                return functools.partial(self._merge, one)
        return None

    def _deliver(self, worker: DiLoCoWorker, delivery: Delivery) -> bool:
        share = 1.0 if delivery.whole else self._mixing
        taken = self._fleet.attempt(worker, lambda: worker.take(delivery.fragment, share))
        if taken is None:
            return False
        with self._book:
            self._rounds.delivered(worker.index, delivery)
        return True

    def _answer(self, worker: DiLoCoWorker, one: Round) -> bool:
        finite = self._fleet.attempt(worker, lambda: worker.answer(one.fragment))
        if finite is None:
            return False
        with self._book:
            self._rounds.answered(worker.index, one, finite)
        return True

    def _merge(self, one: Round) -> bool:
        weights = np.zeros(len(self._fleet.workers), np.float32)
        weights[list(one.answers)] = list(one.answers.values())
        with self._merging:
            merge_on(self._fleet, one.fragment, weights)
        with self._book:
            self._rounds.end(one)
        return True


def merge_on(fleet: Fleet, fragment: int, weights: np.ndarray) -> None:
    """Lets all servers move a fragment.

    Args:
        weights: float32[learners], of their answers.

    Raises:
        ServerLost: where one of them is gone.
    """
    servers: list[DiLoCoServer] = [server for server in fleet.servers if server.has(fragment)]
    try:
        fleet.in_parallel([lambda s=server: s.merge(fragment, weights) for server in servers])
    except tf.errors.OpError as error:
        fleet.check_servers(error)
        raise
