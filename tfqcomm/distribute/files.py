"""Keeps the workers of a cluster from writing the same file at the same time.

People give all workers the same `ModelCheckpoint("model.keras")`, where TensorFlow's tutorial has
another directory for each worker but the chief. Both are right here. Of the workers that name the
same path, the first one (in most cases the chief) writes there, as if it were alone, and the others

    ModelCheckpoint     decide as it does what is best, and save nothing;
    BackupAndRestore    save nothing, and resume from what it resumes from;
    CSVLogger           write to a directory that is removed at the end of `fit`;
    TensorBoard         write to `worker_1`, `worker_2` and so on in the directory of its logs.

A path that no earlier worker names is left alone. Whatever the paths are, all workers resume from
the chief's backup: one that was lost, or is an epoch behind on one of them, would split the run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport

_PATH_OF = {  # the attribute of each of Keras' callbacks that says where it writes
    keras.callbacks.ModelCheckpoint: "filepath",
    keras.callbacks.CSVLogger: "filename",
    keras.callbacks.TensorBoard: "log_dir",
    keras.callbacks.BackupAndRestore: "backup_dir",
}

Files = dict[str, bytes]  # of a backup, by name


@contextlib.contextmanager
def one_writer_per_path(
    callbacks: Sequence[keras.callbacks.Callback], transport: Transport
) -> Iterator[None]:
    """Scope of a `fit` in which no two workers write the same file; a collective at its start.

    Callbacks that a user wrote are not known here, unless they derive from one of Keras' four.
    When the scope ends, the callbacks are as they were before.

    Raises:
        ValueError: on all workers, if some would resume from a backup and others would not.
    """
    if transport.processes == 1:
        yield
        return
    writers = [callback for callback in callbacks if _kind(callback)]
    with _tf_private.doing("where the callbacks of fit write"):
        claims = _claims_of_all(writers, transport)
        backups = _agreed_backups(writers, claims, transport)
    taken = _names_in(claims[: transport.process])
    wanted = _names_in(claims[transport.process + 1 :])
    with contextlib.ExitStack() as undo:
        for callback, files in backups:
            undo.enter_context(_restoring_from(callback, files))
        for callback in writers:
            names = _names(_path(callback))
            if taken.intersection(names):
                undo.enter_context(_writing_elsewhere(callback, transport.process))
            elif wanted.intersection(names):
                _say_once(_kind(callback), _path(callback))
        yield


# ------------------------------------------------------------------------------------- who writes


def _kind(callback: keras.callbacks.Callback) -> type | None:
    return next((kind for kind in _PATH_OF if isinstance(callback, kind)), None)


def _path(callback: keras.callbacks.Callback) -> str:
    return os.fspath(getattr(callback, _PATH_OF[_kind(callback)]))


def _names(path: str) -> list[str]:
    """What `path` may be called elsewhere: as it is written, and without symbolic links."""
    if "://" in path:
        return [path]
    return sorted({os.path.abspath(path), os.path.realpath(path)})


Claim = list[tuple[str, list[str]]]  # of a worker: the kind of each callback, the names of its path


def _claims_of_all(writers, transport) -> list[Claim]:
    kinds = [(kind, callback) for callback in writers if (kind := _kind(callback))]
    mine = [(kind.__name__, _names(_path(callback))) for kind, callback in kinds]
    return [json.loads(data) for data in _gather(transport, json.dumps(mine).encode())]


def _names_in(claims: list[Claim]) -> set[str]:
    return {name for claim in claims for _, names in claim for name in names}


@functools.cache
def _say_once(kind: type, path: str) -> None:
    logging.warning(
        "%s: several workers were given the path %s. This one alone writes there; the others %s",
        kind.__name__,
        path,
        "write to worker_1, worker_2, ... in it."
        if kind is keras.callbacks.TensorBoard
        else "keep no files.",
    )


def _gather(transport: Transport, data: bytes) -> list[bytes]:
    """Every worker's `data`, in rank order, eagerly; a sum in which each has its own row."""
    lengths = np.zeros([transport.processes], "float32")
    lengths[transport.process] = len(data)
    lengths = transport.add_up({"lengths": lengths})["lengths"].astype(int)
    rows = np.zeros([transport.processes, lengths.max()], "float32")
    rows[transport.process, : len(data)] = np.frombuffer(data, np.uint8)
    rows = transport.add_up({"rows": rows})["rows"].astype(np.uint8)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


# ---------------------------------------------------------------------------- where others write


@contextlib.contextmanager
def _writing_elsewhere(callback, process: int) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        if isinstance(callback, keras.callbacks.TensorBoard):
            place = os.path.join(_path(callback), f"worker_{process}")
            undo.enter_context(_moved(callback, place))
        else:
            directory = undo.enter_context(tempfile.TemporaryDirectory())
            name = os.path.basename(_path(callback)) or "files"
            undo.enter_context(_moved(callback, os.path.join(directory, name)))
        if isinstance(
            callback, (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)
        ):
            hooks = {name: getattr(callback, name) for name in dir(callback) if name[:3] == "on_"}
            silent = {name: _without_saving(callback, hook) for name, hook in hooks.items()}
            # `verbose` announces what is saved.
            undo.enter_context(_replaced(callback, verbose=0, **silent))
        yield


def _without_saving(callback, hook: Callable) -> Callable:
    """The hook, in which its model's `save` and its kin do nothing: subclasses call them, too."""

    @functools.wraps(hook)
    def silent(*args, **kwargs):
        with _replaced(callback.model, save=_nothing, save_weights=_nothing, export=_nothing):
            return hook(*args, **kwargs)

    return silent


def _nothing(*args, **kwargs) -> None:
    pass


@contextlib.contextmanager
def _moved(callback, place: str) -> Iterator[None]:
    """Gives the callback another path, and what it has derived from its path."""
    attribute = _PATH_OF[_kind(callback)]
    original, root = getattr(callback, attribute), _path(callback)
    _move(callback, root, place)
    setattr(callback, attribute, place)
    try:
        yield
    finally:
        _move(callback, place, root)
        setattr(callback, attribute, original)


def _move(callback, root: str, place: str) -> None:
    below = os.path.join(root, "")
    for name, value in list(vars(callback).items()):
        if isinstance(value, str) and value.startswith(below):
            setattr(callback, name, os.path.join(place, value[len(below) :]))
        elif value == root and os.path.dirname(root):  # a bare word may be some other option's
            setattr(callback, name, place)


@contextlib.contextmanager
def _replaced(owner, **values) -> Iterator[None]:
    """Gives an object other attributes for a while; those of its class show again afterwards."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        for name, value in before.items():
            setattr(owner, name, value)


# ---------------------------------------------------------------------------------------- backups


def _agreed_backups(writers, claims, transport) -> list[tuple[keras.callbacks.Callback, Files]]:
    """What each `BackupAndRestore` of this worker restores; nothing to be done on the chief."""
    mine = [c for c in writers if isinstance(c, keras.callbacks.BackupAndRestore)]
    if not any(kind == "BackupAndRestore" for claim in claims for kind, _ in claim):
        return []
    unreadable = None
    try:
        found = [_files_of(callback) for callback in mine]
    except (OSError, tf.errors.OpError) as error:
        found, unreadable = [], f"an error, {type(error).__name__}: {error}"
    of_chief = _unpack(transport.share_bytes(_pack(found)))
    found = of_chief[: len(mine)] + found[len(of_chief) :]
    _check_all_resume_alike(unreadable or _describe(found), transport)
    return list(zip(mine, found, strict=True)) if transport.process else []


def _files_of(backup: keras.callbacks.BackupAndRestore) -> Files:
    """The files in which Keras' callback keeps weights and epoch, and their predecessors."""
    root = os.path.join(_path(backup), "")
    paths = [v for v in vars(backup).values() if isinstance(v, str) and v.startswith(root)]
    files = {}
    for path in paths:
        if path != root and tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path, "rb") as file:
                files[path[len(root) :]] = file.read()
    return files


def _pack(backups: list[Files]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.comment = str(len(backups)).encode()
        for index, files in enumerate(backups):
            for name, data in files.items():
                writer.writestr(f"{index}/{name}", data)
    return archive.getvalue()


def _unpack(archive: bytes) -> list[Files]:
    with zipfile.ZipFile(io.BytesIO(archive)) as reader:
        backups: list[Files] = [{} for _ in range(int(reader.comment))]
        for path in reader.namelist():
            index, name = path.split("/", 1)
            backups[int(index)][name] = reader.read(path)
    return backups


def _describe(backups: list[Files]) -> str:
    """What a run resumes from, in the words of the last backup that says anything."""
    for files in reversed(backups):
        if files:
            return files.get("training_metadata.json", b"weights without an epoch").decode()
    return "no backup"


def _check_all_resume_alike(mine: str, transport) -> None:
    received = [data.decode() for data in _gather(transport, mine.encode())]
    if len(set(received)) > 1:
        lines = "\n".join(f"  worker {rank}: {text}" for rank, text in enumerate(received))
        raise ValueError(
            "All workers must resume from the same backup. Give each of them a "
            "`keras.callbacks.BackupAndRestore`, in the same order: they get the files of the "
            f"chief's, which must be able to read them. Received:\n{lines}"
        )


@contextlib.contextmanager
def _restoring_from(callback, files: Files) -> Iterator[None]:
    """Lets `on_train_begin` find `files` in place of the callback's own."""
    restore = callback.on_train_begin

    def on_train_begin(logs=None):
        with tempfile.TemporaryDirectory() as directory:
            for name, data in files.items():
                pathlib.Path(directory, name).write_bytes(data)
            files.clear()  # the whole model, which would stay in memory until `fit` ends
            with _moved(callback, directory):
                restore(logs)

    with _replaced(callback, on_train_begin=on_train_begin):
        yield
