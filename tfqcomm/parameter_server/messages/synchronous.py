"""One server step per round, on the mean of one message from each worker."""

from __future__ import annotations

from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.messages.worker import Worker


class Synchronous:
    """Rounds that wait for every worker: a straggler delays, and never corrupts.

    A worker that is lost in a round is left out of the mean. A round in which a worker's message
    is not finite is skipped as a whole: weights, residuals and the workers' memory stay.
    """

    def __init__(self, fleet: Fleet[Worker]):
        self._fleet = fleet

    def begin_epoch(self, rounds: int) -> None:
        """Called before the rounds of an epoch."""

    def round(self) -> None:
        """One step of each worker, and one of the servers."""
        fleet = self._fleet
        workers = fleet.alive()
        reports = fleet.in_parallel([lambda w=w: fleet.attempt(w, w.step) for w in workers])
        arrived = [w for w, report in zip(workers, reports, strict=True) if report is not None]
        if not all(report.healthy for report in reports if report is not None):
            fleet.skip(arrived)
        elif arrived:
            fleet.apply(arrived)

    def end_epoch(self) -> None:
        """Called after them: nothing is under way."""

    def staleness(self) -> list[int]:
        """Of all messages since the last call: in rounds there is none."""
        return []

    def close(self) -> None:
        """Nothing is left running."""
