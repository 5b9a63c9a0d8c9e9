"""Trains with each optimizer of Keras, on parameter servers and in one process."""

from __future__ import annotations

import os
from collections.abc import Callable

import keras
import numpy as np

from tests.parameter_server.one_process_runs import (
    BATCH,
    STEPS,
    difference,
    in_one_process,
    on_servers,
)
from tfqcomm.parameter_server import Trainer

WORDS = 4  # of an example
VOCABULARY = 2 * BATCH * WORDS
LARGEST_DIFFERENCE = 1e-6


def names() -> list[str]:
    """Of all optimizers of the installed Keras."""
    found = {name: getattr(keras.optimizers, name) for name in dir(keras.optimizers)}
    base = keras.optimizers.Optimizer
    return sorted(
        name
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    )


def make(name: str) -> keras.optimizers.Optimizer:
    if name == "LossScaleOptimizer":
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01, momentum=0.9))
    if name == "MultiOptimizer":
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD())
        )
    return getattr(keras.optimizers, name)(0.01, weight_decay=0.1)


def build_model() -> keras.Model:
    """A kernel with more rows than columns, one with more columns than rows, and an embedding."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([WORDS], dtype="int32"),
            keras.layers.Embedding(VOCABULARY, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )


def make_data(repeated: bool):
    """Each word occurs once in a batch; or some of them several times."""
    rng = np.random.default_rng(0)
    words = np.stack([rng.permutation(VOCABULARY) for _ in range(STEPS)])
    words = (words % 7 if repeated else words).reshape([STEPS, 2, BATCH, WORDS])
    return words.astype("int32"), rng.normal(size=[STEPS, 2, BATCH, 3]).astype("float32")


def verdicts(name: str) -> dict[str, object]:
    """The largest difference of each way to train, or the error that refuses it."""

    def optimizer():
        return make(name)

    found: dict[str, object] = {}
    for repeated in (False, True):
        data = make_data(repeated)
        one = in_one_process(build_model, optimizer, data, loss="mse").get_weights()
        for mode, workers in [("sync", 1)] if repeated else [("sync", 2), ("async", 1)]:
            key = "repeated" if repeated else mode
            try:
                trainer = on_servers(build_model, optimizer, data, workers, mode=mode, loss="mse")
            except ValueError as error:
                found[key] = str(error)
            else:
                found[key] = difference(one, trainer.model.get_weights())
    return found


def everything(verdict: Callable = verdicts) -> dict[str, dict]:
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    Trainer(build_model, optimizer="sgd", loss="mse", workers=2, parameter_servers=2)
    return {name: verdict(name) for name in names()}
