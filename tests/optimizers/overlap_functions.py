"""What the workers of `test_overlapped_diloco.py` do."""

from __future__ import annotations

import time

import keras
import numpy as np

from tests.replicas import copies
from tfqcomm.callbacks import AverageReplicas
from tfqcomm.compressors import TopK
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.optimizers import DiLoCo
from tfqcomm.state.ledger import ledger_of, restore_state
from tfqcomm.transport import in_flight

X = np.random.default_rng(0).normal(size=[96, 6]).astype("float32")
Y = X[:, :2] ** 2
RUNS = {  # by what moves the differences
    "dense": {"compressor": None},
    "several steps a call": {"compressor": None, "steps_per_execution": 4},
    "all_gather": {"compressor": TopK(0.3), "schedule": "all_gather", "min_size": 0},
    "two_phase": {"compressor": "block_int8", "schedule": "two_phase", "min_size": 0},
    "warm_up": {"compressor": TopK(0.3), "schedule": "all_gather", "min_size": 0, "warm_up": 10},
}
ONE_ROUND = ("dense", "several steps a call", "all_gather", "warm_up")


def compiled(strategy, every=6, steps_per_execution=1, **options):
    """A model of four variables that trains with Adam inside."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input([6]), *layers])
        optimizer = DiLoCo(keras.optimizers.Adam(0.02), every, **options)
        model.compile(optimizer, "mse", steps_per_execution=steps_per_execution)
    return model


def fit(model, epochs, *callbacks):
    """Eight steps an epoch."""
    options = {"batch_size": 12, "epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(X, Y, callbacks=list(callbacks), **options)
    return model


class _Starts:
    """Counts what is started while a `with` block runs."""

    def __enter__(self):
        self.count, self._start = 0, in_flight.Flights.start

        def start(flights, *args):
            self.count += 1
            return self._start(flights, *args)

        in_flight.Flights.start = start
        return self

    def __exit__(self, *error):
        in_flight.Flights.start = self._start


def results(strategy, **options):
    """Of 32 steps: two fragments, each merged two steps after it was sent."""
    model = compiled(strategy, fragments=2, overlap=2, merge=0.5, **options)
    with _Starts() as starts:
        fit(model, 4)
    ledger = ledger_of(model.optimizer)
    return {
        "own": copies(strategy, model.weights),
        "state": ledger.state(),
        "bytes": ledger.meter.read().bytes_sent,
        "started": starts.count,
    }


def train_overlapped(names, devices):
    """Some of `RUNS`."""
    strategy = MultiWorkerMirroredStrategy(devices_per_worker=devices)
    return {name: results(strategy, **RUNS[name]) for name in names}


class _Events(keras.callbacks.Callback):
    """Notes the end of each step."""

    def __init__(self):
        super().__init__()
        self.events = []

    def on_train_batch_end(self, batch, logs=None):
        self.events.append(f"step {batch + 1}")


def train_beside_a_slow_exchange():
    """What happens in the first epoch: sent with step 4, merged with step 7."""
    strategy, callback = MultiWorkerMirroredStrategy(), _Events()
    launch, start = in_flight._launch, in_flight.Flights.start

    def slowly(*args):
        time.sleep(3)
        result = launch(*args)
        callback.events.append("arrived")
        return result

    def noted(*args):
        callback.events.append("sent")
        return start(*args)

    in_flight._launch, in_flight.Flights.start = slowly, noted
    fit(compiled(strategy, 4, overlap=3), 1, callback)
    return callback.events[: callback.events.index("step 7") + 1]


def train_and_go_back():
    """Goes back to where it was while something of a later time is under way."""
    strategy = MultiWorkerMirroredStrategy()
    model = fit(compiled(strategy, 7, overlap=4, **RUNS["all_gather"]), 1)
    saved = ledger_of(model.optimizer).state()
    fit(model, 1)  # 16 steps: sent with step 14
    restore_state(model.optimizer, saved)
    model.optimizer.iterations.assign(8)
    fit(model, 3, AverageReplicas())
    state = ledger_of(model.optimizer).state()
    return {"weights": model.get_weights(), "sent_at": int(state["shared/sent_at/0_of_1"])}


def train_for_ever():
    """Returns the error that ends it, and how long the step took in which it came."""
    strategy = MultiWorkerMirroredStrategy()
    model = compiled(strategy, 3, overlap=2, merge=0.5)
    began = time.monotonic()

    class Report(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            nonlocal began
            began = time.monotonic()

        def on_train_batch_end(self, batch, logs=None):
            if batch == 5:
                print("training", flush=True)

    try:
        fit(model, 1_000_000, Report())
    except Exception as error:
        print("ended", flush=True)
        return f"{type(error).__name__}: {error}", time.monotonic() - began
