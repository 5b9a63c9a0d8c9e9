"""What the workers of `test_options.py` do; the test does the same in one process."""

from __future__ import annotations

import keras

from tests.distribute import multi_worker_functions as shared
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.compressors import TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.state.ledger import ledger_of

CASES = {
    "policy": {
        "compressor": {".*dense.*/kernel": TopK(0.1), "*": "block_sign"},
        "min_size": 0,
        "schedule": "all_gather",
    },
    "warm_up": {"compressor": "block_sign", "min_size": 0, "schedule": "two_phase", "warm_up": 40},
    "scale_residual": {"compressor": TopK(0.1), "min_size": 0, "scale_residual": True},
}
EXAMPLES = 512


def train(strategy, case):
    """A hundred batches, in one trace."""
    shared.use(strategy, **CASES[case])
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 20, 0.8)
    model = shared.compiled(strategy, optimizer=lambda: keras.optimizers.Adam(rate))
    x, y = shared.classification(EXAMPLES)
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


def every_case():
    strategy = MultiWorkerMirroredStrategy()
    return {case: train(strategy, case) for case in CASES}
