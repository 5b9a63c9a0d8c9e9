"""What people give to `fit`, `evaluate` and `predict`."""

from __future__ import annotations

import time

import keras
import numpy as np

from tests.distribute.scenarios.tools import (
    BATCH,
    CLASSES,
    EXAMPLES,
    FEATURES,
    Loss,
    begin,
    classification,
    compiled,
    fit,
    found,
    scenario,
    scenario_on_one_device,
)


@scenario
def class_weight(strategy, directory):
    model = compiled(strategy)
    weights = {label: 1.0 + label % 3 for label in range(CLASSES)}
    return found(strategy, model, history=fit(model, *classification(), class_weight=weights))


@scenario
def sample_weight(strategy, directory):
    model = compiled(strategy, weighted_metrics=["accuracy"])
    x, y = classification()
    weights = np.linspace(0, 2, len(x), dtype="float32")
    history = fit(model, x, y, sample_weight=weights, validation_data=(x, y, weights))
    return found(strategy, model, history=history)


@scenario_on_one_device
def validation_split(strategy, directory):
    """Of 101 rows, 21 are left to validate, which do not split evenly."""
    model = compiled(strategy)
    history = fit(model, *classification(101), validation_split=0.2)
    return found(strategy, model, history=history)


@scenario
def shuffle(strategy, directory):
    model = compiled(strategy)
    history = fit(model, *classification(), epochs=3, shuffle=True)
    x, y = classification()
    _, accuracy = model.evaluate(x, y, verbose=0)
    return {
        "weights": found(strategy, model)["weights"],
        "own order": history["loss"],  # another one than that of a single process
        "own accuracy": accuracy,
    }


@scenario
def generator(strategy, directory):
    x, y = classification()

    def batches():
        while True:  # the same batch: how far Keras reads ahead is not certain
            yield x[:BATCH], y[:BATCH]

    model = compiled(strategy)
    return found(strategy, model, history=fit(model, batches(), steps_per_epoch=4))


class Batches(keras.utils.PyDataset):
    """Four batches, each of which takes its time."""

    def __init__(self, **options):
        super().__init__(**options)
        self._x, self._y = classification()

    def __len__(self):
        return EXAMPLES // BATCH

    def __getitem__(self, index):
        time.sleep(0.01 * (index % 2))
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self._x[rows], self._y[rows]


@scenario
def py_dataset(strategy, directory):
    model = compiled(strategy)
    history = fit(model, Batches(), validation_data=Batches())
    return found(strategy, model, history=history)


@scenario
def py_dataset_with_several_workers(strategy, directory):
    model = compiled(strategy)
    history = fit(model, Batches(workers=3, max_queue_size=4))
    return found(strategy, model, history=history)


@scenario
def several_inputs_and_outputs(strategy, directory):
    layers = keras.layers
    with begin(strategy):
        inputs = {name: keras.Input([FEATURES // 2], name=name) for name in ("left", "right")}
        hidden = layers.Concatenate()([layers.Dense(8, "relu")(i) for i in inputs.values()])
        outputs = {
            "label": layers.Dense(CLASSES, name="label")(hidden),
            "sum": layers.Dense(1, name="sum")(hidden),
        }
        model = keras.Model(inputs, outputs)
        model.compile(
            "adam",
            loss={"label": Loss(from_logits=True), "sum": "mse"},
            loss_weights={"label": 1.0, "sum": 0.25},
            metrics={"label": ["accuracy"], "sum": ["mae"]},
        )
    x, y = classification()
    given = {"left": x[:, : FEATURES // 2], "right": x[:, FEATURES // 2 :]}
    wanted = {"label": y, "sum": x.sum(1, keepdims=True)}
    history = fit(model, given, wanted, validation_data=(given, wanted))
    predicted = model.predict(given, batch_size=BATCH, verbose=0)
    return found(strategy, model, history=history, predicted=predicted)


# ------------------------------------------------------------- numbers of rows that do not divide


@scenario
def evaluate_and_predict_101_rows(strategy, directory):
    """The last batch has five rows: three on one replica, two on the other."""
    model = compiled(strategy)
    x, y = classification(101)
    history = fit(model, x, y)
    evaluated = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    predicted = model.predict(x, batch_size=BATCH, verbose=0)
    return found(strategy, model, history=history, evaluated=evaluated, predicted=predicted)


@scenario_on_one_device
def an_only_batch_that_does_not_split(strategy, directory):
    """Where TensorFlow's own strategy fails at once: 11 rows for one replica, 10 for the other."""
    x, y = classification(21)
    model = compiled(strategy)
    # A gradient is the mean of the replicas' means; one device needs weights to say as much.
    alone = strategy.num_replicas_in_sync == 1
    weights = np.array([21 / 22] * 11 + [21 / 20] * 10) if alone else None
    fit(model, x, y, sample_weight=weights)
    evaluated = model.evaluate(x, y, verbose=0)
    predicted = model.predict(x, verbose=0)
    return found(strategy, model, evaluated=evaluated, predicted=predicted)


@scenario_on_one_device
def fewer_rows_than_replicas(strategy, directory):
    """Five batches of one row: one of two replicas has none, and adds nothing to the mean."""
    x, y = classification(5)
    rate = 0.1 / (3 - strategy.num_replicas_in_sync)
    model = compiled(strategy, optimizer=lambda: keras.optimizers.SGD(rate, momentum=0.9))
    history = fit(model, x, y, batch_size=1)
    evaluated = model.evaluate(x, y, batch_size=1, verbose=0)
    predicted = model.predict(x, batch_size=1, verbose=0)
    return found(strategy, model, history=history, evaluated=evaluated, predicted=predicted)
