"""The chief's model: the average of all workers, and what a backup keeps of them."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from tfqcomm import _tf_private
from tfqcomm.parameter_server.alone import MeanStates, each, pass_rate_on
from tfqcomm.parameter_server.flat import assign_flat, flat_values
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.leader.worker import LeaderWorker
from tfqcomm.parameter_server.optimizers import inner


class ChiefAverage:
    """Moves weights and moving statistics between the chief's model and the workers.

    A worker whose weights are not finite is left out of the average.
    """

    def __init__(self, model: keras.Model, fleet: Fleet[LeaderWorker]):
        self._optimizer = inner(model.optimizer)
        self._weights = list(model.trainable_variables)
        self._fleet = fleet
        self._statistics = _tf_private.statistics(model)

    def send(self) -> None:
        """Gives all workers what the chief has."""
        weights = [v.numpy() for v in self._weights]
        values = [*weights, flat_values(self._statistics)]
        for worker in self._fleet.workers:
            self._fleet.attempt(worker, lambda w=worker: setattr(w, "weights", values))

    def fetch(self) -> None:
        """Takes the average of what the workers have."""
        weights = each(self._fleet, "weights")
        sane = [w for w in weights if all(np.isfinite(value).all() for value in w)]
        if not sane:
            return
        *means, moving = _means(sane)
        for variable, mean in zip(self._weights, means, strict=True):
            variable.assign(mean)
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        assign_flat(self._statistics, moving)

    def send_learning_rate(self, last: float | None) -> float | None:
        """Passes on what a callback may have set."""
        return pass_rate_on(self._optimizer, self._fleet.workers)


class Momenta(MeanStates):
    """Each variable's mean momentum over the workers."""

    def _mean(self) -> dict[str, np.ndarray]:
        fleet = self._fleet()
        momenta = each(fleet, "momenta") if fleet else []
        return {f"momentum/{index}": mean for index, mean in enumerate(_means(momenta))}

    def load_mean(self, mean: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `mean()`."""
        fleet = self._fleet()
        count = sum(key.startswith("momentum/") for key in mean)
        values = [mean[f"momentum/{index}"] for index in range(count)]
        if fleet is None or not values:
            return
        for worker in fleet.workers:
            fleet.attempt(worker, lambda w=worker: setattr(w, "momenta", values))


def _means(found: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Element by element, over workers."""
    return [np.asarray(sum(values)) / len(found) for values in zip(*found, strict=True)]
