"""One training step of any optimizer: exchange the messages, then update, or skip as one.

replica 0: gradient --> message --+                          +--> update_step
replica 1: gradient --> message --+--> exchange --> healthy? +--> nothing changes,
replica 2: gradient --> message --+                               `skipped_steps` + 1

The arrow from gradient to message is the worker's half of an algorithm. Most have none, and send
the gradient itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.kernels import numerics
from tfqcomm.state import moving_statistics as statistics
from tfqcomm.step import empty_shares
from tfqcomm.step.exchange import Message, exchange_for
from tfqcomm.step.halves import WarmUp, WorkerHalf
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.verification import verify_replicas
from tfqcomm.transport.base import Transport
from tfqcomm.transport.of_strategy import transport_for


@tf.autograph.experimental.do_not_convert  # this is graph code already, and not only ours
def distributed_step(
    optimizer: keras.optimizers.Optimizer,
    options: ExchangeOptions,
    gradients: Sequence[tf.Tensor | tf.IndexedSlices],
    variables: Sequence[keras.Variable | tf.Variable],
    learning_rate: tf.Tensor,
    worker: WorkerHalf | None = None,
    warm_up: WarmUp | None = None,
) -> None:
    """Averages the messages of all replicas and lets `optimizer` update `variables`.

    Called in replica context, like Keras' own update. As there, the loss has been divided by the
    number of replicas, so the *sum* of the gradients is the mean gradient; the message of a
    replica is its gradient times W, and the mean of the messages is that sum.

    Args:
        worker: makes messages of the gradients (times W); None sends these themselves.
        warm_up: says until when messages travel dense; None compresses from the first step on.

    Raises:
        ValueError: where compression cannot work, saying what to do instead.
    """
    _refuse_impossible(optimizer, options)
    context = require_replica_context(optimizer, "apply")
    gradients = empty_shares.without_empty(gradients)
    variables = list(variables)
    # By position: Keras may call the same layer `dense` in one run and `dense_2` in the next.
    keys = [str(_tf_private.variable_index(optimizer, v)) for v in variables]

    def merged(strategy, gradients, learning_rate):
        require_own_scope(optimizer, strategy)
        exchange = exchange_for(optimizer, options, transport_for(strategy))
        if not exchange.routes:  # before the first step
            agree_to_train(exchange.transport, optimizer, variables, exchange.options.facts())
        messages, memory = [], []
        for key, gradient, variable in zip(keys, gradients, variables, strict=True):
            values = _local_gradients(exchange.transport, strategy, gradient)
            if worker is not None:
                values, state = _worker_half(worker, exchange, key, values, optimizer, strategy)
                memory.append((key, state))
            messages.append(Message(key, values, path=_path(variable)))
        halves = worker, memory, warm_up
        _apply(optimizer, exchange, strategy, messages, halves, variables, learning_rate)

    context.merge_call(merged, args=(list(gradients), learning_rate))


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
    copies = strategy.experimental_local_results(_counter(optimizer).value)
    if len(copies) != transport_for(strategy).local:
        raise ValueError(
            f"Optimizer `{optimizer.name}` must be created in the scope of the strategy under "
            "which it trains: inside `with strategy.scope():`, together with the model. "
            f"Received: {type(optimizer).__name__} created outside of it"
        )


def _apply(optimizer, exchange, strategy, messages, halves, variables, learning_rate):
    """The step in cross-replica context: one graph for all local replicas."""
    worker, memory, warm_up = halves
    tf_variables = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    layers = _tf_private.trained_by(optimizer)
    moving, wide = statistics.split_by_width(statistics.values_to_average(layers, strategy))
    statistics.average(exchange.transport, wide)
    if moving:
        messages = [*messages, Message("statistics", statistics.pack(moving), compressible=False)]
    counter = _counter(optimizer)
    compresses = warm_up.compresses if warm_up else None
    reduction = exchange.reduce(messages, counter.value, compresses)
    reduction.record()
    means = list(reduction.means)
    if moving:
        statistics.unpack(means.pop(), moving)
    debts = [exchange.residuals.debt(m.key, m.size) for m in messages[: len(means)]]

    def update():
        reduction.commit()
        _remember(worker, memory, reduction)
        owed = [_paid(m, debt) for m, debt in zip(means, debts, strict=True)]
        means_now = [_cast_like(m, v) for m, v in zip(owed, tf_variables, strict=True)]
        _tf_private.update_variables(optimizer, strategy, tf_variables, means_now, learning_rate)
        if warm_up:
            warm_up.step_taken()
        return tf.constant(True)

    def skip():
        # `apply` will add 1: the step, and the batches gathered for it, did not take place.
        counter.assign_sub(optimizer.gradient_accumulation_steps or 1)
        return tf.constant(False)

    updated = tf.cond(reduction.healthy, update, skip)
    if exchange.options.verify:
        verify_replicas(exchange, strategy, tf_variables, updated)


def _paid(mean, debt):
    """The mean, and what a restored run owes to it, which it owes no longer."""
    if debt is None:
        return mean
    mean = tf.convert_to_tensor(mean)
    total = mean + tf.cast(tf.reshape(debt, tf.shape(mean)), mean.dtype)
    with tf.control_dependencies([total]):
        debt.assign(tf.zeros_like(debt))
    return total


def _counter(optimizer):
    # Not `iterations`: with `gradient_accumulation_steps` that is a quotient, not the counter.
    return optimizer.variables[0]


def _worker_half(worker, exchange, key, gradients, optimizer, strategy):
    """The local replicas' messages of one tensor, and their new state: name -> slot, value."""
    messages, states = [], []
    shared = {
        name: strategy.experimental_local_results(slot.value)
        for name, slot in worker.server_state(int(key)).items()
    }
    for replica, gradient in enumerate(gradients):
        with tf.device(exchange.transport.devices[replica]):
            # Rows of embeddings are made dense; what a worker remembers is float32.
            gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
            slots = {
                name: exchange.worker_state.variable(replica, name, key, gradient.shape, initial)
                for name, initial in worker.worker_slots.items()
            }
            state = {name: tf.convert_to_tensor(slot) for name, slot in slots.items()}
            state |= {name: tf.cast(of[replica], tf.float32) for name, of in shared.items()}
            steps = tf.convert_to_tensor(optimizer.iterations)  # not batches that were gathered
            message, state = worker.worker_step(gradient, state, steps)
            messages.append(message)
            states.append({name: (slots[name], value) for name, value in state.items()})
    return messages, states


def _remember(worker, memory, reduction):
    """Assigns the new state of the worker's half, in a step that is taken."""
    for key, states in memory:
        for replica, state in enumerate(states):
            values = {name: value for name, (_, value) in state.items()}
            left_out = reduction.left_out.get((replica, key))
            if left_out is not None:
                values = worker.worker_sent(values, left_out)
            for name, (slot, _) in state.items():
                slot.assign(values[name])


def _local_gradients(transport, strategy, gradient) -> list[tf.Tensor | tf.IndexedSlices]:
    """Each local replica's gradient, times the number of replicas: float64, or else float32.

    One that was computed outside of `strategy.run` is one tensor for all local replicas. It counts
    once, as in TensorFlow, where these are summed.
    """
    values = strategy.experimental_local_results(gradient)
    factor = transport.world * len(values) // transport.local
    values = [_map_values(lambda v: _wide(v) * factor, value) for value in values]
    return values * (transport.local // len(values))


def _wide(values):
    return values if values.dtype == tf.float64 else tf.cast(values, tf.float32)


def _cast_like(mean, variable):
    """The mean in the type of the variable; half precision saturates instead of overflowing."""
    if tf.as_dtype(variable.dtype).size == 2:
        return _map_values(lambda v: numerics.saturating_cast(v, variable.dtype), mean)
    return _map_values(lambda v: tf.cast(v, variable.dtype), mean)


def _map_values(function, value):
    """Applies `function` to a tensor, or to the rows of `IndexedSlices`."""
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(function(value.values), value.indices, value.dense_shape)
    return function(value)


def _path(variable) -> str:
    return getattr(variable, "path", variable.name)


def _refuse_impossible(optimizer, options) -> None:
    if _tf_private.in_xla_context():
        reason = None
        if tf.distribute.has_strategy():
            reason = "its collectives would be replaced by uncompressed ones"
        elif options.compressor.adaptive:
            reason = "how many entries adaptive top-k keeps is known at run time only"
        if reason is not None:
            raise ValueError(
                f"Compressed training cannot be compiled by XLA: {reason}. Use "
                "`model.compile(..., jit_compile=False)`."
            )
    if optimizer.gradient_accumulation_steps and tf.distribute.has_strategy():
        raise ValueError(
            "Argument `gradient_accumulation_steps` is not supported under a distribution "
            "strategy. Use a larger batch, or add up the gradients of several micro-batches within "
            "one step, before `optimizer.apply`. Received: "
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}"
        )
    if optimizer.use_ema and optimizer.ema_overwrite_frequency and tf.distribute.has_strategy():
        raise ValueError(
            "Argument `ema_overwrite_frequency` is not supported under a distribution strategy. "
            "Leave it None: `fit` puts the averages into the model when it ends. "
            f"Received: ema_overwrite_frequency={optimizer.ema_overwrite_frequency}"
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
            f"variable {i}": f"{_path(v).split('/')[-1]} {list(v.shape)} {v.dtype}"
            for i, v in enumerate(variables)
        },
    }
    transport.agree("train", facts, {"optimizer name": optimizer.name})
