"""What must be so before a step is taken, and what is said where it is not."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.step.message import path_of
from tfqcomm.step.policy import Policy
from tfqcomm.transport.base import Transport
from tfqcomm.transport.of_strategy import transport_for


def require_replica_context(optimizer, method: str) -> tf.distribute.ReplicaContext:
    """The replica context.

    Raises:
        ValueError: outside of one.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(
            f"`{optimizer.name}.{method}` must be called in a replica context: inside "
            "`strategy.run(...)`, not directly under `strategy.scope()`."
        )
    return context


def require_own_scope(optimizer, strategy: tf.distribute.Strategy) -> None:
    """The optimizer must have been made in the scope of `strategy`, in cross-replica context.

    Otherwise its variables are those of no replica, and each replica updates them: it counts every
    step as many times as there are replicas, and schedules and pulls never come when they should.

    Raises:
        ValueError: if it was not.
    """
    copies = strategy.experimental_local_results(counter_of(optimizer).value)
    if len(copies) != transport_for(strategy).local:
        raise ValueError(
            f"Optimizer `{optimizer.name}` must be created in the scope of the strategy under "
            "which it trains: inside `with strategy.scope():`, together with the model. "
            f"Received: {type(optimizer).__name__} created outside of it"
        )


def refuse_impossible(optimizer, options) -> None:
    """Refuses what compression cannot work with.

    Raises:
        ValueError: saying what to do instead.
    """
    if _tf_private.in_xla_context():
        reason = None
        if tf.distribute.has_strategy():
            reason = "its collectives would be replaced by uncompressed ones"
        elif not options.compressor.compilable:
            reason = f"{options.compressor} selects entries, how many is known at run time only"
        if reason is not None:
            raise ValueError(
                f"Compressed training cannot be compiled by XLA: {reason}. Use "
                "`model.compile(..., jit_compile=False)`."
            )
    steps = optimizer.gradient_accumulation_steps
    if steps and (tf.distribute.has_strategy() or options.accumulate > 1):
        raise ValueError(
            "Argument `gradient_accumulation_steps` is not supported under a distribution "
            "strategy, nor beside `accumulate`. Use `accumulate` of the strategy, or of an "
            f"optimizer of this package, alone. Received: gradient_accumulation_steps={steps}, "
            f"accumulate={options.accumulate}"
        )
    if optimizer.use_ema and optimizer.ema_overwrite_frequency and tf.distribute.has_strategy():
        raise ValueError(
            "Argument `ema_overwrite_frequency` is not supported under a distribution strategy. "
            "Leave it None: `fit` puts the averages into the model when it ends. "
            f"Received: ema_overwrite_frequency={optimizer.ema_overwrite_frequency}"
        )


def refuse_idle_patterns(optimizer, options, variables) -> None:
    """Refuses a policy with a pattern that takes no variable: a mistake in writing, most likely.

    Variables of the whole model count, also where several optimizers share them.

    Raises:
        ValueError: naming the patterns and the paths.
    """
    if not isinstance(options.compressor, Policy):
        return
    known = [v for layer in _tf_private.trained_by(optimizer) for v in layer.weights]
    paths = list(dict.fromkeys(path_of(v) for v in [*variables, *known]))
    idle = options.compressor.idle(paths)
    if idle:
        raise ValueError(
            "Argument `compressor`, as a policy, must not have patterns that match no variable, or "
            f"only such as an earlier pattern takes: {idle}. A pattern must match the whole of a "
            f"path. The paths are {paths}. Received: compressor={options.compressor}"
        )


def optimizer_facts(optimizer: keras.optimizers.Optimizer) -> dict[str, str]:
    """What an optimizer is set to at the moment, the learning rate included, as text."""
    with tf.init_scope():  # the learning rate in the config is a variable
        config = {k: str(v) for k, v in optimizer.get_config().items() if k != "name"}
    return {"optimizer": type(optimizer).__name__, **config}


def agree_to_train(
    transport: Transport, optimizer, variables, more: Mapping[str, str] | None = None
) -> None:
    """All workers must be about to train the same thing in the same way.

    Args:
        more: facts that `optimizer.get_config()` does not tell.

    Raises:
        ValueError: on every worker, saying what differs and between whom.
    """
    if transport.processes == 1:
        return
    facts = {
        **optimizer_facts(optimizer),
        **(more or {}),
        "number of variables": str(len(variables)),
        **{
            f"variable {i}": f"{path_of(v).split('/')[-1]} {list(v.shape)} {v.dtype}"
            for i, v in enumerate(variables)
        },
    }
    transport.agree("train", facts, {"optimizer name": optimizer.name})


def counter_of(optimizer: keras.optimizers.Optimizer):
    """The variable that counts an optimizer's steps.

    Not `iterations`: with `gradient_accumulation_steps` that is a quotient, not the counter.
    """
    return optimizer.variables[0]
