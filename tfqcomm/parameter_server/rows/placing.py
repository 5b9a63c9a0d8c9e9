"""Puts tables on the servers as they are made: a chief never has one.

build_model() --> Embedding.build --> add_weight, of one row --> a variable whose store is `Stored`
model(ids)    --> Embedding.call  --> rows of the ids, from the servers
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.rows import initial
from tfqcomm.parameter_server.rows.ids import by_lookup
from tfqcomm.parameter_server.rows.stored import Stored


class Table(Protocol):
    """Where a table lives: a store that is also asked for some of its rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""

    def numpy(self) -> np.ndarray:
        """The whole of it."""

    def tensor(self) -> tf.Tensor:
        """Likewise, in a graph."""

    def write(self, value: np.ndarray) -> None:
        """Puts another one in its place."""

    def lookup(self, ids) -> tf.Tensor:
        """Rows of these ids: int64[n] -> float32[n, d]."""


@contextlib.contextmanager
def placing_tables(rows_from: int | None, make: Callable) -> Iterator[None]:
    """Scope in which layers may be built: their tables of `rows_from` elements live elsewhere.

    Args:
        rows_from: elements; None for no table.
        make: (shape, initializer, dtype) of a table -> its store, which also looks up rows.
    """
    if rows_from is None:
        yield
        return
    later: list[Callable] = []
    whole = keras.layers.Embedding.add_weight

    def add_weight(layer, *args, **kwargs):
        shape = tuple(kwargs.get("shape") or ())
        if kwargs.get("name") != "embeddings" or not _may_live_there(layer, shape, rows_from):
            return whole(layer, *args, **kwargs)
        small = {**kwargs, "shape": (1, *shape[1:]), "initializer": "zeros"}
        variable = whole(layer, *args, **small)
        initializer = keras.initializers.get(kwargs.get("initializer"))

        def place():
            keep(layer, variable, make(shape, initializer, variable.dtype))

        if _tf_private.only_shapes_matter():  # the variable has no value yet
            later.append(place)
        else:
            place()
        return variable

    keras.layers.Embedding.add_weight = add_weight
    try:
        yield
        for place in later:
            place()
    finally:
        del keras.layers.Embedding.add_weight


def on_servers(servers: Sequence[str]) -> Callable:
    """What makes tables for `placing_tables` on servers with these devices."""
    return lambda shape, initializer, dtype: initial.make(shape, initializer, servers, dtype)


def keep(layer: keras.layers.Embedding, variable: keras.Variable, stored: Table) -> None:
    """Lets a layer look up the rows of its table elsewhere, and its variable fetch them."""
    _tf_private.keep_elsewhere(variable, stored, stored.shape)
    vars(layer)["call"] = functools.partial(_call, layer, stored)


def move(layer: keras.layers.Embedding, servers: Sequence[str]) -> None:
    """Puts the table of a layer on the servers, if it is not on these already."""
    variable = layer.embeddings
    stored = _tf_private.store_of(variable)
    if isinstance(stored, Stored) and stored.devices != list(servers)[: layer.input_dim]:
        bring_back(layer)  # from those of another trainer of the model
    if _tf_private.store_of(variable) is None:
        value = variable.numpy()
        stored = initial.make(value.shape, keras.initializers.Zeros(), servers, variable.dtype)
        stored.write(value)
        keep(layer, variable, stored)


def bring_back(layer: keras.layers.Embedding) -> None:
    """Brings a table here that is to be trained as any other weight."""
    if _tf_private.store_of(layer.embeddings) is not None:
        _tf_private.keep_here(layer.embeddings)
        vars(layer).pop("call", None)


def is_embedding(layer: keras.layers.Layer) -> bool:
    """Whether a layer looks up as `keras.layers.Embedding` does."""
    return getattr(type(layer), "call", None) is keras.layers.Embedding.call


def _may_live_there(layer, shape, rows_from: int) -> bool:
    constraint = layer.embeddings_constraint
    return (
        is_embedding(layer)
        and shape[0] * shape[1] >= rows_from
        and layer.trainable
        and layer.quantization_mode is None
        and not layer.lora_rank
        and layer.embeddings_regularizer is None
        and isinstance(constraint, (type(None), keras.constraints.NonNeg))
    )


def _call(layer, stored: Table, inputs):
    """In place of `keras.layers.Embedding.call`, on the chief."""
    if _tf_private.only_shapes_matter():
        return type(layer).call(layer, inputs)

    def pull(ids):
        return tf.ensure_shape(stored.lookup(ids), [None, layer.output_dim])

    return by_lookup(layer, inputs, pull)
