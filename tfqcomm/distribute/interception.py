"""Decides, for each step of each optimizer, whether the current strategy compresses it."""

from __future__ import annotations

import functools

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.distribute import automatic
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.step import distributed_step


def install() -> None:
    """Connects Keras' stock optimizers to the strategies of this package; idempotent."""
    _tf_private.intercept_stock_optimizers(find_step)
    _tf_private.agree_on_finite_gradients()
    _tf_private.remember_models()
    _tf_private.agree_before_compile()


def find_step(optimizer: keras.optimizers.Optimizer):
    """The step that replaces Keras' own, or None under any other strategy."""
    owner = _owner_of_options(tf.distribute.get_strategy())
    return None if owner is None else functools.partial(_step, owner)


def options_of(strategy: tf.distribute.Strategy) -> ExchangeOptions | None:
    """The `options` of a compressing strategy, or of its cross-device ops."""
    owner = _owner_of_options(strategy)
    return None if owner is None else owner.options


def _owner_of_options(strategy: tf.distribute.Strategy):
    for owner in (strategy, _tf_private.cross_device_ops(strategy)):
        if isinstance(getattr(owner, "options", None), ExchangeOptions):
            return owner
    return None


def _step(owner, optimizer, gradients, variables, learning_rate):
    options = automatic.options_for(owner, optimizer, gradients)
    distributed_step(optimizer, options, gradients, variables, learning_rate)
