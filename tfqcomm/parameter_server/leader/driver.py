"""Lets workers train alone, each at its own pace."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tfqcomm.parameter_server.asynchronous import Asynchronous
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.leader.board import LeaderBoard
from tfqcomm.parameter_server.leader.worker import LeaderWorker


class LeaderDriver(Asynchronous):
    """After each step a worker does its errands; meanwhile the others go on.

    Weights that are shown while others still read the last ones go to another place, so that a
    pull sees the weights of one leader at one time.

    Args:
        fleet: what it drives.
        board: who leads.
        schedule: steps of an average worker -> learning rate; None where callbacks set it.
    """

    def __init__(
        self, fleet: Fleet, board: LeaderBoard, schedule: Callable[[int], float] | None = None
    ):
        self._board = board
        self._schedule = schedule and functools.lru_cache(maxsize=1)(schedule)
        super().__init__(fleet)

    def _take(self, worker: LeaderWorker) -> bool:
        if not super()._take(worker):
            return False
        if self._schedule is not None:
            steps = self._fleet.applied // len(self._fleet.workers)
            worker.learning_rate = self._schedule(steps)
        return True

    def _hand_in(self, worker: LeaderWorker) -> None:
        fleet, board = self._fleet, self._board
        with self._changed:
            if worker.report.healthy:
                fleet.take([worker])
            else:
                fleet.skip([worker])
            self._handled += 1
            errand = board.after_step(worker.index, worker.report.mean_loss)
            self._staleness += errand.ages
        shown = False
        try:
            if errand.show is not None:  # as they are before the pull
                shown = bool(fleet.attempt(worker, lambda: worker.show(errand.show)))
            if errand.pulls:
                fleet.attempt(worker, lambda: worker.pull(errand.pulls))
        finally:
            with self._changed:
                board.done(worker.index, errand, shown=shown)
                if not worker.alive:
                    board.lose(worker.index)

    def _give_back(self, worker: LeaderWorker) -> None:
        super()._give_back(worker)
        self._board.lose(worker.index)
