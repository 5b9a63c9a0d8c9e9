"""A model with tables too large for the memory of one machine, in a directory.

model.json          what `keras.models.model_from_json` reads
model.weights.h5    all weights but those of tables
tables.json         for each table its place among all weights, and its file
table-0.npy         a table: `numpy.load(..., mmap_mode="r")` reads rows of it
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import cast

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.embeddings import placing, tables
from tfqcomm.parameter_server.embeddings.stored import Stored

_MODEL, _WEIGHTS, _TABLES = "model.json", "model.weights.h5", "tables.json"


def export(model: keras.Model, path) -> None:
    """Writes a model whose tables may live on servers; never holds more than a block of them.

    Args:
        path: of a directory, which must not be there.

    Raises:
        ValueError: if there is something at `path`.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise ValueError(
            "Argument `path` must be of a directory that is not there. "
            f"Received: path={str(path)!r}"
        )
    partial = path.with_name(path.name + ".partial")
    if partial.exists():  # of an export that broke off
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    files = []
    places = {id(variable): place for place, variable in enumerate(model.weights)}
    for number, variable in enumerate(tables.elsewhere(model)):
        stored = cast(Stored, _tf_private.store_of(variable))
        file = f"table-{number}.npy"
        _write(stored, partial / file)
        files.append({"weight": places[id(variable)], "file": file, "shape": stored.shape})
    (partial / _TABLES).write_text(json.dumps(files, indent=2))
    config = json.loads(model.to_json())
    config.pop("compile_config", None)  # of an optimizer, which would have whole slots
    (partial / _MODEL).write_text(json.dumps(config))
    optimizer = getattr(model, "optimizer", None)
    slots = optimizer.variables if optimizer else []
    with _tf_private.left_out([*model.weights, *slots]):
        model.save_weights(partial / _WEIGHTS)
    os.replace(partial, path)


def load_export(path, custom_objects: Mapping | None = None) -> keras.Model:
    """The model of a directory that `Trainer.export` has written, for `predict` and `evaluate`.

    Its tables stay in their files: a layer reads the rows of its batch, and who reads the whole of
    a variable has it in memory. They cannot be trained or assigned.

    Args:
        path: of the directory.
        custom_objects: as of `keras.models.load_model`.
    """
    path = pathlib.Path(path)
    found = json.loads((path / _TABLES).read_text())
    shapes = [tuple(one["shape"]) for one in found]

    def chosen(layer, name, shape):
        return tuple(shape) in shapes

    with placing.placing_tables(chosen, lambda shape, initializer, dtype: _Absent(shape)):
        text = (path / _MODEL).read_text()
        model = keras.models.model_from_json(text, custom_objects=dict(custom_objects or {}))
    for one in found:
        placing.keep(model.weights[one["weight"]], _Mapped(path / one["file"]))
    for variable in tables.elsewhere(model):  # others of that shape, which are among the weights
        if isinstance(_tf_private.store_of(variable), _Absent):
            placing.bring_back(variable)
    with _tf_private.left_out(model.weights):
        model.load_weights(path / _WEIGHTS)
    tables.refuse_what_needs_tables(model)
    return model


def _write(stored: Stored, file: pathlib.Path) -> None:
    """As `numpy.save`, block by block."""
    with open(file, "wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": stored.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for _, _, block in stored.fetched():
            stream.write(np.ascontiguousarray(block, "<f4").tobytes())


class _Mapped:
    """A table in a file.

    Args:
        file: that `numpy.load` reads.
    """

    def __init__(self, file: pathlib.Path):
        self._rows = np.load(file, mmap_mode="r")

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""
        return self._rows.shape

    def numpy(self) -> np.ndarray:
        """The whole of it."""
        return np.array(self._rows)

    def tensor(self) -> tf.Tensor:
        """Likewise, in a graph."""
        return tf.ensure_shape(tf.numpy_function(self.numpy, [], tf.float32), self.shape)

    def lookup(self, ids) -> tf.Tensor:
        """Rows of these ids: int64[n] -> float32[n, d]."""
        rows = tf.numpy_function(lambda places: self._rows[places], [ids], tf.float32)
        return tf.ensure_shape(rows, [None, self.shape[1]])

    def write(self, value: np.ndarray) -> None:
        """Refuses to."""
        raise ValueError("A table that was exported into a file of its own cannot be assigned.")


class _Absent(_Mapped):
    """A table of zeros that takes no memory, until it is known where it is.

    Args:
        shape: of the table.
    """

    def __init__(self, shape: tuple[int, int]):
        self._rows = np.broadcast_to(np.float32(0), shape)
