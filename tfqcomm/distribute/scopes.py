"""Says which line to move when a model or an optimizer was made outside of `strategy.scope()`.

TensorFlow says `Need to be inside "with strategy.scope()"` or `Mixing different
tf.distribute.Strategy objects`, in the middle of the first step, and names neither.
"""

from __future__ import annotations

import keras
import tensorflow as tf

MIRRORING = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)


def check_compile(model: keras.Model, optimizer) -> None:
    """Called before `model.compile(optimizer)`.

    Raises:
        ValueError: names what was made outside, and the line to change.
    """
    strategy = _check_model(model)
    if strategy is None:
        return
    if isinstance(optimizer, keras.optimizers.Optimizer):
        _check_optimizer(model, optimizer, strategy)
    elif tf.distribute.get_strategy() is not strategy:  # only a name, or a config
        raise ValueError(
            f"The model {model.name!r} must be compiled in the scope in which it was made, for "
            "`compile` makes the optimizer: `with strategy.scope(): model.compile(...)`. "
            f"Received: optimizer={optimizer!r} outside of the scope of {_name(strategy)}"
        )


def check_fit(model: keras.Model) -> None:
    """Called before `model.fit` begins to train.

    Raises:
        ValueError: names what was made outside, and the line to change.
    """
    strategy = _check_model(model)
    if strategy is not None and model.optimizer is not None:
        _check_optimizer(model, model.optimizer, strategy)


def _check_model(model: keras.Model) -> tf.distribute.Strategy | None:
    """The strategy that mirrors the model's weights, if one is to."""
    strategy = model.distribute_strategy  # the current one, if it was made under none
    current = tf.distribute.get_strategy()
    if isinstance(current, MIRRORING) and strategy is not current:
        raise ValueError(
            f"The model {model.name!r} belongs to another strategy. Make it in the scope in which "
            "it is used: `with strategy.scope(): model = ...`. "
            f"Received: {_name(current)}, not the {_name(strategy)} it was made under"
        )
    if not isinstance(strategy, MIRRORING):
        return None
    created = strategy.extended.variable_created_in_scope
    outside = [weight.path for weight in model.weights if not created(weight.value)]
    if not outside:
        return strategy
    if len(outside) == len(model.weights):
        what, line = f"model {model.name!r} was", "model = ...; model.compile(...)"
    else:
        what, line = f"weight {outside[0]!r} of the model {model.name!r} was", "layer = ..."
    raise ValueError(
        f"The {what} made outside of `strategy.scope()`, and is not the strategy's. Make it "
        f"inside: `with strategy.scope(): {line}`. Received: {len(outside)} of {len(model.weights)}"
        f" weights from outside of the scope of {_name(strategy)}: {outside[:3]}"
    )


def _check_optimizer(model, optimizer, strategy) -> None:
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not strategy.extended.variable_created_in_scope(optimizer.iterations.value):
        raise ValueError(
            f"The optimizer {optimizer.name!r} of the model {model.name!r} was made outside of "
            f"`strategy.scope()`. Make it inside: `with strategy.scope(): optimizer = "
            f"{type(optimizer).__name__}(...)`. "
            f"Received: optimizer={optimizer.name!r} in the scope of {_name(strategy)}"
        )


def _name(strategy: tf.distribute.Strategy) -> str:
    return type(strategy).__name__
