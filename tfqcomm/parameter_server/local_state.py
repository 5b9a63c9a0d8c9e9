"""Variables that are neither trained nor averaged: frozen weights, states of dropout."""

from __future__ import annotations

import numpy as np

from tfqcomm.parameter_server.fleet import Fleet


class LocalState:
    """Moves them between the chief's model and the workers, who have copies of their own.

    Args:
        fleet: whose workers have just been made with the chief's values.
    """

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._variables = fleet.workers[0].model_step.local
        self._known = [np.array(v) for v in self._variables]

    def send(self) -> None:
        """Gives the workers what was changed on the chief, by `set_weights` or a backup."""
        values = [np.array(v) for v in self._variables]
        pairs = zip(values, self._known, strict=True)
        if any(not np.array_equal(value, known) for value, known in pairs):
            for worker in self._fleet.workers:
                self._fleet.attempt(worker, worker.take_local)
            self._known = values

    def fetch(self) -> None:
        """Takes from the first worker what its steps have changed."""
        worker = self._fleet.workers[0]
        changed = self._fleet.attempt(worker, lambda: worker.local) or {}
        for index, value in changed.items():
            self._variables[index].assign(value)
            self._known[index] = value
