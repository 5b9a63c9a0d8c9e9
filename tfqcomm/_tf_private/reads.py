"""Who answers when rows of a variable are asked for, of which there may be no whole.

tf.gather(variable, ids)                  asks it for `sparse_read`, as it does a `tf.Variable`
keras.ops.take(variable, ids, axis=0)     would read the whole first: ours takes its place
tf.nn.embedding_lookup(variable, ids)     likewise, by TensorFlow's dispatch by types
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf
from keras.src import backend
from tensorflow.python.util import dispatch

from tfqcomm._tf_private.hooks import is_wrapped, wrap


def answer(variable: keras.Variable, reader: Callable | None) -> Callable | None:
    """Lets `reader` answer for a variable; None: it answers itself, as a whole.

    Args:
        variable: of any rank; ids count along its first axis.
        reader: ids and, perhaps, a name -> rows, in the dtype that a layer's call sees.

    Returns:
        Who did so before.
    """
    _install()
    before = _reader(variable)
    vars(variable).pop("sparse_read", None)
    if reader is not None:
        vars(variable)["sparse_read"] = reader
    return before


@contextlib.contextmanager
def answering(variable: keras.Variable, reader: Callable) -> Iterator[None]:
    """Scope in which `reader` does."""
    before = answer(variable, reader)
    try:
        yield
    finally:
        answer(variable, before)


def autocast(variable: keras.Variable, value):
    """A value of the variable's dtype as the layer sees it that is being called."""
    return variable._maybe_autocast(value)


def _reader(params) -> Callable | None:
    return vars(params).get("sparse_read") if isinstance(params, keras.Variable) else None


def _install() -> None:
    if is_wrapped(backend.numpy.take):
        return
    wrap(backend.numpy, "take", _take)
    dispatch.register_dispatchable_type(keras.Variable)  # which TensorFlow knows of its own types
    tf.experimental.dispatch_for_api(tf.nn.embedding_lookup, {"params": keras.Variable})(_lookup)


def _take(whole, x, indices, axis=None):
    """In place of `keras.ops.take`."""
    reader = _reader(x) if axis == 0 else None
    return whole(x, indices, axis) if reader is None else reader(indices)


def _lookup(params, ids, max_norm=None, name=None):
    """In place of `tf.nn.embedding_lookup`, of variables."""
    reader = _reader(params) if max_norm is None else None
    return NotImplemented if reader is None else reader(ids, name)
