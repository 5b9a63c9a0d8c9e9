"""What an optimizer remembers beside Keras' variables is saved with them, wherever these are."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.multi_process import run_workers
from tests.optimizers.memory_functions import save_on_the_chief_alone
from tests.replicas import plain
from tfqcomm import optimizers
from tfqcomm.state.ledger import memory_of

X = np.random.default_rng(0).normal(size=[16, 6]).astype("float32")
Y = X[:, :2] ** 2
OPTIMIZERS = {
    "QAdam": lambda: optimizers.QAdam(0.05, 0.5, compressor="identity", min_size=0),
    "LeaderSGD": lambda: optimizers.LeaderSGD(0.05, 0.9),
    "AdaptiveTopKSGD": lambda: optimizers.AdaptiveTopKSGD(
        0.05, 0.9, rule="threshold", budget=0.5, error_feedback=False, min_size=0
    ),
    "DiLoCo": lambda: optimizers.DiLoCo(keras.optimizers.Adam(0.05), every=4),  # within a round
    "Adam": lambda: keras.optimizers.Adam(0.05),  # what does not hold for it is wrong with the test
}
over_optimizers = pytest.mark.parametrize(
    "name",
    ["QAdam", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS if n != "QAdam")],
)


def compiled(name, world=1):
    keras.utils.set_random_seed(0)
    strategy = plain(world)
    with strategy.scope():
        layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile(OPTIMIZERS[name](), "mse")
    return model


def fit(model, epochs=3):
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    return model.fit(X, Y, epochs=epochs, **options).history["loss"]


@over_optimizers
def test_one_worker_goes_on_to_the_digit_from_a_saved_model(name, tmp_path):
    """The moments of its worker were forgotten, and it went on as if it had just begun.

    A budget was given back what was saved of it, but in every step anew.
    """
    model = compiled(name)
    fit(model)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    expected = fit(model)
    assert fit(keras.models.load_model(tmp_path / "model.keras")) == expected
    again = compiled(name)
    fit(again, 1)  # also into an optimizer that has begun to remember other things
    again.load_weights(tmp_path / "model.weights.h5")
    assert fit(again) == expected


@over_optimizers
def test_one_worker_goes_on_to_the_digit_from_a_checkpoint(name, tmp_path):
    model = compiled(name)
    fit(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "saved")
    expected = fit(model)
    again = compiled(name)
    again.optimizer.build(again.trainable_variables)
    tf.train.Checkpoint(model=again, optimizer=again.optimizer).restore(path).assert_consumed()
    assert fit(again) == expected


@pytest.mark.parametrize("name", [pytest.param("QAdam", marks=pytest.mark.slow), "LeaderSGD"])
def test_several_replicas_save_the_mean_of_what_they_remember(name, tmp_path):
    model = compiled(name, world=2)
    fit(model)
    slot = {"QAdam": "worker/m/0", "LeaderSGD": "worker/momentum/0"}[name]
    saved = memory_of(model.optimizer)[slot]
    model.save(tmp_path / "model.keras")
    path = tf.train.Checkpoint(optimizer=model.optimizer).save(tmp_path / "saved")

    alone = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(memory_of(alone.optimizer)[slot], saved)
    again = compiled(name, world=2)
    again.optimizer.build(again.trainable_variables)
    tf.train.Checkpoint(optimizer=again.optimizer).restore(path)
    np.testing.assert_array_equal(memory_of(again.optimizer)[slot], saved)
    assert np.abs(saved).max() > 0


def test_a_model_that_was_saved_without_it_loads_as_before(tmp_path):
    model = compiled("QAdam")
    fit(model)
    store = {}
    keras.optimizers.Optimizer.save_own_variables(model.optimizer, store)
    again = compiled("QAdam")
    again.optimizer.build(again.trainable_variables)
    again.optimizer.load_own_variables(store)
    assert again.optimizer.iterations.numpy() == 6
    assert memory_of(again.optimizer) == {}


def test_a_saved_model_is_written_as_ever(tmp_path):
    """It is written inside a graph, where nothing can be asked of a variable."""
    model = compiled("QAdam")
    fit(model, 1)
    tf.saved_model.save(model, str(tmp_path))
    assert (tmp_path / "saved_model.pb").exists()


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_chief_of_several_workers_saves_alone_what_its_own_replicas_remember(tmp_path):
    one, two = run_workers(save_on_the_chief_alone, args={"path": str(tmp_path / "model.keras")})
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(memory_of(loaded.optimizer)["worker/m/0"], one["own"])
    assert np.abs(one["own"] - two["own"]).max() > 1e-3
    for worker in (one, two):
        np.testing.assert_allclose(worker["mean"], (one["own"] + two["own"]) / 2, rtol=1e-6)
