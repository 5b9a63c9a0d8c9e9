"""Variables of several workers are compared all at once, and equal where they were not."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.multi_process import run_workers
from tests.multi_process_functions import task_index
from tfqcomm.distribute import MultiWorkerMirroredStrategy
from tfqcomm.transport.of_strategy import transport_for

pytestmark = pytest.mark.multi_process


def make_models():
    """What two workers have, whose seeds differ, and how many collectives it took."""
    strategy = MultiWorkerMirroredStrategy()
    watch = transport_for(strategy).watch
    before = watch.collectives()
    keras.utils.set_random_seed(task_index())
    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), *[keras.layers.Dense(3) for _ in range(30)]])
        model.compile("adam", "mse")
        words = tf.Variable(["chief", "text"] if task_index() == 0 else ["other", "words, longer"])
        alone = tf.Variable(
            tf.random.uniform([2]), synchronization=tf.VariableSynchronization.ON_READ
        )
    for_a_model = watch.collectives() - before
    model.fit(np.ones([8, 3]), np.ones([8, 3]), batch_size=4, verbose=0)
    (copy,) = strategy.experimental_local_results(alone)
    return {
        "weights": [v.numpy() for v in [*model.variables, *model.optimizer.variables]],
        "words": strategy.experimental_local_results(words)[0].numpy().tolist(),
        "alone": copy.numpy(),
        "collectives": for_a_model,
        "before the second step": watch.collectives() - before,
    }


@pytest.mark.slow
def test_all_that_is_made_in_a_scope_is_compared_in_a_few_collectives():
    first, second = run_workers(make_models)
    for one, two in zip(first["weights"], second["weights"], strict=True):
        np.testing.assert_array_equal(one, two)
    assert first["words"] == second["words"] == [b"chief", b"text"]
    np.testing.assert_array_equal(first["alone"], second["alone"])
    assert first["collectives"] <= 10  # however many variables there are
    assert first["before the second step"] <= 30  # of 60 weights and 122 slots
