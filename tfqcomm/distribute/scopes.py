"""Says which of a model's parts were made outside the strategy's scope.

TensorFlow finds out in the middle of the first step: "Mixing different tf.distribute.Strategy
objects", or "Need to be inside `with strategy.scope()`", whatever was made where. A model of which
all was made outside it does not see at all: every worker trains one of its own.
"""

from __future__ import annotations

import weakref

import keras
import tensorflow as tf
from absl import logging

from tfqcomm._tf_private import optimizers_of

_strategies: weakref.WeakSet = weakref.WeakSet()  # those whose scope models belong in


def expect_models_of(strategy: tf.distribute.Strategy) -> None:
    """From now on models are expected to be made in the scope of `strategy`."""
    _strategies.add(strategy)


def check_scope(model: keras.Model) -> None:
    """Called by `fit` before anything is traced.

    Raises:
        ValueError: if some of the model, its optimizer and its metrics were made in the scope of
            such a strategy, and others were not.
    """
    if not _strategies:
        return
    made = {name: _strategy_of(variables) for name, variables in _parts(model).items()}
    if tf.distribute.has_strategy():
        made["this call of `fit`"] = tf.distribute.get_strategy()
    if len(set(map(id, made.values()))) == 1:
        if None in made.values() and any(s.num_replicas_in_sync > 1 for s in _strategies):
            _warn_of_a_model_of_its_own(model.name)
        return
    if _strategies.isdisjoint(filter(None, made.values())):
        return  # other strategies, which have rules of their own
    lines = "\n".join(f"  {name}: {_describe(strategy)}" for name, strategy in made.items())
    raise ValueError(
        "A model, its optimizer and its metrics must be made in one `strategy.scope()`. Put the "
        "lines that make them, `compile` among them, in `with strategy.scope():`, and call `fit` "
        f"after it. Received:\n{lines}"
    )


def _parts(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """What has to be made in the scope, as far as it has variables yet."""
    parts = {f"the weights of model {model.name!r}": model.trainable_variables}
    for optimizer in optimizers_of(model):
        parts[f"optimizer {optimizer.name!r}"] = optimizer.variables
    for metric in model.metrics:
        parts[f"metric {metric.name!r}"] = metric.variables
    return {name: variables for name, variables in parts.items() if variables}


def _strategy_of(variables: list[keras.Variable]) -> tf.distribute.Strategy | None:
    """That of the first; Keras may make others later, where they belong."""
    value = variables[0].value
    return value.distribute_strategy if isinstance(value, tf.distribute.DistributedValues) else None


def _describe(strategy: tf.distribute.Strategy | None) -> str:
    if strategy is None:
        return "outside any scope"
    return f"in the scope of {type(strategy).__name__} at {id(strategy):#x}"


def _warn_of_a_model_of_its_own(name: str) -> None:
    logging.log_first_n(
        logging.WARNING,
        "Model %r was made outside `strategy.scope()`, so this worker trains it alone. If all are "
        "to train one model, make and compile it in `with strategy.scope():`.",
        1,
        name,
    )
