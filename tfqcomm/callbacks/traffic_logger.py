"""Shows what compression saves, epoch by epoch."""

from __future__ import annotations

import importlib.util

import keras
import tensorflow as tf
from absl import logging

from tfqcomm._tf_private import optimizers_of
from tfqcomm.state.ledger import Ledger, ledger_of, watch
from tfqcomm.state.traffic import Traffic


class TrafficLogger(keras.callbacks.Callback):
    """Bytes sent per epoch, what they would have been, and how well error feedback keeps up.

    At the end of the first epoch it says once which tensors are compressed, and how. Use it on
    all workers or on the chief alone; it communicates nothing.

    Args:
        log_dir: where to write TensorBoard scalars; None writes none.
        verbose: 1 prints how each tensor travels, once; 0 leaves it to absl's log.

    Raises:
        ValueError: if `log_dir` is given and TensorBoard is not installed.

    Attributes:
        history: one dict per epoch with
            epoch: index;
            steps: steps seen, skipped ones included;
            skipped_steps: those in which some worker's message was not finite;
            bytes_sent: by one worker. A worker is a process; within a single process every
                replica counts as one, and the figure is what W such machines would send each;
            bytes_pulled: weights one worker received; with parameter servers only;
            dense_bytes: what one worker would have sent in float32 ring all-reduces; with
                parameter servers, what it would have pushed and pulled in float32;
            ratio: `dense_bytes / bytes_sent`; with parameter servers of what it sent and pulled;
            residual_norm_ratio: norm of the residuals over that of the last message, on the first
                local replica; a ratio that grows and grows means too much compression.

    Example:
    >>> logger = TrafficLogger()
    >>> logger.history
    []
    """

    def __init__(self, log_dir: str | None = None, *, verbose: int = 1):
        super().__init__()
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "Argument `log_dir` needs the package `tensorboard`, which TensorFlow does not "
                "install: `pip install tensorboard`, or leave it None and read `.history`. "
                f"Received: log_dir={log_dir!r}"
            )
        self.log_dir = log_dir
        self.history: list[dict[str, float]] = []
        self._writer = None
        self._seen: dict[Ledger, Traffic] = {}
        self._verbose = verbose
        self._told = False

    def on_train_begin(self, logs=None):
        """Opens the log and notes where the counters stand."""
        if self.log_dir is not None and self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.log_dir))
        for optimizer in optimizers_of(self.model):
            watch(optimizer)
        self._seen = {ledger: ledger.meter.read() for ledger in self._ledgers()}

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch to `history`."""
        ledgers = self._ledgers()
        if not ledgers:
            logging.log_first_n(
                logging.WARNING,
                "TrafficLogger: the model's optimizer exchanges nothing through tfqcomm. Use "
                "tfqcomm.distribute or tfqcomm.optimizers.",
                1,
            )
            return
        self._tell_routes(ledgers)
        record = {"epoch": epoch, **self._totals_since_last(ledgers)}
        self.history.append(record)
        self._write(epoch, record)

    def on_train_end(self, logs=None):
        """Flushes the log."""
        if self._writer is not None:
            self._writer.flush()

    def _ledgers(self) -> list[Ledger]:
        found = [ledger_of(optimizer) for optimizer in optimizers_of(self.model)]
        return list(dict.fromkeys(ledger for ledger in found if ledger is not None))

    def _totals_since_last(self, ledgers) -> dict[str, float]:
        counted = ("steps", "skipped_steps", "bytes_sent", "bytes_pulled", "dense_bytes")
        totals = dict.fromkeys(counted, 0)
        ratios = []
        for ledger in ledgers:
            now = ledger.meter.read()
            before = self._seen.get(ledger)
            for name in totals:
                totals[name] += getattr(now, name) - (getattr(before, name) if before else 0)
            self._seen[ledger] = now
            if now.gradient_norm > 0:
                ratios.append(ledger.residuals.norm() / now.gradient_norm)
        moved = totals["bytes_sent"] + totals["bytes_pulled"]
        if not any(ledger.served for ledger in ledgers):
            del totals["bytes_pulled"]
        return {
            **totals,
            "ratio": totals["dense_bytes"] / moved if moved else 1.0,
            "residual_norm_ratio": max(ratios, default=0.0),
        }

    def _tell_routes(self, ledgers):
        if self._told:
            return
        self._told = True
        for ledger in ledgers:
            lines = "\n".join(f"  {route}" for route in ledger.routes)
            text = f"TrafficLogger: what is compressed, and how it travels\n{lines}"
            if self._verbose:
                print(f"\n{text}", flush=True)
            else:
                logging.info("%s", text)

    def _write(self, epoch, record):
        if self._writer is None:
            return
        with self._writer.as_default(step=epoch):
            for name, value in record.items():
                if name != "epoch":
                    tf.summary.scalar(f"traffic/{name}", value)
