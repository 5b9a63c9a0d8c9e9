"""Each message is applied as it arrives, scaled by 1 / W."""

from __future__ import annotations

from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.messages.report import Report
from tfqcomm.parameter_server.messages.worker import Worker


class Asynchronous:
    """Errands of free-running workers: each message is a step of the servers.

    The staleness of a message is the number of server steps between the pull of the weights it was
    computed at and its own. With a bound b a message waits before it is applied if some other
    could then not keep to b: the r-th oldest of those under way will have, at the least, the steps
    since its pull and r more. With b >= W - 1 the oldest may always go, so nobody waits for ever,
    and no message is dropped.

    Args:
        fleet: whose messages these are.
        max_staleness: the bound b; None for none.
    """

    def __init__(self, fleet: Fleet[Worker], max_staleness: int | None = None):
        self._fleet = fleet
        self._bound = max_staleness

    def before_step(self, worker: Worker) -> None:
        """Nothing: a step pulls the weights itself."""

    def after_step(self, worker: Worker, report: Report, steps: FreeRunning) -> None:
        """Applies its message, when the bound allows it."""
        with steps.changed:
            staleness = []
            if report.healthy:
                while not self._may_go(worker, steps):
                    steps.changed.wait()
                staleness = [self._fleet.applied - report.version]
                self._fleet.apply([worker])
            else:
                self._fleet.skip([worker])
            steps.count(staleness)

    def lost(self, worker: Worker) -> None:
        """Nothing: its message is lost with it."""

    def _may_go(self, worker: Worker, steps: FreeRunning) -> bool:
        """Whether all others under way could still keep to the bound, one after the other."""
        if self._bound is None or steps.error is not None:
            return True
        others = sorted(version for w, version in steps.under_way.items() if w is not worker)
        after = self._fleet.applied + 1
        return all(after + r - version <= self._bound for r, version in enumerate(others))
