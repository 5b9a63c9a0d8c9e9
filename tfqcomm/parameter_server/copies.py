"""What a trainer makes of what it was given, once its process has joined the cluster."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm.parameter_server import optimizers


def makers(values):
    """Functions that make optimizers and metrics like these; of other values they return them."""
    return tf.nest.map_structure(_maker, values)


def make(functions):
    """What the `makers` make."""
    return tf.nest.map_structure(lambda make_one: make_one(), functions)


def checked_model(model) -> keras.Model:
    """The model that a user's function has built.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Argument `build_model` must return a Keras model. Received: {type(model).__name__}"
        )
    if type(model).train_step is not keras.Model.train_step:
        warnings.warn(
            f"The `train_step` of {type(model).__name__} is not used on parameter servers: workers "
            "take Keras' own step. Override `compute_loss` instead.",
            stacklevel=4,
        )
    return model


def check_weights(model: keras.Model) -> None:
    """Refuses what servers cannot train as one process does.

    Raises:
        ValueError: naming it.
    """
    weights = model.trainable_variables
    if not weights:
        raise ValueError(
            "The model must have trainable weights. Received: a model whose layers are all frozen, "
            "or have none"
        )
    overwritten = [v.path for v in weights if getattr(v, "overwrite_with_gradient", False)]
    if overwritten:
        raise ValueError(
            "The model must not be quantized to float8: its scales are no gradients, and cannot be "
            f"averaged. Received: {', '.join(overwritten)}"
        )
    wide = [v.path for v in weights if v.dtype == "float64"]
    if wide:
        warnings.warn(
            f"Parameter servers hold float32, and so round the float64 weights {wide}.",
            stacklevel=4,
        )


def check_unchanged(before: Sequence, now: Sequence) -> None:
    """Refuses a later `fit` of something else.

    Raises:
        ValueError: saying what to do.
    """
    if len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True)):
        raise ValueError(
            "The optimizer and the layers to train must stay as they were in the first `fit`: to "
            "freeze layers or to compile again, make another trainer, whose `build_model` does so, "
            "and give its model these weights with `set_weights`."
        )


def _maker(value) -> Callable:
    if isinstance(value, (keras.optimizers.Optimizer, keras.metrics.Metric)):
        try:
            return _like(value)
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(
                "An optimizer that was made before the process joined its cluster cannot be used "
                "afterwards: make it together with its Trainer. Received: "
                f"{type(value).__name__}"
            ) from error
    return lambda: value


def _like(value) -> Callable:
    """Of the config alone, taken now: variables made now cannot be read later."""
    if isinstance(value, keras.optimizers.Optimizer):
        return optimizers.maker_of(value)
    config = value.get_config()
    missing = _untold(type(value), config)
    if missing:
        raise ValueError(
            f"`{type(value).__name__}.get_config()` must tell all arguments of its constructor: "
            f"the trainer makes a metric like the one it was given. Missing: {missing}"
        )
    return lambda: type(value).from_config(config)


def _untold(cls: type, config: dict) -> list[str]:
    """Arguments of the constructor that the config does not tell."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in kinds and p.name not in config]
