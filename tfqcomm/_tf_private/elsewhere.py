"""A variable whose value is kept elsewhere: read when somebody asks, and not held here."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common.stateless_scope import in_stateless_scope

_numbers = itertools.count()


class Store(Protocol):
    """Where a value is kept."""

    def numpy(self) -> np.ndarray:
        """The whole value."""

    def tensor(self) -> tf.Tensor:
        """Likewise; in a graph what it is whenever the graph runs."""

    def write(self, value: np.ndarray) -> None:
        """Puts another one in its place."""


class ValueElsewhere:
    """In the place of the `tf.Variable` of a Keras variable.

    Args:
        store: of the value.
        shape, dtype: of the value.

    Attributes:
        left_out: whether to seem to have no rows, when all weights are saved or loaded.
    """

    def __init__(self, store: Store, shape: Sequence[int], dtype: str):
        self.store = store
        self.left_out = False
        self.shape = tf.TensorShape(shape)
        self.dtype = tf.as_dtype(dtype)
        self.device = tf.constant(0).device  # optimizers make slots beside it
        self._unique_id = f"elsewhere_{next(_numbers)}"  # by which optimizers know variables

    def numpy(self) -> np.ndarray:
        """The value as of now."""
        if self.left_out:
            return np.zeros([0, *self.shape[1:]], self.dtype.as_numpy_dtype)
        return self.store.numpy().astype(self.dtype.as_numpy_dtype, copy=False)

    def read_value(self) -> tf.Tensor:
        """The value as of now; where only shapes are looked for, zeros."""
        if in_stateless_scope():
            return tf.zeros(self.shape, self.dtype)
        if tf.executing_eagerly():
            return tf.convert_to_tensor(self.numpy())
        return tf.cast(self.store.tensor(), self.dtype)

    def assign(self, value) -> None:
        """Puts another one in its place.

        Raises:
            ValueError: in a graph, which cannot.
        """
        if not tf.executing_eagerly():
            raise ValueError("A variable whose value is kept elsewhere is assigned eagerly only.")
        if not self.left_out:
            self.store.write(np.asarray(value))

    def __array__(self, dtype=None, copy=None):
        value = self.numpy()
        return value if dtype is None else value.astype(dtype)

    def __tf_tensor__(self, dtype=None, name=None):
        return tf.convert_to_tensor(self.read_value(), dtype=dtype, name=name)

    def __getattr__(self, name):
        """What else a tensor can do, such as to be sliced."""
        internal = name.startswith("_") and not name.startswith("__")
        if internal or name in ("handle", "store", "left_out"):  # asked for to tell kinds apart
            raise AttributeError(name)
        return getattr(self.read_value(), name)


def keep_elsewhere(variable: keras.Variable, store: Store, shape: Sequence[int]) -> None:
    """Lets go of a variable's value: from now on it is that of `store`, of this shape."""
    variable._value = ValueElsewhere(store, shape, variable.dtype)
    variable._shape = tuple(shape)


def keep_here(variable: keras.Variable) -> None:
    """Makes a variable one like others, with the value that it had elsewhere."""
    variable._initialize(variable._value.numpy())


def store_of(variable: keras.Variable) -> Store | None:
    """Where its value is kept, if that is elsewhere."""
    value = variable._value
    return value.store if isinstance(value, ValueElsewhere) else None


def only_shapes_matter() -> bool:
    """Whether Keras only asks for the shapes of what a layer returns: nothing is computed."""
    return in_stateless_scope()


def as_one_row(variables: Sequence[keras.Variable]) -> contextlib.AbstractContextManager:
    """Scope in which these seem to have one row: an optimizer makes slots of one row of them."""
    return _with_rows(1, variables)


@contextlib.contextmanager
def left_out(variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Scope in which no value that is kept elsewhere is read or written, as if it had no rows."""
    apart = [variable for variable in variables if store_of(variable) is not None]
    for variable in apart:
        variable._value.left_out = True
    try:
        with _with_rows(0, apart):
            yield
    finally:
        for variable in apart:
            variable._value.left_out = False


@contextlib.contextmanager
def _with_rows(rows: int, variables: Sequence[keras.Variable]) -> Iterator[None]:
    before = [variable._shape for variable in variables]
    for variable, shape in zip(variables, before, strict=True):
        variable._shape = (rows, *shape[1:])
    try:
        yield
    finally:
        for variable, shape in zip(variables, before, strict=True):
            variable._shape = shape
