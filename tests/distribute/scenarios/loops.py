"""Loops and steps that people write themselves."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.distribute.scenarios.tools import (
    BATCH,
    Loss,
    begin,
    classification,
    fit,
    found,
    network,
    scenario,
)


def distributed(strategy):
    """Batches of which each replica gets its part."""
    data = tf.data.Dataset.from_tensor_slices(classification()).batch(BATCH)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return strategy.experimental_distribute_dataset(data.with_options(options))


def train(strategy, model, apply):
    """TensorFlow's custom loop; `apply(gradients)` steps. Returns the loss of each step."""
    loss_fn = Loss(from_logits=True, reduction=None)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            losses = loss_fn(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(losses, global_batch_size=BATCH)
        apply(tape.gradient(loss, model.trainable_variables))
        return loss

    @tf.function
    def step(x, y):
        losses = strategy.run(replica_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    return np.array([step(*batch).numpy() for batch in distributed(strategy)])


@scenario
def custom_loop(strategy, directory):
    with begin(strategy):
        model = network()
        optimizer = keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)
    losses = train(strategy, model, lambda g: optimizer.apply(g, model.trainable_variables))
    return found(strategy, model, losses=losses)


@scenario
def optimizer_built_in_a_function(strategy, directory):
    """TensorFlow's own tutorial: the first `apply`, inside a function, creates the slots."""
    with begin(strategy):
        model = network()
        optimizer = keras.optimizers.Adam(1e-2)
    losses = train(
        strategy,
        model,
        lambda g: optimizer.apply_gradients(zip(g, model.trainable_variables, strict=True)),
    )
    return found(strategy, model, losses=losses, iterations=int(optimizer.iterations.numpy()))


@scenario
def an_optimizer_applied_to_parts_in_turn(strategy, directory):
    with begin(strategy):
        model = network()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def apply(gradients):
        variables = model.trainable_variables
        optimizer.apply(gradients[:2], variables[:2])
        optimizer.apply(gradients[2:], variables[2:])

    return found(strategy, model, losses=train(strategy, model, apply))


class GAN(keras.Model):
    """As Keras' examples write it: `compile` and `train_step` of its own, two optimizers."""

    def __init__(self):
        super().__init__()
        layers = keras.layers
        self.discriminator = keras.Sequential(
            [keras.Input([64]), layers.Dense(16), layers.LeakyReLU(0.2), layers.Dense(1)]
        )
        self.generator = keras.Sequential(
            [keras.Input([8]), layers.Dense(16, activation="relu"), layers.Dense(64)]
        )
        self.d_loss_tracker = keras.metrics.Mean(name="d_loss")
        self.g_loss_tracker = keras.metrics.Mean(name="g_loss")

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn

    @property
    def metrics(self):
        return [self.d_loss_tracker, self.g_loss_tracker]

    def train_step(self, real):
        # Examples draw at random; here all replicas have the same noise, to be compared.
        noise = tf.random.stateless_normal([tf.shape(real)[0], 8], seed=[1, 2])
        examples = tf.concat([self.generator(noise), real], axis=0)
        labels = tf.concat([tf.ones_like(real[:, :1]), tf.zeros_like(real[:, :1])], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(examples))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(
                tf.zeros_like(real[:, :1]), self.discriminator(self.generator(noise))
            )
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.d_loss_tracker.update_state(d_loss)
        self.g_loss_tracker.update_state(g_loss)
        return {metric.name: metric.result() for metric in self.metrics}


@scenario
def gan(strategy, directory):
    with begin(strategy):
        model = GAN()
        model.compile(
            d_optimizer=keras.optimizers.Adam(1e-3),
            g_optimizer=keras.optimizers.Adam(1e-3),
            loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
        )
    x, _ = classification()
    history = fit(model, x, batch_size=BATCH)
    steps = [int(o.iterations.numpy()) for o in (model.d_optimizer, model.g_optimizer)]
    return found(strategy, model, history=history, steps=steps)
