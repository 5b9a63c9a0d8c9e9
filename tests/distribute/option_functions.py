"""What the workers of `test_options.py` do; the test does the same in one process."""

from __future__ import annotations

import keras
import numpy as np

from tests.distribute import multi_worker_functions as shared
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.compressors import AdaptiveTopK, TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.state.ledger import ledger_of

SHARES = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=20, decay_rate=0.5)
CASES = {
    "policy": {
        "compressor": {".*dense.*/kernel": TopK(0.1), "*": "block_sign"},
        "min_size": 0,
        "schedule": "all_gather",
    },
    "warm_up": {"compressor": "block_sign", "min_size": 0, "schedule": "two_phase", "warm_up": 40},
    "scale_residual": {"compressor": TopK(0.1), "min_size": 0, "scale_residual": True},
    "accumulate": {"compressor": "block_sign", "min_size": 0, "accumulate": 3},
    "shared_support": {"compressor": TopK(0.1, support="shared"), "min_size": 0},
    "majority_vote": {"compressor": "block_sign", "min_size": 0, "schedule": "majority_vote"},
    "ratio_schedule": {"compressor": AdaptiveTopK(SHARES, rule="fixed"), "min_size": 0},
    "rows": {"compressor": None, "embedding_rows": "int8"},
}
EXAMPLES = 512


def train(strategy, case, dealt=None):
    """A hundred batches.

    Args:
        dealt: a new order for the equal parts of each batch.
    """
    shared.use(strategy, **CASES[case])
    if "embedding_rows" in CASES[case]:
        return train_embedding(strategy, dealt)
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 20, 0.8)
    model = shared.compiled(strategy, optimizer=lambda: keras.optimizers.Adam(rate))
    return found_by(strategy, model, *shared.classification(EXAMPLES), dealt)


def found_by(strategy, model, x, y, dealt):
    if dealt:
        parts = len(dealt), shared.BATCH // len(dealt)
        x, y = (a.reshape(-1, *parts, *a.shape[1:])[:, dealt].reshape(a.shape) for a in (x, y))
    traffic = TrafficLogger(verbose=0)
    history = shared.fit(model, x, y, 6, callbacks=[traffic])
    return {
        "weights": shared.replicas(strategy, model.weights),
        "history": history,
        "traffic": traffic.history,
        "iterations": int(model.optimizer.iterations.numpy()),
        "routes": [(route.schedule, route.codec) for route in ledger_of(model.optimizer).routes],
        "owed": ledger_of(model.optimizer).state(),
    }


def train_embedding(strategy, dealt):
    """Batches whose replicas look up other numbers of rows, some of them twice."""
    shared.fresh()
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([8], dtype="int32"),
                layers.Embedding(70_000, 12),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3),
            ]
        )
        model.compile(
            keras.optimizers.Adam(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    random = np.random.RandomState(0)
    y = random.randint(0, 3, [512]).astype("int32")
    x = y[:, None] * 20_000 + random.zipf(1.5, [512, 8]) % 9_000
    return found_by(strategy, model, x.astype("int32"), y, dealt)


def every_case(cases=tuple(CASES), devices=None):
    strategy = MultiWorkerMirroredStrategy(devices_per_worker=devices)
    return {case: train(strategy, case) for case in cases}
