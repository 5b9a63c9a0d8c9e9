"""What all scenarios share: small data, a small model, and how a run is written down."""

from __future__ import annotations

import contextlib
import warnings

import keras
import numpy as np

from tests.distribute.multi_worker_functions import BATCH, CLASSES, FEATURES, replicas, use
from tests.distribute.multi_worker_functions import classification as any_classification

EXAMPLES = 4 * BATCH
SCENARIOS = {}  # name -> function of (strategy, directory), which returns what a run has found
ON_ONE_DEVICE = set()  # those which MirroredStrategy cannot do: their yardstick is one device

Loss = keras.losses.SparseCategoricalCrossentropy


def scenario(function):
    """Adds a function to what two workers do, and what one process does to compare."""
    SCENARIOS[function.__name__] = function
    return function


def scenario_on_one_device(function):
    """Likewise, where a first batch does not split evenly."""
    ON_ONE_DEVICE.add(function.__name__)
    return scenario(function)


def classification(examples=EXAMPLES):
    """Inputs float32[n, 64] and classes int32[n]; `examples` rows of them."""
    return any_classification(examples)


def one_hot(y):
    return np.eye(CLASSES, dtype="float32")[y]


def begin(strategy, compressor=None):
    """Equal weights and names for every scenario, whatever ran before it."""
    use(strategy, compressor)
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    return strategy.scope()


def network(*between, **last):
    """Two dense layers, with `between` in between."""
    return keras.Sequential(
        [
            keras.Input([FEATURES]),
            keras.layers.Dense(16, activation="relu"),
            *between,
            keras.layers.Dense(CLASSES, **last),
        ]
    )


def compiled(strategy, *between, optimizer=None, metrics=("accuracy",), loss=None, **options):
    """The network, compiled in the strategy's scope with an optimizer that `optimizer()` makes."""
    with begin(strategy):
        model = network(*between)
        model.compile(
            optimizer() if optimizer else keras.optimizers.SGD(0.1, momentum=0.9),
            loss=loss or Loss(from_logits=True),
            metrics=list(metrics),
            **options,
        )
    return model


def fit(model, *data, epochs=2, **options):
    options = {"shuffle": False, "verbose": 0, "epochs": epochs, **options}
    if len(data) == 2:
        options.setdefault("batch_size", BATCH)
    return model.fit(*data, **options).history


def found(strategy, model, **values):
    """Weights on each replica, and whatever else must be the same everywhere."""
    return {"weights": replicas(strategy, model.weights), **values}


@contextlib.contextmanager
def without_warnings():
    """Keras warns of layers that get no gradient, which here is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
