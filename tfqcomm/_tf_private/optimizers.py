"""Keras' optimizers: where the exchange and the update of a step are taken over."""

from __future__ import annotations

import functools
from collections.abc import Callable

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.optimizer import TFOptimizer

from tfqcomm._tf_private.hooks import is_wrapped, wrap


class OptimizerSeam(keras.optimizers.Optimizer):
    """A Keras optimizer whose step is its own, from local gradients to weights.

    Keras' `apply` unscales and filters the local gradients, then calls the private methods below;
    a subclass gets one public method, `distributed_step`, for all of them.
    """

    def distributed_step(self, gradients, variables, learning_rate):
        """Exchanges the local `gradients`, and takes the whole of the step (abstract).

        That is weight decay, `update_step`, moving averages and constraints: `update_variables`.
        """
        raise TypeError(f"{type(self).__name__} must define `distributed_step`")

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self.gradient_accumulation_steps:
            super()._backend_apply_gradients(grads, trainable_variables)  # gathers, now and then:
        else:
            _take_step(self, self.distributed_step, grads, trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.distributed_step(grads, trainable_variables, learning_rate)

    def _apply_weight_decay(self, variables):
        pass  # part of the step, which may be skipped as a whole

    def decay_step(self, variable, learning_rate):
        """Keras' decoupled weight decay of one variable, before its `update_step`."""
        rate = tf.cast(learning_rate, variable.dtype) * tf.cast(self.weight_decay, variable.dtype)
        variable.assign_sub(variable * rate)


Step = Callable[[keras.optimizers.Optimizer, list, list, tf.Tensor], None]
_find_step: Callable[[keras.optimizers.Optimizer], Step | None] | None = None


def intercept_stock_optimizers(find_step: Callable[[keras.optimizers.Optimizer], Step | None]):
    """Lets `find_step(optimizer)` take over the exchange and update of Keras' own optimizers.

    TensorFlow's seam, `CrossDeviceOps.batch_reduce`, sees nameless tensors: not whose gradients
    they are, nor that they are gradients at all, and it cannot skip the update that follows. The
    method wrapped here knows all three, and comes before anything of an optimizer changes. Where
    `find_step` answers None, Keras' code runs.
    """
    global _find_step
    if _find_step is None:
        wrap(TFOptimizer, "_backend_apply_gradients", _apply_unless_intercepted)
    _find_step = find_step
    allow_updates_by_others()


def allow_updates_by_others() -> None:
    """Lets `update_variables` take the step of one of Keras' own optimizers; idempotent."""
    if not is_wrapped(TFOptimizer._backend_update_step):
        wrap(TFOptimizer, "_backend_update_step", _update_also_in_cross_replica_context)


def _apply_unless_intercepted(original, optimizer, grads, trainable_variables):
    step = None if isinstance(optimizer, OptimizerSeam) else _find_step(optimizer)
    if step is None:
        original(optimizer, grads, trainable_variables)
    else:
        _take_step(optimizer, functools.partial(step, optimizer), grads, trainable_variables)


def _take_step(optimizer, step, grads, trainable_variables):
    step(optimizer._clip_gradients(grads), list(trainable_variables), optimizer.learning_rate)
    # Keras' `apply` will go through this list, its own, once more, for constraints. They are part
    # of the step, and a step that was skipped changes nothing.
    trainable_variables.clear()


def _update_also_in_cross_replica_context(original, optimizer, grads, variables, learning_rate):
    if tf.distribute.in_cross_replica_context():  # in the middle of `update_variables`
        _update_each(optimizer, tf.distribute.get_strategy(), variables, grads, learning_rate)
    else:
        original(optimizer, grads, variables, learning_rate)


def update_variables(optimizer, strategy, variables, gradients, learning_rate) -> None:
    """All that changes in one step of `optimizer`, each variable where it lives.

    Weight decay, `update_step`, moving averages, constraints: in Keras' order, and nothing else
    of a step may change anything, or one that is skipped would.

    Args:
        variables: `tf.Variable`s, mirrored or not.
        gradients: one tensor for each, the same on all replicas; or each replica's own, with which
            it updates its own copies.
    """
    for variable in variables:
        _decay(optimizer, strategy, variable, learning_rate)
    if isinstance(optimizer, OptimizerSeam):
        _update_each(optimizer, strategy, variables, gradients, learning_rate)
    else:  # Nadam multiplies its momenta here, once for all variables
        optimizer._backend_update_step(gradients, variables, learning_rate)
    finish_step(optimizer, strategy, variables)


def _update_each(optimizer, strategy, variables, gradients, learning_rate):
    for variable, gradient in zip(variables, gradients, strict=True):
        strategy.extended.update(
            variable,
            lambda v, g, lr: optimizer.update_step(g, v, lr),
            args=(gradient, learning_rate),
            group=False,
        )


def _decay(optimizer, strategy, variable, learning_rate):
    method = type(optimizer)._apply_weight_decay
    if method not in (TFOptimizer._apply_weight_decay, OptimizerSeam._apply_weight_decay):
        known = optimizer._trainable_variables[variable_index(optimizer, variable)]

        def step(local, rate):  # Muon has a method of its own; here it sees the local copy alone
            optimizer._apply_weight_decay([known])

    elif decays(optimizer, variable):
        keras_own = functools.partial(OptimizerSeam.decay_step, optimizer)
        step = getattr(optimizer, "decay_step", keras_own)
    else:
        return
    strategy.extended.update(variable, step, args=(learning_rate,), group=False)


def finish_step(optimizer, strategy, variables) -> None:
    """What Keras' `apply` does once `variables` are updated: moving averages, constraints."""
    if optimizer.gradient_accumulation_steps:
        return  # Keras does it itself, after every batch it gathers
    if optimizer.use_ema:
        _average_weights(optimizer, strategy)
    for variable in variables:
        known = optimizer._trainable_variables[variable_index(optimizer, variable)]
        constraint = getattr(known, "constraint", None)
        if constraint is not None:
            strategy.extended.update(
                variable,
                lambda v, constraint=constraint: v.assign(constraint(tf.convert_to_tensor(v))),
                group=False,
            )


def _average_weights(optimizer, strategy):
    """`use_ema`; every replica averages its own copies, so that nothing is sent."""
    known, averages = optimizer._trainable_variables, optimizer._model_variables_moving_average
    steps, every = optimizer.iterations, optimizer.ema_overwrite_frequency

    def update(average, value):
        momentum = tf.cast(tf.not_equal(steps, 0), value.dtype) * optimizer.ema_momentum
        average.assign(momentum * average + (1 - momentum) * value)

    for variable, average in zip(map(_value, known), averages, strict=True):
        if average is not None:
            strategy.extended.update(_value(average), update, args=(variable,), group=False)

    def overwrite():
        optimizer._overwrite_model_variables_with_average_value(known)
        return tf.constant(True)

    if every:
        tf.cond(tf.equal((steps + 1) % every, 0), overwrite, lambda: tf.constant(False))


def _value(variable) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def decays(optimizer, variable) -> bool:
    """Whether the optimizer's weight decay acts on `variable`."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(variable)


def variable_index(optimizer, variable) -> int:
    """The position of `variable` among those the optimizer was built for."""
    return optimizer._get_variable_index(variable)


def agree_on_finite_gradients() -> None:
    """Makes Keras' optimizers of optimizers skip a step as one.

    `LossScaleOptimizer` asks the first local replica alone whether gradients are finite: an inf on
    another is applied, and two processes that see different answers wait for each other for ever.
    The parts of a `MultiOptimizer` know their own gradients alone, and some would take a step that
    the others skip.
    """
    if not is_wrapped(keras.optimizers.LossScaleOptimizer.check_finite):
        wrap(keras.optimizers.LossScaleOptimizer, "check_finite", _agreed_check_finite)
    several = getattr(keras.optimizers, "MultiOptimizer", None)  # Keras 3.10 has none
    if several is not None and not is_wrapped(several.apply):
        wrap(several, "apply", _apply_all_or_none)


def _agreed_check_finite(original, optimizer, grads):
    finite = original(optimizer, grads)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return finite
    failures = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.float32))
    return tf.equal(failures, 0.0)


def _apply_all_or_none(original, optimizer, grads, trainable_variables=None):
    parts = optimizer.optimizers
    if not any(isinstance(o, OptimizerSeam) or (_find_step and _find_step(o)) for o in parts):
        return original(optimizer, grads, trainable_variables)
    finite = [tf.reduce_all(tf.math.is_finite(_numbers(g))) for g in grads if g is not None]
    if any(g is not None for g in grads):
        poison = tf.where(tf.reduce_all(finite), 0.0, float("nan"))  # one for all
        grads = [g if g is None else _plus(g, poison) for g in grads]
    before = [tf.identity(o.iterations.value) for o in parts]
    original(optimizer, grads, trainable_variables)
    moved = [tf.not_equal(o.iterations, was) for o, was in zip(parts, before, strict=True)]
    skipped = tf.cast(~tf.reduce_any(moved), optimizer.iterations.dtype)
    optimizer.iterations.assign_sub(skipped)


def _numbers(gradient):
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _plus(gradient, number):
    number = tf.cast(number, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values + number, gradient.indices, gradient.dense_shape)
    return gradient + number


def pass_losses_on() -> None:
    """Shows the loss to the optimizer inside a `LossScaleOptimizer`: Keras asks the outer alone."""
    if not is_wrapped(keras.optimizers.LossScaleOptimizer.scale_loss):
        wrap(keras.optimizers.LossScaleOptimizer, "scale_loss", _observed_scale_loss)


def _observed_scale_loss(original, optimizer, loss):
    observe = getattr(optimizer.inner_optimizer, "observe_loss", None)
    if observe is not None:
        observe(loss)
    return original(optimizer, loss)
