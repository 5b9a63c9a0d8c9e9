"""What the workers of `test_watch.py` do."""

from __future__ import annotations

import os
import threading
import time

import keras
import numpy as np
import tensorflow as tf

from tests.multi_process_functions import task_index
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.transport.of_strategy import transport_for


def compiled(strategy, metrics=()):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([32]), keras.layers.Dense(8)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, metrics=list(metrics))
    return model


def data(rows=64):
    random = np.random.RandomState(0)
    return random.randn(rows, 32).astype("float32"), random.randint(0, 8, rows)


def on_the_chief(action):
    """A callback that acts at the end of the first epoch, on worker 0 alone."""

    def act(epoch, logs):
        if epoch == 0 and task_index() == 0:
            action()

    return keras.callbacks.LambdaCallback(on_epoch_end=act)


def wait_in_vain(name):
    """The error of this worker."""
    strategy = MultiWorkerMirroredStrategy(timeout_seconds=4 if "busy" in name else 300)
    model = compiled(strategy)
    x, y = data()
    action = {
        "predict on the chief": lambda: model.predict(x, verbose=0),
        "a chief that is busy": lambda: time.sleep(12),
    }[name]
    try:
        model.fit(x, y, epochs=3, verbose=0, callbacks=[on_the_chief(action)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def end_early():
    """Worker 0 trains for one epoch of two, and its script ends."""
    strategy = MultiWorkerMirroredStrategy()
    model = compiled(strategy)
    epochs = 1 + task_index()
    try:
        model.fit(*data(), epochs=epochs, verbose=0)
        if task_index() == 0:
            transport_for(strategy).watch.finish()
    except Exception as error:
        print(f"ended by {type(error).__name__}: {error}", flush=True)


def many_steps(steps):
    """What they cost beyond the first ones."""
    strategy = MultiWorkerMirroredStrategy()
    metrics = ["accuracy", "sparse_categorical_crossentropy"]
    metrics += [keras.metrics.SparseTopKCategoricalAccuracy(k, name=f"top_{k}") for k in (2, 3, 5)]
    model = compiled(strategy, metrics)
    dataset = tf.data.Dataset.from_tensor_slices(data()).repeat().batch(16)
    seen = []

    def look(batch, logs):
        if batch in (steps // 3, steps - 1):
            seen.append((memory(), threading_count(), transport_for(strategy).watch.collectives()))

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(dataset, steps_per_epoch=steps, epochs=1, verbose=0, callbacks=[callback])
    between = steps - 1 - steps // 3
    (memory_0, threads_0, launched_0), (memory_1, threads_1, launched_1) = seen
    return {
        "kilobytes a step": (memory_1 - memory_0) / between,
        "threads": threads_1 - threads_0,
        "collectives a step": (launched_1 - launched_0) / between,
        "python threads": threading.active_count(),
    }


def memory():
    """Resident kilobytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def threading_count():
    """Threads of this process, TensorFlow's among them."""
    return len(os.listdir("/proc/self/task"))
