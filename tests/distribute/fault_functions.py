"""What the workers of `test_faults.py` and `test_agreement.py` do."""

from __future__ import annotations

import os
import time

import keras
import numpy as np

from tests.multi_process_functions import task_index
from tfqcomm.compressors import RandomK, TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.step import ExchangeOptions

# ------------------------------------------------------------------------------------------ faults


def train_for_ever(timeout_seconds=300.0):
    """Returns the error that ends it, and how long the step took in which it came."""
    keras.utils.set_random_seed(0)
    strategy = MultiWorkerMirroredStrategy("block_sign", timeout_seconds=timeout_seconds)
    model = compiled(strategy)
    step_began = time.monotonic()

    class Report(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            nonlocal step_began
            step_began = time.monotonic()

        def on_train_batch_end(self, batch, logs=None):
            if batch == 5:
                print(f"training, process {os.getpid()}.", flush=True)

    x, y = data()
    try:
        model.fit(x, y, batch_size=16, epochs=100_000, verbose=0, callbacks=[Report()])
    except Exception as error:
        print("ended", flush=True)
        return f"{type(error).__name__}: {error}", time.monotonic() - step_began


def wait_for_the_others(timeout_seconds):
    start = time.monotonic()
    print("waiting", flush=True)
    try:
        MultiWorkerMirroredStrategy(timeout_seconds=timeout_seconds)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start


def several_strategies():
    """Each of three with a model; the workers do not begin at the same time."""
    losses = []
    for number in range(3):
        strategy = MultiWorkerMirroredStrategy("block_sign")
        time.sleep(2 * ((number + task_index()) % 2))
        losses.append(compiled(strategy).fit(*data(), epochs=1, verbose=0).history["loss"])
    return losses


# --------------------------------------------------------------------------------------- agreement

OPTIONS = {
    "compressor": ({"compressor": "top_k"}, {"compressor": "block_sign"}),
    "ratio": ({"compressor": TopK(0.01)}, {"compressor": TopK(0.02)}),
    "error_feedback": ({}, {"error_feedback": False}),
    "min_size": ({}, {"min_size": 0}),
    "schedule": ({}, {"schedule": "two_phase"}),
    "seed": ({"compressor": RandomK(0.1)}, {"compressor": RandomK(0.1), "seed": 1}),
}
MODELS = {
    "width": ({"widths": [32]}, {"widths": [33]}),
    "depth": ({"widths": [32]}, {"widths": [32, 32]}),
    "depth of the other": ({"widths": [32, 32, 32]}, {"widths": [32]}),
    "optimizer": ({"optimizer": "adam"}, {"optimizer": "sgd"}),
    "hyperparameter": ({"optimizer": ("beta_1", 0.9)}, {"optimizer": ("beta_1", 0.8)}),
    "trainable": ({}, {"frozen": True}),
}


def compiled(strategy, widths=(32,), optimizer="adam", frozen=False):
    layers = keras.layers
    if isinstance(optimizer, tuple):
        name, value = optimizer
        with strategy.scope():
            optimizer = keras.optimizers.Adam(**{name: value})
    with strategy.scope():
        hidden = [layers.Dense(width, activation="relu") for width in widths]
        model = keras.Sequential([keras.Input([64]), *hidden, layers.Dense(10)])
        model.layers[0].trainable = not frozen
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data():
    random = np.random.RandomState(0)
    return random.randn(160, 64).astype("float32"), random.randint(0, 10, 160)


def error_of(strategy, options, model):
    strategy.options = ExchangeOptions(**{"compressor": "top_k", **options})
    keras.utils.set_random_seed(0)
    try:
        compiled(strategy, **model).fit(*data(), epochs=1, verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def disagree():
    """For each way in which the two workers may differ, the error."""
    rank = task_index()
    strategy = MultiWorkerMirroredStrategy()
    errors = {name: error_of(strategy, pair[rank], {}) for name, pair in OPTIONS.items()}
    errors |= {name: error_of(strategy, {}, pair[rank]) for name, pair in MODELS.items()}
    errors["nothing"] = error_of(strategy, {}, {})
    for verify in (True, False):
        for when in ("before fit", "in the first step", "in the first epoch"):
            name = f"weights {when}, verify={verify}"
            errors[name] = error_with_other_weights(strategy, verify, when)
    return errors


def error_with_other_weights(strategy, verify, when):
    """Worker 1 changes a weight where no strategy sees it."""
    strategy.options = ExchangeOptions("top_k", verify=verify)
    model = compiled(strategy)

    def change(*_):
        (copy,) = strategy.experimental_local_results(model.layers[-1].bias.value)
        copy.assign_add([0.5] * 10)

    callback = keras.callbacks.Callback()
    if task_index() == 1:
        if when == "before fit":
            change()
        elif when == "in the first step":
            callback.on_train_batch_begin = lambda batch, logs=None: batch or change()
        else:
            callback.on_epoch_end = change
    try:
        model.fit(*data(), epochs=2, verbose=0, callbacks=[callback])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
