"""The servers and workers of one training, whoever is lost and comes back.

A lost worker takes its last message and its memory with it. A message has either been applied by
the servers, once, or is lost: nothing is ever sent twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private
from tfqcomm.parameter_server.base_worker import BaseWorker
from tfqcomm.parameter_server.cluster import Cluster, ServerLost

PATIENCE = 300  # seconds to wait for a worker when none is left
RETRY_SECONDS = 1.0


class Fleet:
    """Runs steps of workers and servers, in threads of its own.

    Args:
        cluster: their names, for people.
        servers: each with a `device`, and a `ping` that raises `tf.errors.OpError` if it is gone.
        workers: all of them.

    Attributes:
        applied: messages, or means of messages, that the servers have taken: their version.
        skipped: that were not finite.
    """

    def __init__(self, cluster: Cluster, servers: Sequence, workers: Sequence[BaseWorker]):
        self.servers = list(servers)
        self.workers = list(workers)
        self.applied = 0
        self.skipped = 0
        self._cluster = cluster
        self._pool = ThreadPoolExecutor(len(servers) + len(workers))
        self._reconnecting = threading.Lock()

    def alive(self) -> list[BaseWorker]:
        """Those that take part; waits while there are none."""
        deadline = time.monotonic() + PATIENCE
        while not (alive := [w for w in self.workers if w.alive]):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"All workers are gone, and none has come back within {PATIENCE} s. "
                    "Restart the cluster; `tfqcomm.callbacks.BackupAndRestore` resumes from the "
                    "last backup."
                )
            self.check_servers()
            time.sleep(RETRY_SECONDS)
        return alive

    def in_parallel(self, calls: Sequence[Callable]) -> list:
        """What the calls return."""
        return [future.result() for future in [self._pool.submit(call) for call in calls]]

    def attempt(self, worker: BaseWorker, call: Callable):
        """What a call that needs a worker returns; None if the worker is lost, or was in it.

        Raises:
            ServerLost: where that is the reason.
            tf.errors.OpError: from the user's own code.
        """
        if not worker.alive:
            return None
        try:
            return call()
        except tf.errors.OpError as error:
            self.check_servers(error)
            if worker.is_there():
                raise
        worker.alive = False
        logging.warning(
            "%s is lost, and its last message with it. Training goes on with the others.",
            self._cluster.describe(worker.device),
        )
        threading.Thread(target=self._bring_back, args=(worker,), daemon=True).start()
        return None

    def apply(self, workers: Sequence[BaseWorker]) -> None:
        """One step of all servers with the messages of these workers."""
        indices = [worker.index for worker in workers]
        try:
            self.in_parallel([lambda s=server: s.step(indices) for server in self.servers])
        except tf.errors.OpError as error:
            self.check_servers(error)
            raise
        self.applied += 1
        for worker in workers:
            worker.accept()

    def check_servers(self, cause: Exception | None = None) -> None:
        """Raises `ServerLost` if a parameter server does not answer any more."""
        for server in self.servers:
            try:
                server.ping()
            except tf.errors.OpError as error:
                raise ServerLost(
                    f"{self._cluster.describe(server.device)} is gone, and its weights with it. "
                    "Restart the cluster; `tfqcomm.callbacks.BackupAndRestore` resumes from the "
                    f"last backup. ({type(error).__name__})"
                ) from (cause or error)

    def _bring_back(self, worker: BaseWorker) -> None:
        """Waits until a lost worker was started anew, and lets it begin from the beginning."""
        while True:
            try:
                with self._reconnecting:
                    _tf_private.reconnect()
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
            else:
                worker.alive = True
                logging.warning("%s is back.", self._cluster.describe(worker.device))
                return
