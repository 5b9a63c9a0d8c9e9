"""What a worker that trains alone does after a step: it shows its weights, or is pulled."""

from __future__ import annotations

from tfqcomm.parameter_server.alone import Pace
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.leader.board import LeaderBoard
from tfqcomm.parameter_server.leader.report import LocalReport
from tfqcomm.parameter_server.leader.worker import LeaderWorker


class LeaderErrands:
    """After each step a worker does its errands; meanwhile the others go on.

    Weights that are shown while others still read the last ones go to another place, so that a
    pull sees the weights of one leader at one time.

    Args:
        fleet: whose workers these are.
        board: who leads.
        pace: their learning rates.
    """

    def __init__(
        self,
        fleet: Fleet[LeaderWorker],
        board: LeaderBoard,
        pace: Pace,
    ):
        self._fleet = fleet
        self._board = board
        self._pace = pace

    def before_step(self, worker: LeaderWorker) -> None:
        """Sets its learning rate."""
        self._pace.set(worker)

    def after_step(self, worker: LeaderWorker, report: LocalReport, steps: FreeRunning) -> None:
        """Counts the step, and does what the board asks for."""
        fleet, board = self._fleet, self._board
        with steps.changed:
            if report.healthy:
                fleet.take([worker])
            else:
                fleet.skip([worker])
            errand = board.after_step(worker.index, report.mean_loss)
            steps.count(errand.ages)
        shown, room = False, errand.show
        try:
            if room is not None:  # as they are before the pull
                shown = bool(fleet.attempt(worker, lambda: worker.show(room)))
            if errand.pulls:
                fleet.attempt(worker, lambda: worker.pull(errand.pulls))
        finally:
            with steps.changed:
                board.done(worker.index, errand, shown=shown)
                if not worker.alive:
                    board.lose(worker.index)

    def lost(self, worker: LeaderWorker, steps: FreeRunning) -> bool:
        """It leads no more."""
        with steps.changed:
            self._board.lose(worker.index)
        return False
