"""The servers and workers of one training, whoever is lost and comes back.

A lost worker takes its memory with it, and its last message unless that has arrived. A message has
either been applied, once, or is lost: nothing is ever sent twice, and servers would take it once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private
from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import Cluster, ServerLost
from tfqcomm.parameter_server.first_calls import first_calls
from tfqcomm.parameter_server.loss_scale import LossScale
from tfqcomm.parameter_server.watch import Watch
from tfqcomm.state.traffic import Traffic

PATIENCE = 300  # seconds to wait for a worker when none is left
RETRY_SECONDS = 1.0


WorkerKind = TypeVar("WorkerKind", bound=BaseWorker)


class Fleet(Generic[WorkerKind]):
    """Runs steps of workers and servers, under the eyes of a watch.

    Args:
        cluster: their names, for people.
        servers: each with a `device`, and a `ping` that raises `tf.errors.OpError` if it is gone.
        workers: all of them.
        loss_scale: which a step that was taken or skipped may change.
        watch: makes the calls that need other tasks.

    Attributes:
        applied: messages, or means of messages, that the servers have taken: their version.
        skipped: that were not finite.
    """

    def __init__(
        self,
        cluster: Cluster,
        servers: Sequence,
        workers: Sequence[WorkerKind],
        loss_scale: LossScale,
        watch: Watch,
    ):
        self.servers = list(servers)
        self.workers = list(workers)
        self.applied = 0
        self.skipped = 0
        self.loss_scale = loss_scale
        self._cluster = cluster
        self._watch = watch
        self._reconnecting = threading.Lock()
        self._losing = threading.Lock()  # guards who is lost
        self._applying = threading.RLock()  # held while the servers take a step
        self._failure: Exception | None = None  # of a worker that came back

    def alive(self) -> list[WorkerKind]:
        """Those that take part; waits while there are none.

        Raises:
            Exception: of the user's own code, when a worker came back and asked for its data.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            if self._failure is not None:
                raise self._failure
            if alive := [w for w in self.workers if w.alive]:
                return alive
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"All workers are gone, and none has come back within {PATIENCE} s. "
                    "Restart the cluster; `tfqcomm.callbacks.BackupAndRestore` resumes from the "
                    "last backup."
                )
            self.check_servers()
            time.sleep(RETRY_SECONDS)

    def in_parallel(self, calls: Sequence[Callable]) -> list:
        """What the calls return."""
        return self._watch.run_all(calls)

    def attempt(self, worker: WorkerKind, call: Callable):
        """What a call that needs a worker returns; None if the worker is lost, or was in it.

        Raises:
            ServerLost: where that is the reason.
            RuntimeError: where the worker is stopped but not gone.
            tf.errors.OpError: from the user's own code.
        """
        return self._watch.run(self._attempt, worker, call)

    def _attempt(self, worker: WorkerKind, call: Callable):
        life = worker.lives
        if not worker.alive:
            return None
        try:
            return call()
        except tf.errors.OpError as error:
            self.check_servers(error)
            if worker.lives == life and worker.is_there():
                raise
        self._lose(worker, life)
        return None

    def _lose(self, worker: WorkerKind, life: int) -> None:
        """Notes that a worker is lost; of several threads that find it so the first one acts."""
        with self._losing:
            if not worker.alive or worker.lives != life:
                return
            worker.alive = False
            self._watch.lost.add(worker.device)
        logging.warning(
            "%s is lost. Training goes on with the others.",
            self._cluster.describe(worker.device),
        )
        threading.Thread(target=self._bring_back, args=(worker,), daemon=True).start()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Scope in which no worker and no server is in a step: all there is belongs together."""
        with self._applying, contextlib.ExitStack() as busy:
            for worker in self.workers:
                busy.enter_context(worker.busy)
            yield

    def apply(self, workers: Sequence[WorkerKind]) -> None:
        """One step of all servers with the messages of these workers."""
        indices = [worker.index for worker in workers]
        with self._applying:
            try:
                self.in_parallel([lambda s=server: s.step(indices) for server in self.servers])
            except tf.errors.OpError as error:
                self.check_servers(error)
                raise
            for worker in workers:
                worker.accept()
            self.take(workers)

    def take(self, workers: Sequence[WorkerKind]) -> None:
        """Counts a step with what these workers found."""
        self.applied += 1
        self.loss_scale.note(True, workers[0].used_scale)

    def skip(self, workers: Sequence[WorkerKind]) -> None:
        """Counts a step that is not taken: what some of these workers found is not finite."""
        self.skipped += 1
        self.loss_scale.note(False, workers[0].used_scale)

    def settle(self, worker) -> bool:
        """Whether servers took the last message of a worker that is lost; they no more will.

        It may have reached some of them only: then the first one says, whose steps are counted.
        """
        known = worker.report.number if worker.report else 0

        def settle():
            return [server.settle(worker.index, worker.number) for server in self.servers]

        try:
            return self._watch.run(settle)[0] > known
        except tf.errors.OpError as error:
            self.check_servers(error)
            raise

    def check_servers(self, cause: Exception | None = None) -> None:
        """Raises `ServerLost` if a parameter server does not answer any more."""
        self._watch.run(self._ping_servers, cause)

    def _ping_servers(self, cause: Exception | None) -> None:
        for server in self.servers:
            try:
                server.ping()
            except tf.errors.OpError as error:
                raise ServerLost(
                    f"{self._cluster.describe(server.device)} is gone, and its weights with it. "
                    "Restart the cluster; `tfqcomm.callbacks.BackupAndRestore` resumes from the "
                    f"last backup. ({type(error).__name__})"
                ) from (cause or error)

    def metrics(self) -> np.ndarray:
        """The states of all metrics, of all workers together."""
        states = self.workers[0].model_step.metrics
        states.check(len(self.workers))
        return states.merge([worker.metrics for worker in self.workers])

    def traffic(self, applied_per_iteration: int) -> Traffic:
        """All there was so far, of an average worker."""
        workers = self.workers
        dense_words = 2 * sum(server.format.dense_words for server in self.servers)

        def mean_bytes(words):
            return 4 * sum(words) // len(workers)

        return Traffic(
            steps=(self.applied + self.skipped) // applied_per_iteration,
            skipped_steps=self.skipped,
            bytes_sent=mean_bytes(worker.pushed_words for worker in workers),
            bytes_pulled=mean_bytes(worker.pulled_words for worker in workers),
            dense_bytes=mean_bytes(dense_words * worker.steps for worker in workers),
            gradient_norm=workers[0].message_norm,
        )

    def _bring_back(self, worker: WorkerKind) -> None:
        """Waits until a lost worker was started anew, and lets it begin from the beginning."""
        while True:
            try:
                with self._reconnecting:
                    _tf_private.reconnect()
                    first_calls.forget()
                    worker.start()
            except tf.errors.OpError as error:
                logging.log_every_n_seconds(
                    logging.INFO,
                    "%s is not back yet: %s",
                    60,
                    self._cluster.describe(worker.device),
                    error.message[:200],
                )
                time.sleep(RETRY_SECONDS)
            except Exception as error:  # of the user's `dataset_fn`: `fit` raises it
                self._failure = error
                return
            else:
                self._watch.lost.discard(worker.device)
                worker.alive = True
                logging.warning("%s is back.", self._cluster.describe(worker.device))
                return


def make_fleet(
    cluster: Cluster,
    watch: Watch,
    worker: type[WorkerKind],
    program,
    servers: Sequence,
    makers: Sequence[Callable],
    loss_scale: LossScale,
) -> Fleet[WorkerKind]:
    """A fleet with workers of a kind, each with its data."""
    devices = enumerate(zip(cluster.workers, makers, strict=True))
    workers = [
        worker(index, device, program, maker, loss_scale) for index, (device, maker) in devices
    ]
    return Fleet(cluster, servers, workers, loss_scale, watch)
