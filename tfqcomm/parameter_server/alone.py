"""What workers share that train alone, on weights of their own: those of Leader SGD and DiLoCo."""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.fleet import Fleet


class LocalWorker(BaseWorker):
    """A worker whose steps change its own weights.

    Attributes:
        learning_rate: of its next steps.
        report: of its last step; None before the first.
    """

    def __init__(self, *args, **kwargs):
        self.learning_rate = 0.0
        self.report = None
        super().__init__(*args, **kwargs)

    def start(self) -> None:
        """Creates what it needs, also after it was started anew."""
        with on(self.device):
            self._rate = tf.Variable(0.0, trainable=False)
        self._rate_there = 0.0
        super().start()

    def _send_rate(self) -> None:
        """Gives its variable the learning rate, if that is another one; on its device."""
        if self._rate_there != self.learning_rate:
            self._rate_there = self.learning_rate
            self._rate.assign(self._rate_there)

    @property
    def message_norm(self) -> float:
        """Of its last gradient, before clipping."""
        return self.report.gradient_norm if self.report else 0.0

    def summary(self) -> dict[str, int]:
        """For people."""
        return {
            "alive": self.alive,
            "steps": self.steps,
            "bytes_pushed": 4 * self.pushed_words,
            "bytes_pulled": 4 * self.pulled_words,
        }


class Pace:
    """The learning rate of each worker's next step, by the steps of an average worker.

    Args:
        fleet: whose workers these are.
        optimizer: whose rate it is: with a schedule, or one that callbacks set on the workers.
    """

    def __init__(self, fleet: Fleet, optimizer: keras.optimizers.Optimizer):
        self._fleet = fleet
        rate = optimizer.get_config()["learning_rate"]  # a number, or how to make a schedule
        self._rate_at: Callable[[int], float] | None = None
        if isinstance(rate, dict):
            schedule = keras.optimizers.schedules.deserialize(rate)
            self._rate_at = functools.lru_cache(maxsize=1)(lambda step: float(schedule(step)))

    def set(self, worker: LocalWorker) -> None:
        """Before a step: that of the schedule, if there is one."""
        if self._rate_at is not None:
            worker.learning_rate = self._rate_at(self._fleet.applied // len(self._fleet.workers))


def pass_rate_on(
    optimizer: keras.optimizers.Optimizer, workers: Iterable[LocalWorker]
) -> float | None:
    """Gives workers the learning rate that a callback may have set.

    Returns:
        It; None with a schedule: that each worker follows at its own `Pace`, in its own thread.
    """
    if not isinstance(optimizer.learning_rate, keras.Variable):
        return None
    rate = float(optimizer.learning_rate)
    for worker in workers:
        worker.learning_rate = rate
    return rate


class MeanStates(abc.ABC):
    """Stands in for the worker state of an all-reduce exchange, with the same keys.

    It reaches the workers by a weak reference: see `messages.memory`.
    """

    def __init__(self, fleet: Fleet):
        self._fleet = weakref.ref(fleet)
        self._captured: dict[str, np.ndarray] | None = None

    def capture(self) -> None:
        """Keeps what they are now, so that all of a backup is of one moment."""
        self._captured = self._mean()

    def release(self) -> None:
        """Goes on with what they are when somebody asks."""
        self._captured = None

    def mean(self) -> dict[str, np.ndarray]:
        """Each slot's mean over the workers."""
        return self._mean() if self._captured is None else self._captured

    @abc.abstractmethod
    def _mean(self) -> dict[str, np.ndarray]:
        """The same, as of now."""

    @abc.abstractmethod
    def load_mean(self, mean: Mapping[str, np.ndarray]) -> None:
        """Gives all workers a saved `mean()`."""


def each(fleet: Fleet, name: str) -> list:
    """An attribute of every worker that is there."""
    found = [fleet.attempt(worker, lambda w=worker: getattr(w, name)) for worker in fleet.workers]
    return [value for value in found if value is not None]
