"""A worker as the chief sees it: a device that may fail, with data and metrics of its own."""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.data import endless
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.model_step import ModelStep


class BaseWorker(abc.ABC):
    """One worker: its variables, its data, and what the chief knows of it.

    Attributes:
        index: among the workers.
        device: of the worker.
        dataset_fn: makes its data.
        alive: False from the moment it is lost until it has started anew.
        lives: how often it has been started.
        busy: held while it works; by whoever wants to see it between two steps.
        used_scale: by which the loss of its last step was multiplied.
        steps, pushed_words, pulled_words: since the worker was first started.
        metrics: its share in the states of all metrics since they were reset; also that of
            steps before it was lost.
    """

    metrics: np.ndarray
    _scales: dict[float | None, tf.Tensor]

    def __init__(
        self,
        index: int,
        device: str,
        model_step: ModelStep,
        dataset_fn: Callable,
        loss_scale: LossScale,
    ):
        self.index = index
        self.device = device
        self.alive = True
        self.lives = 0
        self.used_scale: float | None = None
        self.steps = self.pushed_words = self.pulled_words = 0
        self.dataset_fn = dataset_fn
        self.model_step = model_step
        self._loss_scale = loss_scale
        self.busy = threading.RLock()
        self.reset_metrics()
        self.start()

    @abc.abstractmethod
    def step(self):
        """One step; returns its report."""

    def accept(self) -> None:  # noqa: B027  # most have nothing to do
        """Called when servers have taken what its last step sent."""

    @abc.abstractmethod
    def summary(self) -> dict[str, int]:
        """What it has done, for people."""

    @property
    @abc.abstractmethod
    def message_norm(self) -> float:
        """Of what its last step found."""

    def start(self) -> None:
        """Creates the worker's variables and its data, also after it was started anew."""
        step = self.model_step
        with on(self.device):
            self._metrics = tf.Variable(step.metrics.initial, trainable=False)
            self._local = [
                tf.Variable(value, trainable=False, dtype=v.dtype)
                for v, value in zip(step.local, self._local_values(), strict=True)
            ]
            self._flags = {flag: tf.identity(tf.constant(flag)) for flag in (False, True)}
            self._scales = {None: tf.identity(tf.constant(1.0))}
        self.read()
        self._earlier_metrics = self.metrics
        self.lives += 1

    def take_local(self) -> None:
        """Takes the chief's frozen weights and the like, which a user may have set."""
        with on(self.device):
            for variable, value in zip(self._local, self._local_values(), strict=True):
                variable.assign(value)

    @property
    def local(self) -> dict[int, np.ndarray]:
        """What its steps have changed of the model's other variables, by their place."""
        changing = self.model_step.changing
        with on(self.device):
            return {i: v.numpy() for i, v in enumerate(self._local) if changing[i]}

    def read(self) -> None:
        """Begins with the data that `dataset_fn()` gives."""
        with on(self.device):
            # Traced by hand: a call would warn of "retracing", as every worker has a function.
            make = tf.function(functools.partial(endless, self.dataset_fn), autograph=False)
            self._iterator = iter(make.get_concrete_function()())

    def _local_values(self) -> list[np.ndarray]:
        """What variables begin with that are not trained: seeds of dropout differ by worker."""
        step = self.model_step
        seeds = {id(v) for v in _tf_private.random_seeds(step.model)}
        values = []
        for variable in step.local:
            value = np.array(variable.numpy())
            if self.index and id(variable) in seeds:
                value[0] = (int(value[0]) + self.index * 0x9E3779B9) % (1 << 31)
            values.append(value)
        return values

    def _scale(self) -> tf.Tensor:
        """The present scale of losses, on the worker."""
        self.used_scale = self._loss_scale.value
        if self.used_scale not in self._scales:
            self._scales = {self.used_scale: tf.identity(tf.constant(self.used_scale, tf.float32))}
        return self._scales[self.used_scale]

    def reset_metrics(self) -> None:
        """Begins an epoch."""
        self._fresh = True
        self.metrics = self._earlier_metrics = self.model_step.metrics.initial

    def _took_step(self, states: np.ndarray) -> None:
        """Counts a step, and notes the states of its metrics."""
        self.steps += 1
        self._fresh = False
        self.metrics = self.model_step.metrics.merge([self._earlier_metrics, states])

    def is_there(self) -> bool:
        """Whether the worker answers, and is the one that was started."""
        try:
            with on(self.device):
                self._metrics.read_value().numpy()
        except tf.errors.OpError:
            return False
        return True
