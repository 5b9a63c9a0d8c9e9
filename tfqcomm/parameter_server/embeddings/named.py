"""Tables that a user names: weights of any layer of which a batch reads some rows only."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TypeVar

import keras

from tfqcomm import _tf_private

Layer = TypeVar("Layer", bound=keras.layers.Layer)

# By layer, and not on it: its config and what is saved of it are as ever.
_names: weakref.WeakKeyDictionary[keras.layers.Layer, list[str]] = weakref.WeakKeyDictionary()


def rows(layer: Layer, weight: str = "embeddings") -> Layer:
    """Lets a weight of a layer travel by rows, where a `Trainer` trains the layer.

    As the table of a large `keras.layers.Embedding` does, and whatever its size: see "Embeddings"
    at `Trainer`. For subclasses of it with a `call` of their own, and for any layer that reads a
    matrix by `keras.ops.take(self.table, ids, axis=0)`, `tf.gather` or `tf.nn.embedding_lookup`
    alone. What reads the whole of it is an error when the step is traced. Other trainers, and
    Keras, do not look at it; nor does a model remember it that was saved or cloned.

    Args:
        layer: built or not.
        weight: the attribute of the layer with a weight of shape [rows, d], or the weight's name.

    Returns:
        The layer.

    Raises:
        ValueError: if `layer` is no layer, or, once it is built, has no such weight.

    Example:
    >>> import tfqcomm
    >>> class Scaled(keras.layers.Embedding):
    ...     def call(self, ids):
    ...         return 0.1 * super().call(ids)
    >>> ids = keras.Input([20], dtype="int32")
    >>> vectors = tfqcomm.parameter_server.rows(Scaled(50_000, 16))(ids)
    """
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(f"Argument `layer` must be a Keras layer. Received: layer={layer!r}")
    if not isinstance(weight, str):
        raise ValueError(
            f"Argument `weight` must be the name of a weight. Received: weight={weight!r}"
        )
    if layer.built:
        _weight(layer, weight)
    names = _names.setdefault(layer, [])
    if weight not in names:
        names.append(weight)
    return layer


def is_named(layer: keras.layers.Layer, weight: str) -> bool:
    """Whether `rows` was given this weight of the layer."""
    return weight in _names.get(layer, ())


def named_tables(model: keras.Model) -> Iterator[keras.Variable]:
    """The weights of a built model that `rows` was given, each once.

    Raises:
        ValueError: if a layer has no such weight.
    """
    found = {}
    for layer in _tf_private.layers_of(model):
        for name in _names.get(layer, ()):
            variable = _weight(layer, name)
            found[id(variable)] = variable
    yield from found.values()


def _weight(layer: keras.layers.Layer, name: str) -> keras.Variable:
    """An attribute of the layer, or one of its weights by name."""
    attribute = getattr(layer, name, None)
    by_name = [variable for variable in layer.weights if variable.name == name]
    found = [attribute] if isinstance(attribute, keras.Variable) else by_name
    if len(found) == 1 and len(found[0].shape) == 2:
        return found[0]
    shapes = {v.name: tuple(v.shape) for v in layer.weights}
    raise ValueError(
        f"Argument `weight` of `rows` must name one weight of layer `{layer.name}` with the shape "
        f"[rows, d]. It has {shapes}. Received: weight={name!r}"
    )
