"""Training on logical devices, for tests: whole runs in one graph, and every replica's copy.

A hundred steps inside one `tf.function` take no longer than tracing one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm.distribute import CompressedAllReduce


def compressing(world: int, compressor, **options) -> tf.distribute.MirroredStrategy:
    """A strategy over `world` logical devices that compresses, biases and all."""
    ops = CompressedAllReduce(compressor, **{"min_size": 0, **options})
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(world)], ops)


def plain(world: int = 1) -> tf.distribute.Strategy:
    """Keras' own training; on one worker without any strategy."""
    if world == 1:
        return tf.distribute.get_strategy()
    devices = [f"CPU:{i}" for i in range(world)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def copies(strategy: tf.distribute.Strategy, variables) -> list[list[np.ndarray]]:
    """The values of `variables` on each replica."""
    values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    local = [strategy.experimental_local_results(v) for v in values]
    return [[np.array(v) for v in replica] for replica in zip(*local, strict=True)]


def assert_replicas_equal(strategy: tf.distribute.Strategy, variables) -> None:
    """All replicas hold the same bits, and none of them NaN."""
    first, *others = copies(strategy, variables)
    for other in others:
        np.testing.assert_array_equal([v.tobytes() for v in other], [v.tobytes() for v in first])
    assert all(np.isfinite(v).all() for v in first)


def assert_weights_close(actual, expected, atol=1e-6) -> None:
    """Compares the weights of two models."""
    for a, b in zip(actual.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def build(strategy, optimizer: Callable[[], keras.optimizers.Optimizer], shapes, seed=0):
    """Variables of `shapes` with normal values, and an optimizer for them."""
    rng = np.random.default_rng(seed)
    with strategy.scope():
        variables = [
            keras.Variable(rng.normal(size=shape).astype("float32"), name=f"variable{i}")
            for i, shape in enumerate(shapes)
        ]
        optimizer = optimizer()
        optimizer.build(variables)
    return optimizer, variables


def random_gradients(steps: int, world: int, shapes, seed=1) -> list[np.ndarray]:
    """For each variable float32[steps, world, ...]."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=[steps, world, *shape]).astype("float32") for shape in shapes]


def apply_gradients(strategy, optimizer, variables, gradients) -> list[np.ndarray]:
    """Applies given gradients step by step, in one graph.

    Args:
        gradients: for each variable [steps, world, ...]: the gradients of each replica's own mean
            loss. As Keras does with the loss, they are divided by the number of replicas.

    Returns:
        For each variable [steps, ...]: its value after each step.
    """
    world, steps = strategy.num_replicas_in_sync, len(gradients[0])

    def replica_step(gradients):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([g[rank] / world for g in gradients], variables)

    @tf.function
    def run(gradients):
        histories = [tf.TensorArray(tf.float32, steps) for _ in variables]
        for step in tf.range(steps):
            strategy.run(replica_step, args=([g[step] for g in gradients],))
            now = [strategy.experimental_local_results(v.value)[0] for v in variables]
            histories = [h.write(step, v) for h, v in zip(histories, now, strict=True)]
        return [h.stack() for h in histories]

    return [history.numpy() for history in run([tf.constant(g) for g in gradients])]


def train(strategy, models_and_optimizers, loss, data: Sequence[np.ndarray]) -> None:
    """Trains models together on given batches, in one graph.

    Args:
        models_and_optimizers: each optimizer trains its model.
        loss: (index of the model, model, *batch) -> the mean loss over a replica's batch.
        data: arrays [steps, world, ...]: batch `[s, r]` is for replica r in step s.
    """
    world = strategy.num_replicas_in_sync

    def replica_step(batch):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        batch = [part[rank] for part in batch]
        for index, (model, optimizer) in enumerate(models_and_optimizers):
            with tf.GradientTape() as tape:
                value = loss(index, model, *batch) / world
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(value, variables), variables)

    @tf.function
    def run(data):
        for step in tf.range(len(data[0])):
            strategy.run(replica_step, args=([part[step] for part in data],))

    run([tf.constant(part) for part in data])
