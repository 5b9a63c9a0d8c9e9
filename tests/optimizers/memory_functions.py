"""What the workers of `test_memory.py` and of some optimizers' tests do."""

from __future__ import annotations

import pathlib

import keras
import numpy as np

from tests.multi_process_functions import task_index
from tests.replicas import copies
from tfqcomm.callbacks import AverageReplicas
from tfqcomm.compressors import TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.optimizers import DeMo, DiLoCo, OneBitAdam, QAdam, SparseLoCo
from tfqcomm.state.ledger import ledger_of, memory_of


def save_on_the_chief_alone(path):
    """Trains, and saves without the other worker: nothing in it may wait for that one."""
    strategy = MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2)])
        model.compile(QAdam(0.05, compressor="log_grid", min_size=0), "mse")
    x = np.random.default_rng(0).normal(size=[16, 4]).astype("float32")
    model.fit(x, x[:, :2], batch_size=8, shuffle=False, verbose=0)
    if task_index() == 0:
        model.save(pathlib.Path(path))
    return {
        "own": memory_of(model.optimizer)["worker/m/0"],
        "mean": ledger_of(model.optimizer).state()["worker/m/0"],  # a collective
    }


def train_one_bit_adam(strategy=None):
    """Trains beyond the end of an automatic warm-up; what `test_one_bit_adam.py` compares."""
    strategy = strategy or MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        model.compile(OneBitAdam(0.01, beta_2=0.75, warm_up="auto", min_size=0), "mse")
    x = np.random.default_rng(0).normal(size=[256, 8]).astype("float32")
    model.fit(x, x[:, :4] ** 2, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return {
        "weights": model.get_weights(),
        "switched_after": model.optimizer.switched_after,
        "bytes": ledger_of(model.optimizer).meter.read().bytes_sent,
    }


def train_demo(strategy=None):
    """What `test_demo.py` compares."""
    strategy = strategy or MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        model.compile(DeMo(0.01, top=3, chunk=4), "mse")
    x = np.random.default_rng(0).normal(size=[256, 8]).astype("float32")
    model.fit(x, x[:, :4] ** 2, batch_size=32, epochs=2, shuffle=False, verbose=0)
    return {
        "weights": model.get_weights(),
        "state": ledger_of(model.optimizer).state(),
        "bytes": ledger_of(model.optimizer).meter.read().bytes_sent,
    }


class _KeepOwn(keras.callbacks.Callback):
    """Keeps the local replicas' weights of the last step, before the global ones are shown."""

    def on_train_batch_end(self, batch, logs=None):
        self.own = copies(self.model.distribute_strategy, self.model.weights)


def train_diloco_twice():
    """By itself, and with scaled losses."""
    strategy = MultiWorkerMirroredStrategy()
    return train_diloco(strategy), train_scaled_diloco(strategy)


def train_scaled_diloco(strategy):
    """Two epochs, the first of which ends between exchanges: replicas differ, as they should."""
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        inner = DiLoCo(keras.optimizers.Adam(0.01), 6)
        model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    x = np.random.default_rng(0).normal(size=[256, 8]).astype("float32")
    options = {"batch_size": 32, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(x, x[:, :4] ** 2, **options).history
    return {"loss": history["loss"], "steps": ledger_of(inner).meter.read().steps}


def train_sparse_loco(strategy=None):
    """As `train_diloco`, with few entries in two bits; the weights."""
    strategy = strategy or MultiWorkerMirroredStrategy()
    codec = TopK(0.25, value_dtype="table2", chunk=16)
    return train_diloco(strategy, lambda inner: SparseLoCo(inner, 6, codec, min_size=0))["global"]


def _diloco(inner):
    options = {"compressor": "block_int8", "schedule": "all_gather", "min_size": 0}
    return DiLoCo(inner, 6, fragments=2, **options)


def train_diloco(strategy, make=_diloco):
    """Sixteen steps, of which the last is behind the last exchange of either fragment."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(8), keras.layers.Dense(4)])
        model.compile(make(keras.optimizers.Adam(0.01)), "mse")
    x = np.random.default_rng(0).normal(size=[256, 8]).astype("float32")
    keep = _KeepOwn()
    options = {"batch_size": 32, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, x[:, :4] ** 2, callbacks=[AverageReplicas(), keep], **options)
    return {
        "global": model.get_weights(),
        "own": keep.own,
        "state": ledger_of(model.optimizer).state(),
        "bytes": ledger_of(model.optimizer).meter.read().bytes_sent,
    }
