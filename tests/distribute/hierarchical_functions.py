"""What the workers of `test_hierarchical.py` do: steps with given gradients, and a crash."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.callbacks import backup_functions
from tests.replicas import build, copies, random_gradients
from tfqcomm.compressors import TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.optimizers import AdaptiveTopKSGD, DiLoCo, QAdam
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions

PROCESSES, DEVICES, STEPS = 2, 2, 12
REPLICAS = PROCESSES * DEVICES
SHAPES = [(40, 30), (25, 20), (7,)]
CASES = {  # options of a strategy
    "policy": {
        "compressor": {"variable0": TopK(0.1), "variable1": "block_sign", "*": None},
        "warm_up": 3,
    },
    "two_phase": {"compressor": "block_sign", "schedule": "two_phase", "accumulate": 2},
    "dense": {"compressor": "bfloat16", "scale_residual": True},
    "shared_support": {"compressor": TopK(0.1, support="shared"), "bucket_mb": 0.003},
}


def gradients() -> list[np.ndarray]:
    """For each variable [steps, replicas, ...], of few bits: sums in any order are exact."""
    rng = np.random.default_rng(0)
    return [
        rng.integers(-99, 100, [STEPS, REPLICAS, *shape]).astype("float32") / 64 for shape in SHAPES
    ]


def train(strategy, options, given, optimizer=None):
    """Applies gradients step by step, in a function that ought to be traced once."""
    strategy.options = ExchangeOptions(**{"min_size": 0, **options})
    keras.backend.clear_session(free_memory=False)
    rate = keras.optimizers.schedules.ExponentialDecay(0.125, 4, 0.5, staircase=True)
    optimizer, variables = build(
        strategy, optimizer or (lambda: keras.optimizers.SGD(rate)), [g.shape[2:] for g in given]
    )
    world = strategy.num_replicas_in_sync

    def replica_step(now):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([g[rank] / world for g in now], variables)

    @tf.function
    def step(now):
        strategy.run(replica_step, args=(now,))

    history = []
    for number in range(len(given[0])):
        step([tf.constant(g[number]) for g in given])
        history.append(copies(strategy, variables))
    ledger = ledger_of(optimizer)
    return {
        "history": history,
        "traced": step.experimental_get_tracing_count(),
        "traffic": ledger.meter.read(),
        "owed": ledger.state(),
        "routes": [(r.schedule, r.codec) for r in ledger.routes],
    }


QADAM = {"beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-4}


def qadam():
    """Its messages are no gradients: each replica's moments are its own."""
    return QAdam(0.01, compressor=TopK(0.1), min_size=0, hierarchical=True, **QADAM)


def diloco(hierarchical):
    """Replicas that train alone: of SGD the mean of their ways is that of the mean gradient."""
    inner = keras.optimizers.SGD(0.1)
    return DiLoCo(inner, 2, compressor=TopK(0.1), min_size=0, hierarchical=hierarchical)


def momentum_corrected():
    """What a worker remembers is masked by what its process has sent."""
    return AdaptiveTopKSGD(
        0.1, 0.9, budget=0.1, momentum_correction=True, min_size=0, hierarchical=True
    )


def on_two_workers(backup_dir):
    """Each case; then a run that crashes, and goes on."""
    strategy = MultiWorkerMirroredStrategy(devices_per_worker=DEVICES)
    found = {
        name: train(strategy, {**case, "hierarchical": True}, gradients())
        for name, case in CASES.items()
    }
    given = random_gradients(STEPS, REPLICAS, SHAPES)
    found["qadam"] = train(strategy, {"compressor": None}, given, qadam)
    for name, optimizer in (("diloco", lambda: diloco(True)), ("masked", momentum_corrected)):
        found[name] = train(strategy, {"compressor": None}, given, optimizer)
    strategy.options = ExchangeOptions(TopK(0.1), hierarchical=True)
    before = backup_functions.settled(backup_functions.train_and_crash(strategy, backup_dir))
    model = backup_functions.resume_without_gradients(strategy, backup_dir)
    found["backup"] = {
        "before": before,
        "after": backup_functions.settled(model),
        "owed": backup_functions.owed(model),
    }
    return found
