"""What a worker does in a step: pull, gradient, its half of the optimizer, push.

    outboxes --> weights --> gradients --> message --> encode with feedback --> inboxes
                    on the worker, with memory of its own

One graph serves all workers: what differs between them, variables and data, is an argument. A
worker keeps its memory twice. What it has computed counts once the servers have taken its message;
until then it is pending, and is forgotten if they have not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.aggregators.vectors import encode_with_feedback
from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import Graphs, on
from tfqcomm.parameter_server.gradients import all_finite, clip, dense
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.messages.report import Report
from tfqcomm.parameter_server.messages.server import Server
from tfqcomm.parameter_server.model_step import ModelStep
from tfqcomm.parameter_server.optimizers import inner, worker_half
from tfqcomm.parameter_server.partition import Piece, assemble
from tfqcomm.parameter_server.payload import gradient_seeds
from tfqcomm.parameter_server.rows import Lookups, Table


class Program:
    """The graph of a step.

    Args:
        model: compiled and built.
        servers: all of them.
        pieces: in the order of the model's trainable variables.
        tables: weights that are in no piece, since their rows travel.
        loss_scale: by which losses are multiplied.

    Attributes:
        slots: where in a worker's memory a slot of a piece lies, by (piece, name).
        memory: of a worker at the beginning, float32[m].
        model_step: its forward and backward pass.
    """

    def __init__(
        self,
        model: keras.Model,
        servers: Sequence[Server],
        pieces: Sequence[Piece],
        tables: Sequence[Table],
        loss_scale: LossScale,
    ):
        self.optimizer = inner(model.optimizer)
        self.scaled = loss_scale.value is not None
        self.servers = list(servers)
        self.pieces = list(pieces)
        self.options = servers[0].format.options
        self.half = worker_half(self.optimizer)
        self.lookups = Lookups(tables, [server.rows for server in servers])
        self.model_step = ModelStep(model, self.lookups)
        self.large = [p for p in pieces if p in {q for s in servers for q in s.format.large}]
        self.slots, self.memory = self._lay_out_memory()
        self.step = Graphs(self._step, kind_of=lambda iterator, *_: str(iterator.element_spec))

    def _lay_out_memory(self) -> tuple[dict[tuple[Piece, str], slice], np.ndarray]:
        slots, initial, start = {}, [], 0
        keeps = self.options.error_feedback and not self.options.compressor.lossless
        for piece in self.pieces:
            names = dict(self.half.worker_slots) if self.half else {}
            if keeps and piece in self.large:
                names["residual"] = 0.0
            for name, value in names.items():
                slots[piece, name] = slice(start, start + piece.size)
                initial.append(np.full([piece.size], value, np.float32))
                start += piece.size
        return slots, np.concatenate([np.zeros([0], np.float32), *initial])

    def _step(
        self, iterator, memory, local, metrics, inboxes, seeds, accepted, fresh, scale, report
    ):
        """One step of one worker.

        Args:
            iterator: of its data.
            memory: two variables float32[m]: as of the last message that was accepted, and pending.
            local: variables of layers that are the worker's own, such as states of dropout.
            metrics: variable, the states of all metrics in a row, float64.
            inboxes: two variables on each server: for pieces, and for rows.
            seeds: int32[large pieces], of stochastic codecs.
            accepted: bool scalar: the servers have taken the last message.
            fresh: bool scalar: the metrics begin anew.
            scale: float32 scalar, of the loss.
            report: variable, float64[6 + metrics]: receives a `Report`.
        """
        batch = keras.utils.unpack_x_y_sample_weight(next(iterator))
        pulled = [server.pulled() for server in self.servers]
        weights, before, version = self._unpack(pulled)
        metrics.assign(tf.where(fresh, self.model_step.metrics.initial, metrics.read_value()))
        gradients, moving, _ = self.model_step.gradients(
            weights, before, batch, local, metrics, scale if self.scaled else None
        )
        self._note_untouched()
        finite = [all_finite(gradients)] if self.scaled else []  # where Keras asks: before clipping
        gradients, ids = self.lookups.apart(gradients)
        gradients = clip(self.optimizer, gradients, len(self.servers[0].inboxes))
        rows = self.lookups.split(gradients, ids)
        gradients = dense(gradients, self.model_step.weights)
        committed, pending = memory
        base = tf.cond(accepted, pending.read_value, committed.read_value)
        committed.assign(base)
        messages, state = self._messages(gradients, base, version)
        parts, state = self._encode(messages, state, base, seeds, version)
        remembered = self._join(state)
        pending.assign(remembered)
        row_words = [server.rows.format.pack(rows) for server in self.servers]
        self._push(messages, parts, moving - before, row_words, inboxes)

        asked, answered = self.lookups.words
        found = [*messages.values(), *(values for _, values in rows.values())]
        residuals = [state[key] for key in state if key[1] == "residual"]
        finite += [tf.reduce_all(tf.math.is_finite(m)) for m in [*found, remembered]]
        facts = [
            tf.reduce_all(finite),
            version,
            tf.add_n([answered, *(tf.size(words) for words in pulled)]),
            tf.add_n([asked, *(tf.size(words) for words in row_words)]),
            tf.linalg.global_norm(found),
            tf.linalg.global_norm(residuals) if residuals else 0.0,
        ]
        facts = tf.stack([tf.cast(fact, tf.float64) for fact in facts])
        report.assign(tf.concat([facts, metrics.read_value()], 0))

    def _unpack(self, pulled):
        """The weights, the moving statistics, and the oldest version of them."""
        weights, statistics, version = {}, [], []
        for server, words in zip(self.servers, pulled, strict=True):
            values, moving, number = server.format.unpack_weights(words)
            weights |= values
            statistics.append(moving)
            version.append(number)
        whole = assemble(self.pieces, weights)
        return whole, tf.concat(statistics, 0), tf.reduce_min(tf.stack(version))

    def _note_untouched(self) -> None:
        """Tells the servers, before their first step, what has no gradient."""
        connected = self.model_step.connected
        for server in self.servers:
            pieces = server.format.pieces
            server.untouched = frozenset(p for p in pieces if not connected[p.variable])

    def _push(self, messages, parts, change, row_words, inboxes) -> None:
        """Fills the inboxes; a change of statistics that is not finite is left out."""
        change = tf.where(tf.reduce_all(tf.math.is_finite(change)), change, tf.zeros_like(change))
        changes = tf.split(change, [server.format.statistics for server in self.servers])
        pushes = zip(self.servers, changes, row_words, inboxes, strict=True)
        for server, part, rows, (inbox, row_inbox) in pushes:
            words = [parts[piece] for piece in server.format.large]
            words = tf.concat([*words, server.format.pack_rest(messages, part)], 0)
            with tf.device(server.device):
                inbox.assign(words)
                if server.rows.format.parts:
                    row_inbox.assign(tf.io.serialize_tensor(rows))

    def _messages(self, gradients, memory, version):
        """The worker's half of the optimizer: for each piece its message, and its new slots."""
        messages, state = {}, {}
        for piece in self.pieces:
            gradient = piece.cut(gradients[piece.variable])
            if self.half is not None:
                slots = {
                    name: tf.reshape(memory[self.slots[piece, name]], piece.shape)
                    for name in self.half.worker_slots
                }
                gradient, slots = self.half.worker_step(gradient, slots, version)
                state |= {(piece, name): slots[name] for name in slots}
            messages[piece] = gradient
        return messages, state

    def _encode(self, messages, state, memory, seeds, version):
        """The words of all large pieces, and the memory with what they have left out."""
        parts, state = {}, dict(state)
        for index, piece in enumerate(self.large):
            slot = self.slots.get((piece, "residual"))
            parts[piece], left_out = encode_with_feedback(
                self.options.compressor,
                tf.reshape(messages[piece], [-1]),
                None if slot is None else memory[slot],
                tf.stack([seeds[index], version]),
            )
            if left_out is None:
                continue
            state[piece, "residual"] = left_out
            if self.half is not None:
                slots = {name: state[piece, name] for name in self.half.worker_slots}
                sent = self.half.worker_sent(slots, tf.reshape(left_out, piece.shape))
                state |= {(piece, name): value for name, value in sent.items()}
        return parts, state

    def _join(self, state) -> tf.Tensor:
        """float32[m]."""
        flat = [tf.reshape(state[key], [-1]) for key in self.slots]
        return tf.concat([tf.zeros([0]), *flat], 0)


class Worker(BaseWorker):
    """One worker of a `Trainer`.

    Attributes:
        report: of its last step.
    """

    report_numbers = 6

    def __init__(
        self,
        index: int,
        device: str,
        program: Program,
        dataset_fn: Callable,
        loss_scale: LossScale,
    ):
        self.report: Report | None = None
        self._program = program
        super().__init__(index, device, program.model_step, dataset_fn, loss_scale)

    def start(self) -> None:
        program = self._program
        seeds = gradient_seeds(program.large, program.options, self.index)
        with on(self.device):
            self._memory = [tf.Variable(program.memory, trainable=False) for _ in range(2)]
            self._seeds = tf.identity(tf.constant(seeds, tf.int32, [len(seeds)]))
        self._accepted = False
        super().start()

    def step(self) -> Report:
        """Pulls, computes and pushes to the inboxes of this worker."""
        program = self._program
        with self.busy, on(self.device):
            program.step(
                self._iterator,
                self._memory,
                self._local,
                self._metrics,
                [
                    (server.inboxes[self.index], server.rows.inboxes[self.index])
                    for server in program.servers
                ],
                self._seeds,
                self._flags[self._accepted],
                self._flags[self._fresh],
                self._scale(),
                self._bulletin.variable,
            )
            self._accepted = False
            self.report = Report.from_vector(self._bulletin.read())
        self.pushed_words += sum(sum(server.format.push_lengths) for server in program.servers)
        self.pushed_words += self.report.row_words
        self.pulled_words += self.report.pulled_words
        self._took_step(self.report.metrics)
        return self.report

    @property
    def message_norm(self) -> float:
        """Of the last message."""
        return self.report.message_norm if self.report else 0.0

    def summary(self) -> dict[str, int]:
        """For people."""
        return {
            "alive": self.alive,
            "messages": self.steps,
            "bytes_pushed": 4 * self.pushed_words,
            "bytes_pulled": 4 * self.pulled_words,
        }

    def accept(self) -> None:
        """The servers have taken the last message: what it left out is owed from now on."""
        self._accepted = True

    @property
    def memory(self) -> np.ndarray:
        """float32[m], as of the last message that was accepted."""
        with self.busy, on(self.device):
            return self._memory[1 if self._accepted else 0].numpy()

    @memory.setter
    def memory(self, value: np.ndarray) -> None:
        with on(self.device):
            for variable in self._memory:
                variable.assign(value)
