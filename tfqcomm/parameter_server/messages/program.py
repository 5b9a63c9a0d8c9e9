"""What a worker does in a step: pull, gradient, its half of the optimizer, push.

    outboxes --> weights --> gradients --> message --> encode with feedback --> servers' steps
                    on the worker, with memory of its own                    or inboxes

One graph serves all workers: what differs between them, variables and data, is an argument. What a
worker has computed counts once the servers have taken its message. Where its graph ends with their
steps, it knows; where messages wait in inboxes, it keeps its memory twice: until the next step what
it has computed is pending, and is forgotten if they have not. What it owes to rows it keeps once,
and what the last message left out is pending likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from tfqcomm.parameter_server.buckets import Bucket, encode_with_feedback
from tfqcomm.parameter_server.cluster import Graphs
from tfqcomm.parameter_server.embeddings import Lookups, RowFeedback, Table
from tfqcomm.parameter_server.gradients import all_finite, clip, dense, norm_and_health
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.messages.ahead import Ahead, words_of
from tfqcomm.parameter_server.messages.layout import MemoryLayout
from tfqcomm.parameter_server.messages.server import Server
from tfqcomm.parameter_server.model_step import ModelStep
from tfqcomm.parameter_server.optimizers import inner, worker_half
from tfqcomm.parameter_server.partition import Piece, assemble
from tfqcomm.parameter_server.payload import pack_rest


class Program:
    """The graph of a step.

    Args:
        model: compiled and built.
        servers: all of them.
        pieces: in the order of the model's trainable variables.
        tables: weights that are in no piece, since their rows travel.
        loss_scale: by which losses are multiplied.
        workers: how many there are.
        pull_ahead: whether a step pulls what the next one computes with.
        row_feedback: slots per table of what a worker owes to rows; see `RowFeedback`.

    Attributes:
        ahead: how a worker keeps what it pulls for its next step; None if each step pulls its own.
        buckets: of all servers, in which messages are encoded.
        layout: of a worker's memory.
        model_step: its forward and backward pass.
        row_feedback: how a worker keeps what it owes to rows.
    """

    def __init__(
        self,
        model: keras.Model,
        servers: Sequence[Server],
        pieces: Sequence[Piece],
        tables: Sequence[Table],
        loss_scale: LossScale,
        workers: int,
        *,
        pull_ahead: bool,
        row_feedback: int | str | None,
    ):
        self.workers = workers
        self.optimizer = inner(model.optimizer)
        self.scaled = loss_scale.value is not None
        self.servers = list(servers)
        self.ahead = Ahead(self.servers) if pull_ahead else None
        self.pieces = list(pieces)
        self.options = servers[0].format.options
        self.half = worker_half(self.optimizer)
        self.lookups = Lookups(tables, [server.rows for server in servers])
        self.row_feedback = RowFeedback(tables, row_feedback)
        self.model_step = ModelStep(model, self.lookups)
        self.large = [p for p in pieces if p in {q for s in servers for q in s.format.large}]
        self.buckets = [bucket for server in servers for bucket in server.format.up.encoded]
        self.layout = self._lay_out_memory()
        self.step = Graphs(self._step, kind_of=lambda iterator, *_: str(iterator.element_spec))

    def _lay_out_memory(self) -> MemoryLayout:
        first_values: dict[tuple[Piece | Bucket, str], float] = {}
        slots = dict(self.half.worker_slots) if self.half else {}
        for piece in self.pieces:
            first_values |= {(piece, name): value for name, value in slots.items()}
        if self.options.error_feedback:
            first_values |= {(bucket, "residual"): 0.0 for bucket in self.buckets}
        return MemoryLayout(first_values)

    def _step(
        self, iterator, sender, memory, owed, local, metrics, inboxes, ahead, seeds, flags, scale
    ):
        """One step of one worker.

        Args:
            iterator: of its data.
            sender: its index, int32, and a variable, int64: the number of its last message.
            memory: variables, as `layout` divides it: as of the last message that was accepted,
                and, where there are inboxes, pending.
            owed: to rows of tables, as `row_feedback` keeps it.
            local: variables of layers that are the worker's own, such as states of dropout.
            metrics: variable, the states of all metrics in a row, float64.
            inboxes: of the worker on each server; none where the servers take a step now.
            ahead: what was pulled ahead, in the step before; nothing where a step pulls its own.
            seeds: int32[buckets], of stochastic codecs.
            flags: two bool scalars: the servers have taken the last message from their inboxes;
                the metrics begin anew.
            scale: float32 scalar, of the loss.

        Returns:
            What a `Report` is made of, float64: for each server how many steps it had taken when it
            took this message, -1 if it has not, or not yet; numbers; and the states of all metrics.
        """
        accepted, fresh = flags
        batch = keras.utils.unpack_x_y_sample_weight(next(iterator))
        present = self.ahead.read(ahead) if self.ahead else None
        pulled = [server.pulled() for server in self.servers]
        weights, before, versions = self._unpack(present or pulled)
        version = tf.reduce_min(versions)
        metrics.assign(tf.where(fresh, self.model_step.metrics.initial, metrics.read_value()))
        gradients, moving, _ = self.model_step.gradients(
            weights, before, batch, local, metrics, scale if self.scaled else None
        )
        self._note_untouched()
        finite = [all_finite(gradients)] if self.scaled else []  # where Keras asks: before clipping
        gradients, ids = self.lookups.apart(gradients)
        gradients = clip(self.optimizer, gradients, self.workers)
        rows = self.lookups.split(gradients, ids)
        gradients = dense(gradients, self.model_step.weights)
        base = _settled(memory, accepted)
        messages, state = self._messages(gradients, base, version)
        parts, state = self._encode(messages, state, base, seeds, version)
        found = [*messages.values(), *(values for _, values in rows.values())]
        row_words, left_out = self._encode_rows(rows, owed, accepted)
        residuals = [value for (_, name), value in state.items() if name == "residual"]
        residuals += [values for _, values in left_out.values()]
        slots = [value for (_, name), value in state.items() if name != "residual"]
        norm, sound = norm_and_health(found)
        residual_norm, kept = norm_and_health(residuals)
        healthy = tf.reduce_all([*finite, sound, kept, norm_and_health(slots)[1]])
        words = self._words(messages, parts, moving - before, row_words)
        alone = [[messages[p] for p in server.format.up.alone] for server in self.servers]
        number, steps = self._push(words, alone, inboxes, sender, healthy)
        if self.ahead:
            self.ahead.keep(ahead, pulled)
        taken = tf.reduce_any(tf.stack(steps) >= 0)
        _remember(memory, self.layout.join(state), taken)
        self.row_feedback.remember(owed, left_out, taken)
        asked, answered = self.lookups.words
        facts = [
            healthy,
            number,
            answered + words_of(pulled),
            tf.add_n([asked, *(tf.size(words) for words in row_words)]),
            norm,
            residual_norm,
            *tf.unstack(versions),
        ]
        facts = tf.stack([tf.cast(fact, tf.float64) for fact in facts])
        steps = tf.cast(tf.stack(steps), tf.float64)
        return tf.concat([steps, facts, metrics.read_value()], 0)

    def _unpack(self, pulled):
        """The weights, the moving statistics, and the version of each server: int32[servers]."""
        weights, statistics, version = {}, [], []
        for server, (words, *alone) in zip(self.servers, pulled, strict=True):
            values, moving, number = server.format.unpack_weights(words)
            weights |= values | dict(zip(server.format.down.alone, alone, strict=True))
            statistics.append(moving)
            version.append(number)
        whole = assemble(self.pieces, weights)
        return whole, tf.concat(statistics, 0), tf.stack(version)

    def _note_untouched(self) -> None:
        """Tells the servers, before their first step, what has no gradient."""
        connected = self.model_step.connected
        for server in self.servers:
            pieces = server.format.pieces
            server.untouched = frozenset(p for p in pieces if not connected[p.variable])

    def _encode_rows(self, rows, owed, accepted):
        """For each server the words of its rows; and what they have left out, by table."""
        self.row_feedback.settle(owed, accepted)
        rows = self.row_feedback.add(owed, rows)
        formats = [server.rows.format for server in self.servers]
        words = [format.pack(rows) for format in formats]
        if not self.row_feedback.slots:
            return words, {}
        sent = {}
        for format, own in zip(formats, words, strict=True):
            sent |= format.unpack(own)
        return words, self.row_feedback.left_out(rows, sent)

    def _words(self, messages, parts, change, row_words) -> list[tf.Tensor]:
        """What each server gets; a change of statistics that is not finite is left out."""
        change = tf.where(tf.reduce_all(tf.math.is_finite(change)), change, tf.zeros_like(change))
        changes = tf.split(change, [server.format.statistics for server in self.servers])
        return [
            tf.concat(
                [
                    *(parts[bucket] for bucket in server.format.up.encoded),
                    pack_rest(server.format.up, messages, part),
                    rows,
                ],
                0,
            )
            for server, part, rows in zip(self.servers, changes, row_words, strict=True)
        ]

    def _push(self, words, alone, inboxes, sender, healthy) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Gives each server its words: it takes a step with them now, or keeps them in its inbox.

        Returns:
            The number of the message; for each server how many steps it had taken before, or -1.
        """
        index, last = sender
        number = last.assign_add(1, read_value=True)
        if inboxes:
            for server, own, long, inbox in zip(self.servers, words, alone, inboxes, strict=True):
                server.keep(own, long, inbox)
            return number, [tf.constant(-1, tf.int64)] * len(self.servers)
        return number, [
            server.take(own, long, index, number, healthy)
            for server, own, long in zip(self.servers, words, alone, strict=True)
        ]

    def _messages(self, gradients, memory, version):
        """The worker's half of the optimizer: for each piece its message, and its new slots."""
        messages, state = {}, {}
        for piece in self.pieces:
            gradient = piece.cut(gradients[piece.variable])
            if self.half is not None:
                slots = {
                    name: tf.reshape(self.layout.slot(memory, (piece, name)), piece.shape)
                    for name in self.half.worker_slots
                }
                gradient, slots = self.half.worker_step(gradient, slots, version)
                state |= {(piece, name): slots[name] for name in slots}
            messages[piece] = gradient
        return messages, state

    def _encode(self, messages, state, memory, seeds, version):
        """The words of all buckets, and the memory with what they have left out."""
        parts, state = {}, dict(state)
        for index, bucket in enumerate(self.buckets):
            parts[bucket], left_out = encode_with_feedback(
                self.options.one_compressor,
                bucket,
                bucket.pack(messages),
                self.layout.slot(memory, (bucket, "residual")),
                tf.stack([seeds[index], version]),
            )
            if left_out is None:
                continue
            state[bucket, "residual"] = left_out
            if self.half is not None:
                for piece, rest in bucket.unpack(left_out).items():
                    slots = {name: state[piece, name] for name in self.half.worker_slots}
                    sent = self.half.worker_sent(slots, rest)
                    state |= {(piece, name): value for name, value in sent.items()}
        return parts, state


def _settled(memory, accepted) -> list[tf.Tensor]:
    """What a worker remembers, now that it is known whether its last message was accepted."""
    if len(memory) == 1:
        return [variable.read_value() for variable in memory[0]]
    base = []
    for committed, pending in zip(*memory, strict=True):
        base.append(tf.cond(accepted, pending.read_value, committed.read_value))
        committed.assign(base[-1])
    return base


def _remember(memory, values, taken) -> None:
    """At once where the servers took the message, or as pending where that is not known yet."""
    if len(memory) > 1:
        for pending, value in zip(memory[1], values, strict=True):
            pending.assign(value)
        return
    for variable, value in zip(memory[0], values, strict=True):
        tf.cond(taken, functools.partial(variable.assign, value), variable.read_value)
