"""Each message is a step of its own, scaled by 1 / W: as it comes, or when a bound allows it.

The staleness of a message is the number of server steps between the pull of the weights it was
computed at and its own.
"""

from __future__ import annotations

from tfqcomm import checks
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.free_running import FreeRunning
from tfqcomm.parameter_server.messages.report import Report
from tfqcomm.parameter_server.messages.worker import Worker


class Asynchronous:
    """Errands of free-running workers whose steps end with those of the servers.

    Nothing is left to do but to count: the chief is not on the way from a worker to a server.

    Args:
        fleet: whose messages these are.
    """

    def __init__(self, fleet: Fleet[Worker]):
        self._fleet = fleet

    def before_step(self, worker: Worker) -> None:
        """Nothing: a step pulls the weights itself."""

    def after_step(self, worker: Worker, report: Report, steps: FreeRunning) -> None:
        """Counts its message."""
        with steps.changed:
            if report.healthy:
                self._fleet.take([worker])
                steps.count([report.staleness])
            else:
                self._fleet.skip([worker])
                steps.count([])

    def lost(self, worker: Worker, steps: FreeRunning) -> bool:
        """Its last message may have arrived, or never does: the servers know."""
        if not self._fleet.settle(worker):
            return False
        with steps.changed:
            worker.count_last()
            self._fleet.take([worker])
            steps.count([])
        return True


class Bounded:
    """Errands of free-running workers whose messages wait in inboxes until a bound allows them.

    A message waits if some other could then not keep to the bound b: the r-th oldest of those
    under way will have, at the least, the steps since its pull and r more. With b >= W - 1 the
    oldest may always go, so nobody waits for ever, and no message is dropped.

    Args:
        fleet: whose messages these are.
        max_staleness: the bound b.
    """

    def __init__(self, fleet: Fleet[Worker], max_staleness: int):
        self._fleet = fleet
        self._bound = max_staleness
        self._applying = False  # guarded by `changed`: one message at a time is applied

    def before_step(self, worker: Worker) -> None:
        """Nothing: a step pulls the weights itself."""

    def after_step(self, worker: Worker, report: Report, steps: FreeRunning) -> None:
        """Applies its message, when the bound allows it; meanwhile others may start."""
        if not report.healthy:
            with steps.changed:
                self._fleet.skip([worker])
                steps.count([])
            return
        with steps.changed:
            while self._applying or not self._may_go(worker, steps):
                if steps.error is not None:
                    break
                steps.changed.wait()
            self._applying = True
            staleness = self._fleet.applied - report.version
        try:
            self._fleet.apply([worker])
        finally:
            with steps.changed:
                self._applying = False
                steps.changed.notify_all()
        with steps.changed:
            steps.count([staleness])

    def lost(self, worker: Worker, steps: FreeRunning) -> bool:
        """Its message is lost with it: it was not applied yet."""
        return False

    def _may_go(self, worker: Worker, steps: FreeRunning) -> bool:
        """Whether all others under way could still keep to the bound, one after the other."""
        others = sorted(version for w, version in steps.under_way.items() if w is not worker)
        after = self._fleet.applied + 1
        return all(after + r - version <= self._bound for r, version in enumerate(others))


def check_staleness(
    mode: str, max_staleness: int | None, workers: int, pull_ahead: bool = False
) -> None:
    """Refuses a bound that cannot be kept, and pulls ahead where nothing may be stale."""
    checks.boolean("pull_ahead", pull_ahead)
    if pull_ahead and (mode != "async" or max_staleness is not None):
        raise ValueError(
            "Argument `pull_ahead` must be False unless mode='async' and max_staleness=None: what "
            "is pulled ahead is one step of its worker older. "
            f"Received: pull_ahead={pull_ahead!r}, mode={mode!r}, max_staleness={max_staleness!r}"
        )
    if max_staleness is None:
        return
    if mode != "async":
        raise ValueError(
            "Argument `max_staleness` must be None with mode='sync', where nothing is stale. "
            f"Received: max_staleness={max_staleness!r}"
        )
    if type(max_staleness) is not int or max_staleness < workers - 1:
        raise ValueError(
            f"Argument `max_staleness` must be None or an integer from {workers - 1} on: of "
            f"{workers} messages under way the last is that stale at least. "
            f"Received: max_staleness={max_staleness!r}"
        )
