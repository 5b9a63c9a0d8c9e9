"""What Keras users do, as functions of a strategy: for two workers, and for one process.

Importing TensorFlow is most of what a worker costs: one pair of workers does everything, under one
strategy, and returns what it found for `test_scenarios.py` to judge.
"""

import keras

from tests.distribute.multi_worker_functions import attempt
from tests.distribute.scenarios import callbacks, data, loops, models
from tests.distribute.scenarios.tools import ON_ONE_DEVICE, SCENARIOS

__all__ = ["ON_ONE_DEVICE", "SCENARIOS", "callbacks", "data", "loops", "models", "on_two_workers"]


def on_two_workers(names, directory):
    """What each scenario found, or the traceback of its error."""
    from tfqcomm.distribute import MultiWorkerMirroredStrategy

    strategy = MultiWorkerMirroredStrategy()
    found = {}
    for name in names:
        keras.utils.set_random_seed(0)  # as every test begins: layers draw when they are made
        found[name] = attempt(SCENARIOS[name], strategy, directory)
    return found
