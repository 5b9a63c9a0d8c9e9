"""A learner: it trains alone, answers the syncer, and takes what was merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.alone import LocalWorker
from tfqcomm.parameter_server.cluster import Errand, on
from tfqcomm.parameter_server.diloco.program import DiLoCoProgram
from tfqcomm.parameter_server.diloco.report import LearnerReport
from tfqcomm.parameter_server.flat import flat_values
from tfqcomm.parameter_server.loss_scale import LossScale


class DiLoCoWorker(LocalWorker):
    """One worker of a `DiLoCoTrainer`."""

    report: LearnerReport | None

    def __init__(
        self,
        index: int,
        device: str,
        program: DiLoCoProgram,
        dataset_fn: Callable,
        loss_scale: LossScale,
    ):
        self._program = program
        super().__init__(index, device, program.model_step, dataset_fn, loss_scale)

    def start(self) -> None:
        """Begins with the chief's weights, also after it was started anew."""
        program = self._program
        variables = program.model_step.weights
        with on(self.device):
            self._weights = [_variable(v.numpy(), v.dtype) for v in variables]
            self._anchors = [_variable(v.numpy(), tf.float32) for v in variables]
            self._state = [_variable(value, value.dtype) for value in program.inner.state]
            self._statistics = _variable(flat_values(program.model_step.statistics), tf.float32)
        self._step = Errand(program.step, self.device)
        self._answers = [Errand(graphs, self.device) for graphs in program.answers]
        self._takes = [Errand(graphs, self.device) for graphs in program.takes]
        super().start()

    def step(self) -> LearnerReport:
        """One local step."""
        with self.busy, on(self.device):
            self._send_rate()
            vector = self._step(
                self._iterator,
                self._weights,
                self._state,
                self._statistics,
                self._local,
                self._metrics,
                self._rate,
                self._flags[self._fresh],
                self._scale(),
            )
            self.report = LearnerReport.from_vector(vector)
        self._took_step(self.report.metrics)
        return self.report

    def answer(self, fragment: int) -> bool:
        """Tells the servers how far it has come; returns whether that is finite."""
        servers = self._program.servers_of(fragment)
        inboxes = [server.inboxes[fragment][self.index] for server in servers]
        with self.busy, on(self.device):
            sender, number = tf.constant(self.index), tf.constant(self.steps)
            answer = self._answers[fragment]
            finite, words = answer(self._weights, self._anchors, inboxes, sender, number)
        self.pushed_words += int(words)
        return bool(finite)

    def take(self, fragment: int, share: float) -> bool:
        """Moves its weights of a fragment towards those of the servers."""
        with self.busy, on(self.device):
            part = tf.constant(share, tf.float32)
            words = self._takes[fragment](self._weights, self._anchors, part)
        self.pulled_words += int(words)
        return True

    @property
    def statistics(self) -> np.ndarray:
        """Its moving statistics, float32[s]."""
        with on(self.device):
            return self._statistics.numpy()

    @property
    def weights(self) -> list[np.ndarray]:
        """Its own."""
        with on(self.device):
            return [v.numpy() for v in self._weights]

    def begin(self, weights: Sequence[np.ndarray], statistics: np.ndarray) -> None:
        """Takes these in place of its own."""
        with on(self.device):
            for own in (self._weights, self._anchors):
                _assign(own, weights)
            self._statistics.assign(statistics)

    @property
    def state(self) -> list[np.ndarray]:
        """Of its inner optimizer: the count of steps, then the slots."""
        with on(self.device):
            return [v.numpy() for v in self._state]

    @state.setter
    def state(self, values: Sequence[np.ndarray]) -> None:
        with on(self.device):
            _assign(self._state, values)


def _assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _variable(value, dtype) -> tf.Variable:
    return tf.Variable(value, trainable=False, dtype=dtype)
