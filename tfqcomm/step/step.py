"""One training step of any optimizer: exchange the messages, then update, or skip as one.

replica 0: gradient --> message --+                          +--> update_step
replica 1: gradient --> message --+--> exchange --> healthy? +--> nothing changes,
replica 2: gradient --> message --+                               `skipped_steps` + 1

The arrow from gradient to message is the worker's half of an algorithm. Most have none, and send
the gradient itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.kernels import numerics
from tfqcomm.state import moving_statistics as statistics
from tfqcomm.state.ledger import ledger_for
from tfqcomm.state.replicas import copies
from tfqcomm.state.residual_rate import ResidualRate
from tfqcomm.step import empty_shares
from tfqcomm.step.accumulation import take_every
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.halves import WarmUp, WorkerHalf
from tfqcomm.step.message import Message, path_of
from tfqcomm.step.options import ExchangeOptions
from tfqcomm.step.refusals import (
    agree_to_train,
    counter_of,
    refuse_idle_patterns,
    refuse_impossible,
    require_own_scope,
    require_replica_context,
)
from tfqcomm.step.verification import verify_replicas
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
        warm_up: says until when messages travel dense; None leaves it to `options.warm_up`.

    Raises:
        ValueError: where compression cannot work, saying what to do instead.
    """
    refuse_impossible(optimizer, options)
    context = require_replica_context(optimizer, "apply")
    gradients = empty_shares.without_empty(gradients)
    variables = list(variables)
    # By position: Keras may call the same layer `dense` in one run and `dense_2` in the next.
    keys = [str(_tf_private.variable_index(optimizer, v)) for v in variables]
    paths = [path_of(v) for v in variables]

    def merged(strategy, gradients, learning_rate):
        require_own_scope(optimizer, strategy)
        ledger = ledger_for(optimizer, transport_for(strategy))
        exchange = GradientExchange(options, ledger)
        if not ledger.routes:  # before the first step
            agree_to_train(exchange.transport, optimizer, variables, options.facts(paths))
            refuse_idle_patterns(optimizer, options, variables)
        local = [_local_gradients(exchange.transport, strategy, g) for g in gradients]

        def take(gradients):
            messages, memory = [], []
            for key, path, values, (_, factor) in zip(keys, paths, gradients, local, strict=True):
                if worker is not None:
                    values = [_map_values(lambda v, f=factor: v * f, value) for value in values]
                    values, state = _worker_half(worker, exchange, key, values, optimizer, strategy)
                    memory.append((key, state))
                    factor = 1
                messages.append(Message(key, values, path=path, factor=factor))
            halves = worker, memory, warm_up
            _apply(optimizer, exchange, strategy, messages, halves, variables, learning_rate)

        def hold():  # `apply` will add 1
            counter_of(optimizer).assign_sub(1)

        take_every(exchange, keys, [values for values, _ in local], take, hold)

    context.merge_call(merged, args=(list(gradients), learning_rate))


def _apply(optimizer, exchange, strategy, messages, halves, variables, learning_rate):
    """The step in cross-replica context: one graph for all local replicas."""
    worker, memory, warm_up = halves
    tf_variables = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    layers = _tf_private.trained_by(optimizer)
    moving, wide = statistics.split_by_width(statistics.values_to_average(layers, strategy))
    statistics.average(exchange.transport, wide)
    if moving:
        messages = [*messages, Message("statistics", statistics.pack(moving), compressible=False)]
    counter = counter_of(optimizer)
    own = exchange.options.after_warm_up(optimizer.iterations)
    compresses = warm_up.compresses if warm_up else own
    scale, remember_rate = _residual_scale(exchange, strategy, learning_rate, compresses)
    reduction = exchange.reduce(messages, counter.value, compresses, scale)
    reduction.record()
    means = list(reduction.means)
    if moving:
        statistics.unpack(means.pop(), moving)
    debts = [exchange.ledger.residuals.debt(m.key, m.size) for m in messages[: len(means)]]

    def update():
        reduction.commit()
        _remember(worker, memory, reduction)
        remember_rate()
        owed = [paid(m, debt, scale) for m, debt in zip(means, debts, strict=True)]
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
        verify_replicas(exchange.ledger, lambda: copies(strategy, variables), updated)


def paid(
    mean: tf.Tensor | tf.IndexedSlices,
    debt: tf.Variable | None,
    residual_scale: tf.Tensor | None = None,
) -> tf.Tensor:
    """The mean, and what a restored run owes to it, which it owes no longer."""
    if debt is None:
        return mean
    mean = tf.convert_to_tensor(mean)
    owed = tf.reshape(debt, tf.shape(mean))
    owed = owed if residual_scale is None else owed * residual_scale
    total = mean + tf.cast(owed, mean.dtype)
    with tf.control_dependencies([total]):
        debt.assign(tf.zeros_like(debt))
    return total


def _residual_scale(exchange, strategy, learning_rate, compresses):
    """What residuals are multiplied by, None for 1; and what a step that is taken calls."""
    if not exchange.options.scale_residual:
        return None, lambda: None
    if isinstance(learning_rate, keras.Variable):
        learning_rate = learning_rate.value
    rate = tf.cast(strategy.experimental_local_results(learning_rate)[0], tf.float32)
    kept = exchange.ledger.keep("residual_rate", ResidualRate)

    def remember():
        kept.remember(rate, compresses() if compresses else tf.constant(True))

    return kept.scale(rate), remember


def _worker_half(worker, exchange, key, gradients, optimizer, strategy):
    """The local replicas' messages of one tensor, and their new state: name -> slot, value."""
    memory = exchange.ledger.worker_state
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
                name: memory.variable(replica, name, key, gradient.shape, initial)
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
    left_out = reduction.left_out() if memory else {}
    for key, states in memory:
        for replica, state in enumerate(states):
            values = {name: value for name, (_, value) in state.items()}
            if (replica, key) in left_out:
                values = worker.worker_sent(values, left_out[replica, key])
            for name, (slot, _) in state.items():
                slot.assign(values[name])


def _local_gradients(transport, strategy, gradient):
    """Each local replica's gradient, float64 or else float32, and what makes a message of it.

    That is the number of replicas. A gradient that was computed outside of `strategy.run` is one
    tensor for all local replicas. It counts once, as in TensorFlow, where these are summed.
    """
    values = strategy.experimental_local_results(gradient)
    factor = transport.world * len(values) // transport.local
    values = [_map_values(_wide, value) for value in values]
    return values * (transport.local // len(values)), factor


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
