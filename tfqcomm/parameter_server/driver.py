"""What a trainer is made of: how its parts look to the loop of `fit`."""

from __future__ import annotations

from typing import Protocol


class Driver(Protocol):
    """Lets the workers take steps."""

    def begin_epoch(self, rounds: int) -> None:
        """Called before the rounds of an epoch: `rounds` steps of each worker on average."""

    def round(self) -> None:
        """Returns after as many more steps as there are workers."""

    def end_epoch(self) -> None:
        """Returns when no step is under way any more; raises what ended one of them."""

    def staleness(self) -> list[int]:
        """Of what was taken over since the last call; empty where nothing is ever stale."""

    def close(self) -> None:
        """Called once, at the end or after an error: leaves nothing running."""


class Copy(Protocol):
    """Moves weights, and what belongs to them, between the chief's model and the cluster."""

    def send(self) -> None:
        """Gives the cluster what the chief has."""

    def fetch(self) -> None:
        """Gives the chief what the cluster has."""

    def send_learning_rate(self, last: float | None) -> float | None:
        """Passes on what a callback may have set, if it is not `last`; None with a schedule."""


class Memories(Protocol):
    """What the workers remember, for backups."""

    def capture(self) -> None:
        """Keeps what they are now, so that all of a backup is of one moment."""

    def release(self) -> None:
        """Goes on with what they are when somebody asks."""


def staleness_logs(driver: Driver) -> dict[str, float]:
    """What `fit` shows of the staleness of an epoch's messages; nothing where nothing is stale."""
    found = driver.staleness()
    if not found:
        return {}
    return {"staleness": sum(found) / len(found), "max_staleness": max(found)}
