"""What workers owe and remember, as backups and `TrafficLogger` see it.

Two of the classes stand in for the residuals and the worker state of a ledger, with
the same keys and the same meaning: a run may go on under the other kind of training. The ledger
outlives no optimizer, and so must hold none: it reaches the workers by a weak reference.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping

import numpy as np

from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.messages.program import Program
from tfqcomm.parameter_server.messages.worker import Worker


class Memories:
    """The memories of all workers.

    Args:
        fleet: who remembers.
        program: what lies where.

    Attributes:
        rows_left_out: whether `mean` says nothing of tables whose rows travel.
    """

    def __init__(self, fleet: Fleet[Worker], program: Program):
        self._fleet = weakref.ref(fleet)
        self._program = weakref.ref(program)
        self._captured: np.ndarray | None = None
        self.rows_left_out = False

    def capture(self) -> None:
        """Keeps what they are now, so that all of a backup is of one moment."""
        self._captured = self._mean_memory()

    def release(self) -> None:
        """Goes on with what they are when somebody asks."""
        self._captured = None

    def mean(self, wanted) -> dict[tuple[str, int], np.ndarray]:
        """Slot and variable -> its mean over the workers, in the variable's shape."""
        program = self._program()
        mean = self._captured if self._captured is not None else self._mean_memory()
        parts: dict[tuple[str, int], list[np.ndarray]] = {}
        for (piece, slot), place in (program.layout.slots if program else {}).items():
            if wanted(slot) and mean is not None:
                part = mean[place].reshape(piece.shape)
                parts.setdefault((slot, piece.variable), []).append(part)
        rows = {} if self.rows_left_out else self._of_rows()
        for (piece, slot), part in rows.items():
            if wanted(slot):
                parts.setdefault((slot, piece.variable), []).append(part)
        return {
            key: part[0] if len(part) == 1 else np.concatenate(part) for key, part in parts.items()
        }

    def load(self, values: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Gives all workers what `mean` once returned."""
        fleet, program = self._fleet(), self._program()
        if fleet is None or program is None or not values:
            return
        _warn_of_residuals(values, program)
        fleet.in_parallel([lambda s=s: s.rows.load_moments(values) for s in program.servers])
        for worker in fleet.workers:
            memory = fleet.attempt(worker, lambda w=worker: w.memory)
            if memory is None:
                continue
            for (piece, slot), place in program.layout.slots.items():
                if (slot, piece.variable) in values:
                    variable = program.model_step.weights[piece.variable]
                    value = values[slot, piece.variable].reshape(variable.shape)
                    memory[place] = piece.cut(value).ravel()
            fleet.attempt(worker, lambda w=worker, m=memory: setattr(w, "memory", m))

    def forget_rows(self) -> None:
        """What rows are owed is in no backup, and would be of a later moment."""
        fleet = self._fleet()
        if fleet is not None:
            for worker in fleet.workers:
                fleet.attempt(worker, worker.forget_rows)

    def residual_norm(self) -> float:
        """Of the first worker's residuals, after its last message."""
        fleet = self._fleet()
        report = fleet.workers[0].report if fleet else None
        return report.residual_norm if report else 0.0

    def _of_rows(self) -> dict:
        """What servers keep for the workers of tables' rows, in the order of the rows."""
        fleet, program = self._fleet(), self._program()
        if fleet is None or program is None:
            return {}
        found = fleet.in_parallel([server.rows.mean_moments for server in program.servers])
        return {key: value for of_server in found for key, value in of_server.items()}

    def _mean_memory(self) -> np.ndarray | None:
        """That of a new worker, if all are gone and their memories with them."""
        fleet, program = self._fleet(), self._program()
        if fleet is None or program is None:
            return None
        found = [fleet.attempt(worker, lambda w=worker: w.memory) for worker in fleet.workers]
        found = [memory for memory in found if memory is not None]
        return sum(found) / len(found) if found else program.layout.initial


def _warn_of_residuals(values: Mapping[tuple[str, int], np.ndarray], program: Program) -> None:
    """Says what a run by rows cannot take over from one with whole tables."""
    names = [
        table.name
        for place, table in program.lookups.tables.items()
        if np.any(values.get(("residual", place), 0))
    ]
    if names:
        warnings.warn(
            f"What compression has left out of {', '.join(names)} is dropped: rows do not take it "
            "over. Give the trainer `embedding_rows_from=None` to go on with it.",
            stacklevel=2,
        )


class Residuals:
    """What compression has left out, on all workers."""

    def __init__(self, memories: Memories):
        self._memories = memories

    def norm(self) -> float:
        """Of the first worker's residuals, after its last message."""
        return self._memories.residual_norm()

    def total(self) -> dict[str, np.ndarray]:
        """What the workers owe the mean message: float32[n] by variable."""
        mean = self._memories.mean(lambda slot: slot == "residual")
        return {str(variable): value.ravel() for (_, variable), value in mean.items()}

    def load_total(self, total: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `total()`; what they owe to rows is forgotten."""
        self._memories.forget_rows()
        self._memories.load({("residual", int(key)): value for key, value in total.items()})


class WorkerState:
    """The slots of the optimizer's worker half, on all workers."""

    def __init__(self, memories: Memories):
        self._memories = memories

    def mean(self) -> dict[str, np.ndarray]:
        """Each slot's mean over the workers."""
        mean = self._memories.mean(lambda slot: slot != "residual")
        return {f"{slot}/{variable}": value for (slot, variable), value in mean.items()}

    def load_mean(self, mean: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `mean()`."""
        split = {tuple(key.split("/", 1)): value for key, value in mean.items()}
        self._memories.load({(slot, int(key)): value for (slot, key), value in split.items()})
