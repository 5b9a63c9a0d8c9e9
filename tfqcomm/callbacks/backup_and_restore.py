"""Goes on after a crash with what error feedback still owes the model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
from absl import logging

from tfqcomm import _tf_private
from tfqcomm._tf_private import optimizers_of
from tfqcomm.state.ledger import Tables, ledger_of, restore_state
from tfqcomm.transport.of_strategy import transport_for

_WEIGHTS = "model.weights.h5"
_TRAINING = "training.json"
_TABLES = "tables-"


class BackupAndRestore(keras.callbacks.Callback):
    """Saves the state of training, residuals included, and resumes from it.

    Keras' callback of this name saves the model and its optimizers; what compression has left out
    so far is lost with the process. This one keeps it, summed over all replicas, each with its
    weight in the mean: a run may go on with another number of workers, or another schedule, and
    the model is owed exactly what it was owed before, and is paid also where nothing is compressed
    any more. What workers remember on their own, such as QAdam's moments, is kept as its mean over
    all replicas. A model may have several optimizers, also in a list or a dictionary.

    Tables that live on parameter servers alone are written and read by these, beside the backup:
    `backup_dir` must then be on a file system that they share with the chief. A run may go on with
    another number of servers.

    Pass it to `fit` on all workers. The chief alone reads and writes `backup_dir`, and gives the
    others what it read. A backup replaces the one before in a single step, so that a crash while
    saving loses nothing. The order of the data is not part of it.

    Args:
        backup_dir: a directory of its own.
        save_freq: "epoch", or a number of batches. A run that was interrupted within an epoch
            begins this epoch again, with the weights of the last backup.
        delete_checkpoint: remove the backup when training has come to its end.

    Raises:
        ValueError: for arguments that do not fit, and for a model that is not built.

    Example:
    >>> callback = BackupAndRestore("/tmp/backup", save_freq=100)
    """

    def __init__(self, backup_dir, save_freq: str | int = "epoch", delete_checkpoint: bool = True):
        super().__init__()
        if not backup_dir:
            raise ValueError(
                f"Argument `backup_dir` must be a path. Received: backup_dir={backup_dir!r}"
            )
        valid = save_freq == "epoch" or (type(save_freq) is int and save_freq > 0)
        if not valid:
            raise ValueError(
                "Argument `save_freq` must be 'epoch' or a positive number of batches. "
                f"Received: save_freq={save_freq!r}"
            )
        self.backup_dir = Path(backup_dir)
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint
        self._epoch = 0
        self._batches_since_backup = 0
        self._last_batch = -1

    @property
    def path(self) -> Path:
        """The backup, one file."""
        return self.backup_dir / "backup.zip"

    def on_train_begin(self, logs=None):
        """Restores the last backup, if there is one."""
        if not self.model.built:
            raise ValueError(
                "BackupAndRestore needs a model that is built before `fit`. Give it an `Input` "
                "or call it once on a batch of data."
            )
        self._transport = transport_for(self.model.distribute_strategy)
        data = self.path.read_bytes() if self._is_chief and self.path.exists() else b""
        data = self._transport.share_bytes(data)
        if data:
            self._restore(zipfile.ZipFile(io.BytesIO(data)))

    def on_epoch_begin(self, epoch, logs=None):
        """Notes the epoch that an interrupted run begins with."""
        _tf_private.resume_at_epoch(self.model, None)  # it has; a later `fit` starts from its own
        self._epoch = epoch
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        """Saves every `save_freq` batches."""
        self._batches_since_backup += batch - self._last_batch  # several per execution, perhaps
        self._last_batch = batch
        if self.save_freq != "epoch" and self._batches_since_backup >= self.save_freq:
            self._save(self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        """Saves after each epoch."""
        self._epoch = epoch + 1
        if self.save_freq == "epoch":
            self._save(self._epoch)

    def on_train_end(self, logs=None):
        """Removes the backup."""
        _tf_private.resume_at_epoch(self.model, None)
        if self.delete_checkpoint and self._is_chief:
            self.path.unlink(missing_ok=True)
            self._remove_tables(but=None)

    @property
    def _is_chief(self) -> bool:
        return self._transport.process == 0

    def _save(self, epoch: int) -> None:
        """A collective: all workers add up their residuals; the chief writes."""
        self._batches_since_backup = 0
        states = {}
        tables = self._new_tables()
        for index, optimizer in enumerate(optimizers_of(self.model)):
            ledger = ledger_of(optimizer)
            if ledger is not None:
                states[f"exchange-{index}.npz"] = ledger.state(str(tables) if tables else None)
        if not self._is_chief:
            return
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with zipfile.ZipFile(partial, "w") as archive:
            training = {
                "epoch": epoch,
                "optimizers": self._built(),
                "tables": tables and tables.name,
            }
            archive.writestr(_TRAINING, json.dumps(training))
            archive.writestr(_WEIGHTS, self._weights_to_bytes())
            for name, state in states.items():
                with archive.open(name, "w", force_zip64=True) as file:
                    np.savez(file, **state)  # type: ignore[arg-type]  # of no such name
        os.replace(partial, self.path)
        self._remove_tables(but=tables)

    def _restore(self, archive: zipfile.ZipFile) -> None:
        training = json.loads(archive.read(_TRAINING))
        self._build(training.get("optimizers"))
        saved, tables = training.get("tables"), self._tables()
        if saved and not tables:
            raise ValueError(
                f"The backup in {self.backup_dir} has tables that live on parameter servers: "
                "resume with a `tfqcomm.parameter_server.Trainer` whose tables travel by rows. "
                "`tf.train.load_checkpoint` reads them in "
                f"{self.backup_dir / saved / 'tables'}."
            )
        with self._tables_left_out() if saved else contextlib.nullcontext():
            self._weights_from_bytes(archive.read(_WEIGHTS))
        if saved and tables:
            tables.restore(str(self.backup_dir / saved))
        for index, optimizer in enumerate(optimizers_of(self.model)):
            name = f"exchange-{index}.npz"
            if name in archive.namelist():
                with np.load(io.BytesIO(archive.read(name))) as state:
                    restore_state(optimizer, dict(state))
        _tf_private.resume_at_epoch(self.model, training["epoch"])
        logging.info("BackupAndRestore: resumed at epoch %d", training["epoch"])

    def _built(self) -> list[list[int] | None]:
        """For each optimizer the places of the weights it trains."""
        held = _tf_private.optimizers_held_by(self.model)
        return [_tf_private.trained_weights(optimizer, self.model) for optimizer in held]

    def _build(self, places: list[list[int] | None] | None) -> None:
        """Makes the optimizers' variables, for Keras to load.

        Args:
            places: what `_built` said; None for older backups, of models with one optimizer.
        """
        held = _tf_private.optimizers_held_by(self.model)
        if places is None:
            weights = self.model.weights
            trained = {id(v) for v in self.model.trainable_variables}
            compiled = self.model.optimizer is not None
            places = [[i for i, v in enumerate(weights) if id(v) in trained]] if compiled else []
        with self.model.distribute_strategy.scope():
            for optimizer, found in zip(held, places, strict=False):
                if found is not None and not optimizer.built:
                    optimizer.build([self.model.weights[i] for i in found])

    def _weights_to_bytes(self) -> bytes:
        with tempfile.TemporaryDirectory(dir=self.backup_dir) as directory:
            file = Path(directory) / _WEIGHTS
            with self._tables_left_out():
                self.model.save_weights(file)
            return file.read_bytes()

    def _weights_from_bytes(self, data: bytes) -> None:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / _WEIGHTS
            file.write_bytes(data)
            self.model.load_weights(file)

    def _tables(self) -> Tables | None:
        """Those that live on parameter servers alone."""
        ledgers = [ledger_of(optimizer) for optimizer in optimizers_of(self.model)]
        return next((ledger.tables for ledger in ledgers if ledger and ledger.tables), None)

    def _tables_left_out(self) -> contextlib.AbstractContextManager:
        """Scope in which files of weights have nothing of them."""
        tables = self._tables()
        return tables.left_out() if tables else contextlib.nullcontext()

    def _new_tables(self) -> Path | None:
        """A directory that is not there yet, for the tables of a backup; None if there are none."""
        if not self._tables():
            return None
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name.rpartition("-")[2]) for path in self._saved_tables()]
        return self.backup_dir / f"{_TABLES}{max(numbers, default=0) + 1}"

    def _saved_tables(self) -> list[Path]:
        return list(self.backup_dir.glob(f"{_TABLES}*"))

    def _remove_tables(self, but: Path | None) -> None:
        """Those of older backups, and of some that were never complete."""
        for path in self._saved_tables():
            if path != but:
                shutil.rmtree(path)
