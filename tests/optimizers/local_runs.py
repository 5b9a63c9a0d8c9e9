"""Runs of optimizers whose replicas differ, on given gradients and losses."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tests.replicas import build, copies, plain, random_gradients

SHAPES = [(4, 3), (5,)]


def run(strategy, optimizer, variables, gradients, losses=None):
    """Applies given gradients in one graph, after showing the optimizer given losses.

    Args:
        gradients: for each variable [steps, W, ...], of each replica's own loss. As Keras does
            with the loss, they are divided by the number of replicas.
        losses: [steps, W]; None shows the optimizer none.

    Returns:
        For each variable [steps, W, ...]: what each replica holds after each step.
    """
    world, steps = strategy.num_replicas_in_sync, len(gradients[0])

    def replica_step(gradients, losses):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        if losses is not None:
            optimizer.scale_loss(losses[rank] / world)
        optimizer.apply([g[rank] / world for g in gradients], variables)

    @tf.function
    def one_run(gradients, losses):
        histories = [tf.TensorArray(tf.float32, steps) for _ in variables]
        for step in tf.range(steps):
            shown = None if losses is None else losses[step]
            strategy.run(replica_step, args=([g[step] for g in gradients], shown))
            now = [tf.stack(strategy.experimental_local_results(v.value)) for v in variables]
            histories = [h.write(step, v) for h, v in zip(histories, now, strict=True)]
        return [h.stack() for h in histories]

    losses = None if losses is None else tf.constant(losses, tf.float32)
    return [history.numpy() for history in one_run([tf.constant(g) for g in gradients], losses)]


def flat(values) -> np.ndarray:
    """For each variable [..., *shape] -> [..., d]; the leading two axes are kept."""
    return np.concatenate([v.reshape([*v.shape[:2], -1]) for v in values], axis=2)


def random_losses(steps, world, seed=2):
    return np.random.default_rng(seed).uniform(0.5, 2.0, [steps, world]).astype("float32")


def follow(make, reference, world, steps=100, rate=lambda step: 0.1, losses=None, shapes=SHAPES):
    """Runs an optimizer and its NumPy reference; fails at the first step where they differ.

    Args:
        make: () -> optimizer.
        reference: start [W, d] -> reference.

    Returns:
        The optimizer, its history [steps, W, d] and the reference.
    """
    strategy = plain(world)
    optimizer, variables = build(strategy, make, shapes)
    start = flat([np.array([c])[None] for c in copies(strategy, variables)[0]])[0]
    gradients = random_gradients(steps, world, shapes)
    losses = random_losses(steps, world) if losses is None else losses
    history = flat(run(strategy, optimizer, variables, gradients, losses))
    expected = reference(np.repeat(start, world, axis=0))
    for step, (g, loss) in enumerate(zip(flat(gradients), losses, strict=True)):
        right = expected.step(g, loss, rate(step))
        np.testing.assert_allclose(history[step], right, atol=2e-5, err_msg=f"step {step}")
    return optimizer, history, expected
