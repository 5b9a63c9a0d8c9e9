"""The chief's model: the global weights, and what a backup keeps of servers and learners."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from tfqcomm import _tf_private
from tfqcomm.parameter_server.alone import MeanStates, each, pass_rate_on
from tfqcomm.parameter_server.diloco.rounds import Rounds
from tfqcomm.parameter_server.diloco.server import DiLoCoServer
from tfqcomm.parameter_server.diloco.worker import DiLoCoWorker
from tfqcomm.parameter_server.flat import assign_flat, flat_values
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.optimizers import inner


class GlobalCopy:
    """Moves the global weights between the chief's model and the servers, and learners.

    Args:
        model: built and compiled with `DiLoCo`.
        fleet: servers and learners.
        rounds: the book, which begins anew where the chief's weights are sent.
        merging: held while servers merge.

    Attributes:
        momenta: of the outer step, by variable, as of the last `fetch`: those of the weights that
            the model has.
    """

    def __init__(
        self,
        model: keras.Model,
        fleet: Fleet[DiLoCoWorker],
        rounds: Rounds,
        merging: threading.Lock,
    ):
        self.momenta = [np.zeros(v.shape, np.float32) for v in model.trainable_variables]
        self._optimizer = inner(model.optimizer)
        self._weights = list(model.trainable_variables)
        self._statistics = _tf_private.statistics(model)
        self._fleet, self._rounds, self._merging = fleet, rounds, merging

    def send(self) -> None:
        """Gives servers and learners what the chief has."""
        weights = [v.numpy() for v in self._weights]
        moving = flat_values(self._statistics)
        for server in self._fleet.servers:
            server.load(server.weights, weights)
            server.load(server.momenta, self.momenta)
        for worker in self._fleet.workers:
            self._fleet.attempt(worker, lambda w=worker: w.begin(weights, moving))
        self._rounds.restart()

    def fetch(self) -> None:
        """Takes what the servers have, and the mean of the learners' moving statistics."""
        servers: list[DiLoCoServer] = self._fleet.servers
        with self._merging:
            weights = _by_variable([server.held(server.weights) for server in servers])
            self.momenta = _by_variable([server.held(server.momenta) for server in servers])
        for variable, value in zip(self._weights, weights, strict=True):
            variable.assign(value)
        sane = [s for s in each(self._fleet, "statistics") if np.isfinite(s).all()]
        if sane:
            assign_flat(self._statistics, np.mean(sane, axis=0))
        self._optimizer.inner.iterations.assign(self._optimizer.iterations)

    def send_learning_rate(self, last: float | None) -> float | None:
        """Passes on what a callback may have set."""
        return pass_rate_on(self._optimizer, self._fleet.workers)

    def load(self, weights: Mapping[int, np.ndarray], momenta: Mapping[int, np.ndarray]) -> None:
        """Gives the chief what was saved, to be sent; by variable."""
        for place, value in weights.items():
            self._weights[place].assign(value)
        for place, value in momenta.items():
            self.momenta[place] = np.asarray(value, np.float32)


class OuterState:
    """The part of a ledger that `DiLoCo` keeps under all-reduce, with the same keys.

    It reaches the chief's copy by a weak reference: see `messages.memory`.
    """

    def __init__(self, copy: GlobalCopy, model: keras.Model):
        self._copy = weakref.ref(copy)
        self._model = weakref.ref(model)

    def state(self) -> dict[str, np.ndarray]:
        """Global weights and their momenta, as of the last fetch."""
        copy, model = self._copy(), self._model()
        if copy is None or model is None:
            return {}
        weights = [v.numpy() for v in model.trainable_variables]
        parts = {_WEIGHTS: weights, _MOMENTUM: copy.momenta}
        return {f"{part}{i}": v for part, values in parts.items() for i, v in enumerate(values)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`; what is missing stays as it is."""
        copy = self._copy()
        if copy is not None:
            copy.load(_of(_WEIGHTS, state), _of(_MOMENTUM, state))


class InnerStates(MeanStates):
    """Each slot's mean over the learners."""

    def __init__(self, fleet: Fleet[DiLoCoWorker], optimizer: keras.optimizers.Optimizer):
        super().__init__(fleet)
        self._optimizer = weakref.ref(optimizer)

    def _mean(self) -> dict[str, np.ndarray]:
        fleet = self._fleet()
        states = each(fleet, "state") if fleet else []
        means = {}
        for number, slots in enumerate(zip(*states, strict=True)):
            if number and np.issubdtype(slots[0].dtype, np.floating):  # the first one counts steps
                means[f"{_SLOT}{number - 1}"] = np.mean(slots, axis=0, dtype=slots[0].dtype)
        return means

    def load_mean(self, mean: Mapping[str, np.ndarray]) -> None:
        """Gives all learners a saved `mean()`, and the count of steps that the chief has."""
        fleet, optimizer = self._fleet(), self._optimizer()
        slots = _of(_SLOT, mean)
        if fleet is None or optimizer is None or not slots:
            return
        for worker in fleet.workers:
            state = fleet.attempt(worker, lambda w=worker: w.state)
            if state is None:
                continue
            state[0] = np.asarray(int(optimizer.iterations), state[0].dtype)
            for number, value in slots.items():
                state[number + 1] = value
            fleet.attempt(worker, lambda w=worker, s=state: setattr(w, "state", s))


_WEIGHTS, _MOMENTUM, _SLOT = "global/", "outer_momentum/", "inner/"


def _of(part: str, state: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """What a state has of one part, by number."""
    return {int(k.removeprefix(part)): v for k, v in state.items() if k.startswith(part)}


def _by_variable(held: Sequence[Mapping[int, np.ndarray]]) -> list[np.ndarray]:
    """What all servers hold, in the order of the variables."""
    values = {place: value for one in held for place, value in one.items()}
    return [values[place] for place in sorted(values)]
