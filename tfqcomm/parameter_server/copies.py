"""What a trainer makes of what it was given, once its process has joined the cluster."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private


def makers(values):
    """Functions that make optimizers and metrics like these; of other values they return them."""
    return tf.nest.map_structure(_maker, values)


def make(functions):
    """What the `makers` make."""
    return tf.nest.map_structure(lambda make_one: make_one(), functions)


def check_function(build_model) -> None:
    """Refuses what does not make models, such as a model."""
    if not callable(build_model) or isinstance(build_model, keras.Model):
        raise ValueError(
            "Argument `build_model` must be a function that returns a Keras model. "
            f"Received: build_model={build_model!r}"
        )


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
        return _optimizer_maker(value)
    config = told(value)
    return lambda: type(value).from_config(dict(config))


def _optimizer_maker(
    optimizer: keras.optimizers.Optimizer,
) -> Callable[[], keras.optimizers.Optimizer]:
    """A function that makes one like it, untrained, also where its variables are gone by then.

    Raises:
        ValueError: where its config does not tell all that it does.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        make = _optimizer_maker(optimizer.inner_optimizer)
        arguments = {
            name: getattr(optimizer, name)
            for name in ("name", "initial_scale", "dynamic_growth_steps")
        }
        return lambda: keras.optimizers.LossScaleOptimizer(make(), **arguments)
    config = told(optimizer)
    excluded, names = _tf_private.decay_exclusions(optimizer)
    if excluded:
        raise ValueError(
            "Variables that are excluded from weight decay must be named before the trainer makes "
            "its model: `optimizer.exclude_from_weight_decay(var_names=[...])`; or exclude them "
            "of `trainer.optimizer`, before `fit`. Received: an optimizer with `var_list`"
        )

    def make_one():
        copy = type(optimizer).from_config(dict(config))
        if names is not None:
            copy.exclude_from_weight_decay(var_names=[names])
        return copy

    return make_one


def told(value) -> dict:
    """The config of an optimizer or metric, completed where `get_config` is not complete.

    Raises:
        ValueError: naming the arguments that nothing tells.
    """
    config = value.get_config()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(type(value).__init__).parameters.values())[1:]
    untold = [p.name for p in parameters if p.kind in kinds and p.name not in config]
    attributes = vars(value) | _tf_private.function_arguments(value)
    missing = [name for name in untold if name not in attributes]
    if missing and type(value).__module__.partition(".")[0] != "keras":  # Keras knows its own
        raise ValueError(
            f"`{type(value).__name__}.get_config()` must tell all arguments of its constructor: "
            f"the trainer makes another one like it. Missing: {missing}"
        )
    return config | {name: attributes[name] for name in untold if name in attributes}
