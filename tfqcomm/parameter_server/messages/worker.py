"""A worker of a `Trainer`, as the chief sees it: one call is a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import Errand, on
from tfqcomm.parameter_server.embeddings.lookups import naming_strange_ids
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.messages.program import Program
from tfqcomm.parameter_server.messages.report import Report
from tfqcomm.parameter_server.payload import gradient_seeds


class Worker(BaseWorker):
    """One worker of a `Trainer`.

    Attributes:
        report: of its last step.
        number: of the last message that it was asked for.
        has_pulled: whether it has pulled the weights of its next step, where it pulls ahead.
    """

    def __init__(
        self,
        index: int,
        device: str,
        program: Program,
        dataset_fn: Callable,
        loss_scale: LossScale,
    ):
        self.report: Report | None = None
        self.number = 0
        self._program = program
        self._pushed = sum(server.format.push_words for server in program.servers)
        super().__init__(index, device, program.model_step, dataset_fn, loss_scale)

    def start(self) -> None:
        program, layout = self._program, self._program.layout
        seeds = gradient_seeds(program.buckets, program.options, self.index)
        self._inboxes = [server.inboxes[self.index] for server in program.servers if server.inboxes]
        with on(self.device):
            memories = 2 if self._inboxes else 1
            self._memory = [
                [tf.Variable(part, trainable=False) for part in layout.divide(layout.initial)]
                for _ in range(memories)
            ]
            self._owed = program.row_feedback.make(waiting=bool(self._inboxes))
            self._seeds = tf.identity(tf.constant(seeds, tf.int32, [len(seeds)]))
            number = tf.Variable(np.int64(self.number), trainable=False)
            self._sender = tf.identity(tf.constant(self.index)), number
            self._kept = program.ahead.make() if program.ahead else []
        self._fill = Errand(program.ahead.fill, self.device) if program.ahead else None
        self.has_pulled = False
        self._errand = Errand(program.step, self.device)
        self._accepted = False
        super().start()

    def step(self) -> Report:
        """Pulls, computes and pushes; without inboxes the servers take a step with it."""
        program = self._program
        self.number += 1
        with self.busy, naming_strange_ids():
            if self._fill and not self.has_pulled:
                self.pulled_words += int(self._fill(self._kept))
                self.has_pulled = True
            vector = self._errand(
                self._iterator,
                self._sender,
                self._memory,
                self._owed,
                self._local,
                self._metrics,
                self._inboxes,
                self._kept,
                self._seeds,
                (self._flags[self._accepted], self._flags[self._fresh]),
                self._scale(),
            )
            self._accepted = False
            self.report = Report.from_vector(vector, len(program.servers))
        self.number = self.report.number
        self.pushed_words += self._pushed + self.report.row_words
        self.pulled_words += self.report.pulled_words
        self._took_step(self.report.metrics)
        return self.report

    def count_last(self) -> None:
        """Counts its last message, which the servers have and of which no report came.

        Nobody knows how many rows it had: as many as the one before.
        """
        self.steps += 1
        self.pushed_words += self._pushed + (self.report.row_words if self.report else 0)

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

    def forget_rows(self) -> None:
        """Owes nothing to rows any more."""
        with self.busy, on(self.device):
            self._program.row_feedback.forget(self._owed)

    @property
    def memory(self) -> np.ndarray:
        """float32[m], as of the last message that was accepted."""
        with self.busy, on(self.device):
            parts = [variable.numpy() for variable in self._memory[self._accepted]]
        return self._program.layout.whole(parts)

    @memory.setter
    def memory(self, value: np.ndarray) -> None:
        with on(self.device):
            for variables in self._memory:
                parts = self._program.layout.divide(value)
                for variable, part in zip(variables, parts, strict=True):
                    variable.assign(part)
