"""Puts tables on the servers as they are made: a chief never has one.

build_model() --> layer.build --> add_weight, of one row --> a variable whose store is `Stored`
model(ids)    --> layer.call  --> take(variable, ids)    --> rows of the ids, from the servers
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.embeddings import initial
from tfqcomm.parameter_server.embeddings.reads import by_lookup
from tfqcomm.parameter_server.embeddings.stored import Stored

_POSITIONAL = ("shape", "initializer", "dtype")  # arguments of `add_weight`


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
def placing_tables(chosen: Callable, make: Callable) -> Iterator[None]:
    """Scope in which layers may be built: the tables among their weights live elsewhere.

    Args:
        chosen: layer, name and shape of a weight -> whether it is one.
        make: (shape, initializer, dtype) of a table -> its store, which also looks up rows.
    """
    later: list[Callable] = []
    whole = keras.layers.Layer.add_weight

    def add_weight(layer, *args, **kwargs):
        given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if not (_may_live_there(layer, given) and chosen(layer, given["name"], given["shape"])):
            return whole(layer, *args, **kwargs)
        shape = tuple(given["shape"])
        small = {**given, "shape": (1, shape[1]), "initializer": "zeros"}
        variable = whole(layer, **small)
        initializer = keras.initializers.get(given.get("initializer") or "glorot_uniform")

        def place():
            keep(variable, make(shape, initializer, variable.dtype))

        if _tf_private.only_shapes_matter():  # the variable has no value yet
            later.append(place)
        else:
            place()
        return variable

    keras.layers.Layer.add_weight = add_weight
    try:
        yield
        for place in later:
            place()
    finally:
        keras.layers.Layer.add_weight = whole


def on_servers(servers: Sequence[str]) -> Callable:
    """What makes tables for `placing_tables` on servers with these devices."""
    return lambda shape, initializer, dtype: initial.make(shape, initializer, servers, dtype)


def keep(variable: keras.Variable, stored: Table) -> None:
    """Lets a variable's rows be looked up elsewhere, and all of them be fetched from there."""
    _tf_private.keep_elsewhere(variable, stored, stored.shape)
    _tf_private.answer(variable, functools.partial(_read, variable, stored))


def move(variable: keras.Variable, servers: Sequence[str]) -> None:
    """Puts a table on the servers, if it is not on these already."""
    stored = _tf_private.store_of(variable)
    if isinstance(stored, Stored) and stored.devices != list(servers)[: stored.shape[0]]:
        bring_back(variable)  # from those of another trainer of the model
    if _tf_private.store_of(variable) is None:
        value = variable.numpy()
        stored = initial.make(value.shape, keras.initializers.Zeros(), servers, variable.dtype)
        stored.write(value)
        keep(variable, stored)


def bring_back(variable: keras.Variable) -> None:
    """Brings a table here that is to be trained as any other weight."""
    _tf_private.keep_here(variable)
    _tf_private.answer(variable, None)


def _may_live_there(layer: keras.layers.Layer, given: Mapping) -> bool:
    """Whether nothing depends on the whole of a weight that a layer is about to add."""
    constraint = keras.constraints.get(given.get("constraint"))
    shape = given.get("shape")
    return (
        isinstance(shape, (tuple, list))
        and len(shape) == 2
        and isinstance(given.get("name"), str)
        and layer.trainable
        and given.get("trainable", True)
        and "float" in keras.backend.standardize_dtype(given.get("dtype") or layer.variable_dtype)
        and getattr(layer, "quantization_mode", None) is None
        and given.get("regularizer") is None
        and (constraint is None or isinstance(constraint, keras.constraints.NonNeg))
    )


def _read(variable: keras.Variable, stored: Table, ids, name: str | None = None):
    """Rows of a variable on the chief."""
    if _tf_private.only_shapes_matter():
        return keras.ops.take(tf.convert_to_tensor(variable), ids, axis=0)

    def pull(unique):
        return tf.ensure_shape(stored.lookup(unique), [None, stored.shape[1]])

    return by_lookup(variable, ids, pull)
