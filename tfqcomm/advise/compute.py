"""What a step of a model takes without any exchange, and gradients as it makes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import keras
import tensorflow as tf

from tfqcomm.costs.prediction import Compute
from tfqcomm.costs.timing import best_seconds


@dataclasses.dataclass(frozen=True)
class Step:
    """A model, ready to train on one batch.

    Attributes:
        model: it has an optimizer; its state is as before once `measure` has returned.
        x, y: the batch; `y` is None for a loss that needs none.
    """

    model: keras.Model
    x: object
    y: object = None


def prepare(model: keras.Model, x=None, y=None, batch_size: int = 32) -> Step:
    """Builds what is missing of a model, and makes up what is missing of a batch.

    Args:
        model: compiled or not. One that is not has `SGD(momentum=0.9)`.
        x: examples, or a `tf.data.Dataset` of batches (x, y); None for zeros and noise in the
            shape of the model's inputs.
        y: labels; without them, or without a compiled loss, the mean square of the outputs stands
            in for the loss.
        batch_size: examples per worker; of a data set its own counts.

    Raises:
        ValueError: for a model of unknown input shape and no examples.
    """
    if isinstance(x, tf.data.Dataset):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(next(iter(x)))
    elif x is not None:
        x, y = _first(x, batch_size), _first(y, batch_size)
    else:
        x, y = _made_up(model, batch_size), None
    x = tf.nest.map_structure(tf.convert_to_tensor, x)
    y = None if y is None else tf.nest.map_structure(tf.convert_to_tensor, y)
    model(x, training=False)  # makes the weights of one that was not built
    if not model.compiled:
        model.compile(keras.optimizers.SGD(0.0, momentum=0.9))
    if model.loss is None:
        y = None
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return Step(model, x, y)


def _first(data, count: int):
    return None if data is None else tf.nest.map_structure(lambda leaf: leaf[:count], data)


def _made_up(model: keras.Model, batch_size: int):
    """Noise for inputs of floats, zeros for others."""
    if not getattr(model, "inputs", None):
        raise ValueError(
            "Argument `x` must be given for a model whose inputs are not known before it is "
            f"called: examples, or a data set. Received: x=None, model={model.name!r}"
        )
    leaves = []
    for leaf in model.inputs:
        if None in leaf.shape[1:]:
            raise ValueError(
                "Argument `x` must be given for a model with inputs of unknown size. "
                f"Received: x=None, input {leaf.name!r} of shape {leaf.shape}"
            )
        shape, dtype = [batch_size, *leaf.shape[1:]], tf.as_dtype(leaf.dtype)
        leaves.append(
            tf.random.stateless_normal(shape, [0, 0], dtype=dtype)
            if dtype.is_floating
            else tf.zeros(shape, dtype)
        )
    return leaves[0] if len(leaves) == 1 else leaves


def measure(step: Step, seconds: float) -> tuple[Compute, list[tf.Tensor | tf.IndexedSlices]]:
    """Times a step's parts, and computes its gradients.

    Args:
        seconds: for how long each of three parts is repeated, at about.

    Returns:
        The times, and the gradient of each trainable variable that has one.
    """
    model = step.model
    kept = [*model.variables, *model.optimizer.variables]
    values = [tf.identity(variable.value) for variable in kept]

    forward = _compiled(functools.partial(_loss, step))
    gradients = _compiled(functools.partial(_gradients, step))
    whole = _compiled(functools.partial(_train, step))
    found = [g for g in gradients() if g is not None]  # of the weights as they are now
    to_loss = best_seconds(forward, seconds)
    to_gradients = max(to_loss, best_seconds(gradients, seconds))
    to_end = max(to_gradients, best_seconds(whole, seconds))

    for variable, value in zip(kept, values, strict=True):
        variable.assign(value)
    return Compute(to_loss, to_gradients - to_loss, to_end - to_gradients), found


def _compiled(function: Callable) -> Callable:
    return tf.function(function, autograph=False).get_concrete_function()


def _loss(step: Step) -> tf.Tensor:
    outputs = step.model(step.x, training=True)
    if step.y is not None:
        loss = step.model.compute_loss(x=step.x, y=step.y, y_pred=outputs, training=True)
    else:
        squares = [tf.reduce_mean(tf.square(o)) for o in tf.nest.flatten(outputs)]
        loss = tf.add_n([tf.cast(s, tf.float32) for s in squares])
    return step.model.optimizer.scale_loss(loss)


def _gradients(step: Step) -> list:
    with tf.GradientTape() as tape:
        loss = _loss(step)
    variables = [v.value for v in step.model.trainable_variables]
    return tape.gradient(loss, variables)


def _train(step: Step) -> None:
    pairs = zip(_gradients(step), step.model.trainable_variables, strict=True)
    step.model.optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])
