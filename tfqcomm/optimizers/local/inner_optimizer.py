"""Any optimizer of Keras inside another: each replica updates its own copies with its own state.

Under a strategy an optimizer's slots are mirrored: each replica has copies. Keras keeps them equal
by giving all the same gradients; given each its own, the copies are each replica's own state.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.state.ledger import Ledger
from tfqcomm.state.replicas import copies
from tfqcomm.step.message import path_of

_IMPOSSIBLE = {  # optimizers of Keras -> why they cannot be the inner one
    "Ftrl": "it computes weights from its own sums alone, whatever an exchange makes of them",
    "LossScaleOptimizer": "put it around the outer optimizer instead",
    "MultiOptimizer": "its parts train apart: give each an outer optimizer of its own",
    "ScheduleFreeAdamW": "it keeps a second copy of the weights, which no exchange would reach",
}


def refuse_inner(inner: keras.optimizers.Optimizer) -> None:
    """Refuses an optimizer that cannot train between exchanges.

    Raises:
        ValueError: saying why.
    """
    name, reason = type(inner).__name__, None
    if isinstance(inner, _tf_private.OptimizerSeam):
        reason = "it exchanges what replicas do itself"
    for impossible, why in _IMPOSSIBLE.items():
        cls = getattr(keras.optimizers, impossible, None)  # Keras 3.10 has fewer
        if cls is not None and isinstance(inner, cls):
            reason = why
    for argument in ("use_ema", "gradient_accumulation_steps"):
        value = getattr(inner, argument)
        if value and reason is None:
            reason = f"`{argument}` is not supported between exchanges"
            name += f"({argument}={value})"
    if inner.built and reason is None:
        reason = "it has been built already, for variables of its own"
    if reason is not None:
        raise ValueError(f"Argument `inner` cannot be this one: {reason}. Received: inner={name}")


def refuse_constraints(variables) -> None:
    """Refuses weights that would leave what they are constrained to.

    Raises:
        ValueError: naming them.
    """
    constrained = [path_of(v) for v in variables if getattr(v, "constraint", None) is not None]
    if constrained:
        raise ValueError(
            "Constraints of weights are not supported where weights are moved by an outer "
            f"optimizer: it would not keep them. Received: constraints on {constrained}"
        )


def keep_state(inner: keras.optimizers.Optimizer, strategy, ledger: Ledger) -> None:
    """From now on each replica's copy of a slot is what this worker remembers."""
    with tf.init_scope():
        shared = inner.iterations, inner.learning_rate  # equal on all replicas
        slots = [v for v in inner.variables if all(v is not one for one in shared)]
        for replica, own in enumerate(copies(strategy, slots)):
            for number, variable in enumerate(own):
                if variable.dtype.is_floating:
                    ledger.worker_state.adopt(replica, "inner", str(number), variable)


def local_steps(inner, strategy, ledger: Ledger, variables, gradients, learning_rate) -> tf.Tensor:
    """One step of each local replica, in cross-replica context.

    Args:
        variables: mirrored `tf.Variable`s.
        gradients: for each of them every replica's own.
        learning_rate: of the inner optimizer, on every replica.

    Returns:
        Bool scalar, whether all of these gradients were finite; else no replica of this process
        has taken a step.
    """
    finite = []
    local = [strategy.experimental_local_results(g) for g in gradients]
    for device, own in zip(ledger.transport.devices, zip(*local, strict=True), strict=True):
        with tf.device(device):
            finite += [tf.reduce_all(tf.math.is_finite(g)) for g in own]

    def update():
        _tf_private.update_variables(inner, strategy, variables, gradients, learning_rate)
        inner.iterations.assign_add(1)
        return tf.constant(True)

    return tf.cond(tf.reduce_all(finite), update, lambda: tf.constant(False))
