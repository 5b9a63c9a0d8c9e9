"""What a worker does that trains alone: local steps, now and then a push or a pull of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.optimizers.local.leader_vote import mean_loss, push_loss
from tfqcomm.parameter_server.alone import LocalWorker
from tfqcomm.parameter_server.cluster import Errand, Graphs, on
from tfqcomm.parameter_server.flat import flat_values
from tfqcomm.parameter_server.gradients import all_finite, clip, dense
from tfqcomm.parameter_server.leader.board import Buffer
from tfqcomm.parameter_server.leader.report import LocalReport
from tfqcomm.parameter_server.leader.server import LeaderServer
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.model_step import ModelStep
from tfqcomm.parameter_server.optimizers import inner
from tfqcomm.parameter_server.partition import Piece, assemble


class LeaderProgram:
    """The graphs of a local step, of a push and of a pull, one for all workers.

    Args:
        model: compiled with `LeaderSGD` and built.
        servers: all of them.
        pieces: in the order of the model's trainable variables.
        loss_scale: by which losses are multiplied.
    """

    def __init__(
        self,
        model: keras.Model,
        servers: Sequence[LeaderServer],
        pieces: Sequence[Piece],
        loss_scale: LossScale,
    ):
        self.optimizer = inner(model.optimizer)
        self.scaled = loss_scale.value is not None
        self.servers = list(servers)
        self.model_step = ModelStep(model)
        self._pieces = list(pieces)
        self._decays = [_tf_private.decays(self.optimizer, v) for v in self.model_step.weights]
        self.step = Graphs(self._step, kind_of=lambda iterator, *_: str(iterator.element_spec))
        self.show = Graphs(self._show)
        self.pull = Graphs(self._pull, kind_of=lambda weights, sources, *_: len(sources))

    def _step(
        self,
        iterator,
        weights,
        momenta,
        statistics,
        local,
        metrics,
        window,
        rate,
        fresh,
        scale,
    ):
        """One local step.

        Args:
            iterator: of the worker's data.
            weights, momenta: its variables; no momenta where there is no momentum.
            statistics: variable, float32[s], of its own layers.
            local, metrics: as in `ModelStep.gradients`.
            window: variable, float32[loss_window], its last losses.
            rate: variable, the learning rate.
            fresh: bool scalar: the metrics begin anew.
            scale: float32 scalar, of the loss.

        Returns:
            What a `LocalReport` is made of, float64[3 + metrics].
        """
        batch = keras.utils.unpack_x_y_sample_weight(next(iterator))
        metrics.assign(tf.where(fresh, self.model_step.metrics.initial, metrics.read_value()))
        before = statistics.read_value()
        gradients, moving, loss = self.model_step.gradients(
            [w.read_value() for w in weights],
            before,
            batch,
            local,
            metrics,
            scale if self.scaled else None,
        )
        finite = all_finite(gradients) if self.scaled else True  # where Keras asks
        norm = tf.linalg.global_norm(gradients)
        gradients = clip(self.optimizer, gradients, workers=1)
        healthy = tf.cond(
            tf.logical_and(finite, all_finite(gradients)),
            lambda: self._update(weights, momenta, gradients, rate),
            lambda: tf.constant(False),
        )
        sane = tf.reduce_all(tf.math.is_finite(moving))
        statistics.assign(tf.where(sane, moving, before))
        window.assign(push_loss(window.read_value(), loss))
        average, _ = mean_loss(window.read_value())
        sane = tf.reduce_all([tf.reduce_all(tf.math.is_finite(w.read_value())) for w in weights])
        facts = [healthy, tf.where(sane, average, np.inf), norm]
        facts = tf.stack([tf.cast(fact, tf.float64) for fact in facts])
        return tf.concat([facts, metrics.read_value()], 0)

    def _update(self, weights, momenta, gradients, rate) -> tf.Tensor:
        """As Keras does it: what has no gradient stays as it is."""
        buffers = momenta or [None] * len(weights)
        full = dense(gradients, self.model_step.weights)
        steps = zip(weights, buffers, full, self._decays, strict=True)
        for step, gradient in zip(steps, gradients, strict=True):
            if gradient is not None:
                self.optimizer.update_copy(*step, rate.read_value())
        self._constrain(weights)
        return tf.constant(True)

    def _constrain(self, weights) -> None:
        for variable, like in zip(weights, self.model_step.weights, strict=True):
            if like.constraint is not None:
                variable.assign(like.constraint(variable.read_value()))

    def _show(self, weights, rooms, number):
        """Puts the weights into one room on each server.

        Args:
            number: int scalar, seeds stochastic codecs.

        Returns:
            How many words were sent.
        """
        sent = []
        for server, room in zip(self.servers, rooms, strict=True):
            values = {
                piece: tf.cast(piece.cut(weights[piece.variable].read_value()), tf.float32)
                for piece in server.format.pieces
            }
            words = server.format.pack_weights(values, tf.zeros([0]), number)
            server.fill(room, words)
            sent.append(tf.size(words))
        return tf.add_n(sent)

    def _pull(self, weights, sources, pulls):
        """Moves the weights towards those of leaders.

        Args:
            sources: for each leader a room on each server.
            pulls: float32[leaders].

        Returns:
            How many words came.
        """
        received, leaders = [], []
        for rooms in sources:
            values = {}
            for server, room in zip(self.servers, rooms, strict=True):
                words = server.read(room)
                values |= server.format.unpack_weights(words)[0]
                received.append(tf.size(words))
            leaders.append(assemble(self._pieces, values))
        mixing = tf.unstack(pulls, len(sources))
        for variable, *towards in zip(weights, *leaders, strict=True):
            x = tf.cast(variable.read_value(), tf.float32)
            x = self.optimizer.pull(x, list(zip(mixing, towards, strict=True)))
            variable.assign(tf.cast(x, variable.dtype))
        self._constrain(weights)
        return tf.add_n(received)


class LeaderWorker(LocalWorker):
    """One worker of a `LeaderTrainer`."""

    report: LocalReport | None

    def __init__(
        self,
        index: int,
        device: str,
        program: LeaderProgram,
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
            self._momenta = [
                _variable(np.zeros(v.shape), v.dtype)
                for v in variables
                if program.optimizer.momentum
            ]
            self._statistics = _variable(flat_values(program.model_step.statistics))
            self._window = _variable(np.full([program.optimizer.loss_window], np.nan))
        self._errands = {
            graphs: Errand(graphs, self.device)
            for graphs in (program.step, program.show, program.pull)
        }
        super().start()

    def step(self) -> LocalReport:
        """One local step."""
        with self.busy, on(self.device):
            self._send_rate()
            vector = self._errands[self._program.step](
                self._iterator,
                self._weights,
                self._momenta,
                self._statistics,
                self._local,
                self._metrics,
                self._window,
                self._rate,
                self._flags[self._fresh],
                self._scale(),
            )
            self.report = LocalReport.from_vector(vector)
        self._took_step(self.report.metrics)
        return self.report

    def show(self, buffer: Buffer) -> bool:
        """Encodes its weights, and puts them where others find them."""
        with on(self.device):
            number = tf.constant(self.steps)
        show = self._errands[self._program.show]
        self.pushed_words += int(show(self._weights, buffer.variables, number))
        return True

    def pull(self, pulls: Sequence[tuple[float, Buffer]]) -> None:
        """Moves towards leaders."""
        rooms = [buffer.variables for _, buffer in pulls]
        with self.busy, on(self.device):
            mixing = tf.constant([pull for pull, _ in pulls], tf.float32)
            pull = self._errands[self._program.pull]
            self.pulled_words += int(pull(self._weights, rooms, mixing))

    @property
    def weights(self) -> list[np.ndarray]:
        """Its own, and in the last place its moving statistics."""
        with on(self.device):
            return [v.numpy() for v in (*self._weights, self._statistics)]

    @weights.setter
    def weights(self, values: Sequence[np.ndarray]) -> None:
        self._assign((*self._weights, self._statistics), values)

    @property
    def momenta(self) -> list[np.ndarray]:
        """Its own; none where there is no momentum."""
        with on(self.device):
            return [v.numpy() for v in self._momenta]

    @momenta.setter
    def momenta(self, values: Sequence[np.ndarray]) -> None:
        self._assign(self._momenta, values)

    def _assign(self, variables, values) -> None:
        with on(self.device):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)


def _variable(value, dtype=tf.float32) -> tf.Variable:
    return tf.Variable(value, trainable=False, dtype=dtype)
