"""A worker as the chief sees it: a device that may fail, with data and metrics of its own."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.data import endless
from tfqcomm.parameter_server.model_step import ModelStep


class BaseWorker(abc.ABC):
    """One worker: its variables, its data, and what the chief knows of it.

    Attributes:
        index: among the workers.
        device: of the worker.
        dataset_fn: makes its data.
        alive: False from the moment it is lost until it has started anew.
        steps, pushed_words, pulled_words: since the worker was first started.
        metrics: its share in the states of all metrics since they were reset; also that of
            steps before it was lost.
    """

    def __init__(self, index: int, device: str, model_step: ModelStep, dataset_fn: Callable):
        self.index = index
        self.device = device
        self.alive = True
        self.steps = self.pushed_words = self.pulled_words = 0
        self.dataset_fn = dataset_fn
        self._model_step = model_step
        self.reset_metrics()
        self.start()

    @abc.abstractmethod
    def step(self):
        """One step; returns its report."""

    @abc.abstractmethod
    def summary(self) -> dict[str, int]:
        """What it has done, for people."""

    @property
    @abc.abstractmethod
    def message_norm(self) -> float:
        """Of what its last step found."""

    def start(self) -> None:
        """Creates the worker's variables and its data, also after it was started anew."""
        with on(self.device):
            self._metrics = tf.Variable(self._model_step.metrics, trainable=False)
            self._local = [
                tf.Variable(self._own_value(v), trainable=False, dtype=v.dtype)
                for v in self._model_step.local
            ]
            self._flags = {flag: tf.identity(tf.constant(flag)) for flag in (False, True)}
        self.read()
        self._earlier_metrics = self.metrics - self._model_step.metrics

    def read(self) -> None:
        """Begins with the data that `dataset_fn()` gives."""
        with on(self.device):
            # Traced by hand: a call would warn of "retracing", as every worker has a function.
            make = tf.function(functools.partial(endless, self.dataset_fn), autograph=False)
            self._iterator = iter(make.get_concrete_function()())

    def _own_value(self, variable: keras.Variable) -> np.ndarray:
        """What a variable that is not shared begins with: seeds of dropout differ by worker."""
        value = np.array(variable)
        if value.dtype == np.uint32:
            value = value + np.uint32(self.index * 0x9E3779B9 & 0xFFFFFFFF)
        return value

    def reset_metrics(self) -> None:
        """Begins an epoch."""
        self._fresh = True
        self.metrics = self._model_step.metrics
        self._earlier_metrics = 0 * self.metrics

    def _took_step(self, states: np.ndarray) -> None:
        """Counts a step, and notes the states of its metrics."""
        self.steps += 1
        self._fresh = False
        self.metrics = self._earlier_metrics + states

    def is_there(self) -> bool:
        """Whether the worker answers, and is the one that was started."""
        try:
            with on(self.device):
                self._metrics.read_value().numpy()
        except tf.errors.OpError:
            return False
        return True
