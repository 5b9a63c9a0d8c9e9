"""What people train, and the ways to train it that `fit` offers."""

from __future__ import annotations

import pathlib

import keras
import numpy as np
import tensorflow as tf

from tests.distribute.multi_worker_functions import replicas
from tests.distribute.scenarios.tools import (
    BATCH,
    CLASSES,
    Loss,
    begin,
    classification,
    compiled,
    fit,
    found,
    network,
    one_hot,
    scenario,
    without_warnings,
)

layers = keras.layers


@scenario
def regularizers(strategy, directory):
    between = layers.Dense(
        16,
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l2",
        name="regularized",
    )
    model = compiled(strategy, between)
    return found(strategy, model, history=fit(model, *classification()))


@scenario
def frozen_layers_then_fine_tuning(strategy, directory):
    model = compiled(strategy)
    x, y = classification()
    model.layers[0].trainable = False
    with strategy.scope():
        model.compile("adam", Loss(from_logits=True))
    first = fit(model, x, y, epochs=1)
    model.layers[0].trainable = True
    with strategy.scope():
        model.compile(keras.optimizers.Adam(1e-4), Loss(from_logits=True))
    return found(strategy, model, first=first, second=fit(model, x, y, epochs=1))


@scenario
def unused_layers(strategy, directory):
    """One of two heads has no loss: no gradient reaches it."""
    with begin(strategy):
        inputs = keras.Input([64])
        hidden = layers.Dense(16, "relu")(inputs)
        heads = {name: layers.Dense(CLASSES, name=name)(hidden) for name in ("used", "unused")}
        model = keras.Model(inputs, heads)
        model.compile("adam", loss={"used": Loss(from_logits=True)})
    x, y = classification()
    with without_warnings():
        history = fit(model, x, {"used": y})
    return found(strategy, model, history=history)


@scenario
def lstm_with_a_mask(strategy, directory):
    random = np.random.RandomState(0)
    x = random.randint(1, 20, [128, 12])
    lengths = random.randint(1, 13, [128])
    x[np.arange(12) >= lengths[:, None]] = 0
    with begin(strategy):
        model = keras.Sequential(
            [
                keras.Input([12], dtype="int32"),
                layers.Embedding(20, 8, mask_zero=True),
                layers.LSTM(8),
                layers.Dense(2),
            ]
        )
        model.compile("adam", Loss(from_logits=True), metrics=["accuracy"])
    return found(strategy, model, history=fit(model, x, lengths % 2))


@scenario
def mixed_float16(strategy, directory):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(strategy, optimizer=lambda: keras.optimizers.Adam(1e-2))
        x, y = classification()
        history = fit(model, x, y)
        predicted = model.predict(x, batch_size=BATCH, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    return found(strategy, model, history=history, predicted=predicted.astype("float32"))


@scenario
def predict_bfloat16(strategy, directory):
    results = {}
    for policy in ("bfloat16", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = compiled(strategy)
            predicted = model.predict(classification(101)[0], batch_size=BATCH, verbose=0)
        finally:
            keras.config.set_dtype_policy("float32")
        results[policy] = np.asarray(predicted).astype("float32")
    return found(strategy, compiled(strategy), **results)


@scenario
def moving_average_with_adamw_and_global_clipnorm(strategy, directory):
    def optimizer():
        return keras.optimizers.AdamW(
            1e-2, weight_decay=0.01, global_clipnorm=0.5, use_ema=True, ema_momentum=0.9
        )

    model = compiled(strategy, optimizer=optimizer)
    x, y = classification()
    history = fit(model, x, y, validation_data=(x, y))
    return found(strategy, model, history=history)


@scenario
def synchronized_batch_normalization(strategy, directory):
    model = compiled(strategy, layers.BatchNormalization(synchronized=True, momentum=0.9))
    x, y = classification()
    x = x * np.linspace(0.5, 3, len(x))[:, None].astype("float32")  # replicas see other scales
    return found(strategy, model, history=fit(model, x, y, validation_data=(x, y)))


@scenario
def run_eagerly(strategy, directory):
    model = compiled(strategy, run_eagerly=True)
    x, y = classification()
    history = fit(model, x, y, epochs=1, validation_data=(x, y))
    return found(strategy, model, history=history)


@scenario
def train_on_batch(strategy, directory):
    """Each replica gets the whole batch that its process passes: here all pass the same."""
    model = compiled(strategy)
    x, y = classification()
    losses = [model.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    return found(strategy, model, losses=np.array(losses), test=model.test_on_batch(x, y))


@scenario
def six_models_in_one_process(strategy, directory):
    x, y = classification()
    results = {}
    for width in range(6):
        keras.utils.set_random_seed(width)
        model = compiled(strategy, layers.Dense(8 + width, "relu", name="between"))
        results[f"history {width}"] = fit(model, x, y, epochs=1)
        results[f"last weight {width}"] = replicas(strategy, model.weights[-1:])[0]
    return found(strategy, model, **results)


@scenario
def export(strategy, directory):
    """The first process alone exports; what is served is what all predict."""
    model = compiled(strategy)
    x, y = classification()
    fit(model, x, y, epochs=1)
    process = strategy.cluster_resolver.task_id if strategy.cluster_resolver else 0
    predicted = model.predict(x[:32], verbose=0)
    served = predicted
    if process == 0:
        path = str(pathlib.Path(directory, "exported"))
        model.export(path, verbose=False)
        exported = tf.saved_model.load(path)
        served = exported.serve(x[:32]).numpy()
    np.testing.assert_allclose(served, predicted, atol=1e-5)
    return found(strategy, model, predicted=predicted)


# ------------------------------------------------------------------------------------------ metrics


@scenario
def auc_f1_and_top_k_metrics(strategy, directory):
    metrics = (
        keras.metrics.AUC(multi_label=True, num_labels=CLASSES, from_logits=True, name="auc"),
        keras.metrics.F1Score(average="macro", name="f1"),
        keras.metrics.TopKCategoricalAccuracy(3, name="top_3"),
    )
    return _with_metrics(strategy, metrics)


@scenario
def metrics_that_are_vectors(strategy, directory):
    return _with_metrics(strategy, (keras.metrics.F1Score(name="f1"), "categorical_accuracy"))


def _with_metrics(strategy, metrics):
    """Metrics are configurations here: `compile` makes them in the scope."""
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    with begin(strategy):
        model = network()
        made = [
            metric if isinstance(metric, str) else type(metric).from_config(metric.get_config())
            for metric in metrics
        ]
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=made)
    x, y = classification()
    history = fit(model, x, one_hot(y), validation_data=(x[:64], one_hot(y[:64])))
    batch = model.test_on_batch(x[:8], one_hot(y[:8]), return_dict=True)
    return found(strategy, model, history=history, batch=batch)
