"""What workers owe and remember, as backups and `TrafficLogger` see it.

The two classes stand in for the residuals and the worker state of an all-reduce exchange, with
the same keys and the same meaning: a run may go on under the other kind of training.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.worker import Program


class _Memory:
    """Some slots of all workers' memories."""

    def __init__(self, fleet: Fleet, program: Program):
        self._fleet = fleet
        self._program = program

    def _mean(self, wanted) -> dict[tuple[str, int], np.ndarray]:
        """Slot and variable -> its mean over the workers, in the variable's shape."""
        memories = [
            self._fleet.attempt(worker, lambda w=worker: w.memory) for worker in self._fleet.workers
        ]
        memories = [memory for memory in memories if memory is not None]
        mean = sum(memories) / len(memories)
        parts: dict[tuple[str, int], list[np.ndarray]] = {}
        for (piece, slot), place in self._program.slots.items():
            if wanted(slot):
                part = mean[place].reshape(piece.shape)
                parts.setdefault((slot, piece.variable), []).append(part)
        return {
            key: part[0] if len(part) == 1 else np.concatenate(part) for key, part in parts.items()
        }

    def _load(self, values: Mapping[tuple[str, int], np.ndarray]) -> None:
        if not values:
            return
        for worker in self._fleet.workers:
            memory = worker.memory
            for (piece, slot), place in self._program.slots.items():
                if (slot, piece.variable) in values:
                    variable = self._program.model.trainable_variables[piece.variable]
                    value = values[slot, piece.variable].reshape(variable.shape)
                    memory[place] = piece.cut(value).ravel()
            worker.memory = memory


class Residuals(_Memory):
    """What compression has left out, on all workers."""

    def norm(self) -> float:
        """Of the first worker's residuals, after its last message."""
        report = self._fleet.workers[0].report
        return report.residual_norm if report else 0.0

    def total(self) -> dict[str, np.ndarray]:
        """What the workers owe the mean message: float32[n] by variable."""
        mean = self._mean(lambda slot: slot == "residual")
        return {str(variable): value.ravel() for (_, variable), value in mean.items()}

    def load_total(self, total: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `total()`."""
        self._load({("residual", int(key)): value for key, value in total.items()})


class WorkerState(_Memory):
    """The slots of the optimizer's worker half, on all workers."""

    def mean(self) -> dict[str, np.ndarray]:
        """Each slot's mean over the workers."""
        mean = self._mean(lambda slot: slot != "residual")
        return {f"{slot}/{variable}": value for (slot, variable), value in mean.items()}

    def load_mean(self, mean: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `mean()`."""
        values = {tuple(key.split("/", 1)): value for key, value in mean.items()}
        self._load({(slot, int(variable)): value for (slot, variable), value in values.items()})
