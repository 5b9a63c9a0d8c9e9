"""AverageReplicas: who sees the average of replicas that differ, and that training does not."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest

from tests.replicas import assert_replicas_equal, copies, plain
from tests.rungs import slow_unless
from tfqcomm.callbacks import AverageReplicas, BackupAndRestore
from tfqcomm.optimizers import ElasticAveragingSGD, LeaderSGD, PeriodicAveragingSGD
from tfqcomm.state.ledger import ledger_of

FEATURES, BATCH = 6, 32
random = np.random.default_rng(0)
X = (random.normal(size=[256, FEATURES]) * np.linspace(0.5, 3, 256)[:, None]).astype("float32")
Y = (X.sum(axis=1) > 0.3).astype("int32")

leader_sgd = functools.partial(LeaderSGD, 0.1, 0.9, global_period=3)


def compiled(strategy, optimizer=leader_sgd):
    """With batch normalization: its statistics differ between replicas, too."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([FEATURES]), layers.Dense(8), layers.BatchNormalization(), layers.Dense(2)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss=loss, metrics=["accuracy"])
    return model


def fit(model, callbacks, epochs=2, **kwargs):
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=callbacks, **options).history


class Watcher(keras.callbacks.Callback):
    """Keeps every replica's weights at some moments."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def note(self, name):
        self.seen[name] = copies(self.model.distribute_strategy, self.model.weights)

    def on_train_batch_end(self, batch, logs=None):
        self.note("batch end")

    def on_test_batch_begin(self, batch, logs=None):
        self.note("validation")

    def on_epoch_end(self, epoch, logs=None):
        self.note(f"epoch {epoch} end")
        self.seen[f"epoch {epoch} own"] = self.seen["batch end"]

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.note("batch 0")


def assert_all_are_the_mean(shown, own):
    for i, values in enumerate(zip(*own, strict=True)):
        mean = np.mean(values, axis=0, dtype=np.float64)
        for replica in shown:
            np.testing.assert_allclose(replica[i], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(replica[i], shown[0][i])


@pytest.mark.slow
def test_a_replica_that_has_gone_wrong_takes_what_the_others_have():
    strategy = plain(3)
    model = compiled(strategy)
    fit(model, [], batch_size=48)
    bad_weights = strategy.experimental_local_results(model.layers[0].bias.value)[1]
    bad_statistics = strategy.experimental_local_results(model.layers[1].moving_mean.value)[2]
    own = copies(strategy, model.weights)
    bad_weights.assign([np.nan] * 8)
    bad_statistics.assign([np.inf] * 8)
    average = AverageReplicas()
    average.set_model(model)
    average.on_test_begin()
    mean = copies(strategy, model.weights)
    average.on_test_end()
    now = copies(strategy, model.weights)
    for i, variable in enumerate(model.weights):
        sick = 2 if "moving" in variable.path else 1
        others = [own[r][i] for r in range(3) if r != sick]
        np.testing.assert_allclose(mean[0][i], np.mean(others, axis=0), rtol=1e-5, atol=1e-6)
        for rank in range(3):
            right = mean[rank][i] if rank == sick else own[rank][i]
            np.testing.assert_array_equal(now[rank][i], right)


def differ(replicas):
    return [not np.array_equal(a, b) for a, b in zip(replicas[0], replicas[1], strict=True)]


@pytest.mark.parametrize(
    ("optimizer", "world"),
    slow_unless(
        lambda optimizer, world: optimizer is leader_sgd and world == 3,
        [
            (leader_sgd, 2),
            (leader_sgd, 3),
            (functools.partial(ElasticAveragingSGD, 0.1, period=5), 2),
            (functools.partial(PeriodicAveragingSGD, 0.1, period=5), 3),
        ],
    ),
    ids=lambda value: getattr(value, "func", int).__name__,
)
def test_validation_and_the_end_of_an_epoch_see_the_average(optimizer, world):
    watcher = Watcher()
    model = compiled(plain(world), optimizer)
    fit(
        model, [AverageReplicas(), watcher], validation_data=(X[:60], Y[:60]), batch_size=16 * world
    )
    own = watcher.seen["epoch 1 own"]
    assert all(differ(own))  # moving statistics among them
    assert_all_are_the_mean(watcher.seen["validation"], own)
    assert_all_are_the_mean(watcher.seen["epoch 1 end"], own)
    # and the next epoch goes on as if nobody had looked
    for one, two in zip(watcher.seen["epoch 0 own"], watcher.seen["batch 0"], strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_looking_does_not_change_the_training():
    results = []
    for callbacks in ([], [AverageReplicas()]):
        watcher = Watcher()
        fit(compiled(plain(2)), [*callbacks, watcher])
        results.append(watcher.seen["batch end"])
    for one, two in zip(*results, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_model_that_fit_leaves_is_the_average(tmp_path):
    strategy = plain(2)
    watcher, model = Watcher(), compiled(strategy)
    history = fit(model, [AverageReplicas(), watcher], validation_data=(X, Y))
    assert_replicas_equal(strategy, model.weights)
    assert_all_are_the_mean(copies(strategy, model.weights), watcher.seen["batch end"])

    loss, accuracy = model.evaluate(X, Y, batch_size=BATCH, verbose=0)
    assert (loss, accuracy) == (history["val_loss"][-1], history["val_accuracy"][-1])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    predicted = model.predict(X, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), predicted, rtol=1e-4, atol=1e-5)
    loaded.fit(X, Y, verbose=0)  # with the optimizer it was saved with, on one replica
    assert loaded.optimizer.iterations.numpy() == 16 + 8


def test_a_checkpoint_holds_the_average(tmp_path):
    path = tmp_path / "checkpoint.keras"
    model = compiled(plain(2))
    watcher = Watcher()
    fit(model, [AverageReplicas(), keras.callbacks.ModelCheckpoint(path), watcher], epochs=1)
    weights = [np.array(w) for w in keras.models.load_model(path).weights]
    assert_all_are_the_mean([weights], watcher.seen["epoch 0 own"])


@pytest.mark.slow
def test_early_stopping_restores_an_average():
    strategy = plain(2)
    model = compiled(strategy)
    stop = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True, patience=3)
    history = fit(model, [AverageReplicas(), stop], epochs=4, validation_data=(X, Y))
    assert_replicas_equal(strategy, model.weights)
    loss, _ = model.evaluate(X, Y, batch_size=BATCH, verbose=0)
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-5)


@pytest.mark.slow
def test_outside_of_fit_it_leaves_no_trace():
    strategy = plain(2)
    model = compiled(strategy)
    fit(model, [])
    before = copies(strategy, model.weights)
    assert all(differ(before))
    whole = model.evaluate(X, Y, batch_size=BATCH, verbose=0, callbacks=[AverageReplicas()])
    predicted = model.predict(X, batch_size=BATCH, verbose=0, callbacks=[AverageReplicas()])
    for one, two in zip(before, copies(strategy, model.weights), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    assert whole[1] == pytest.approx(np.mean(predicted.argmax(axis=1) == Y))
    fit(model, [AverageReplicas()], epochs=1)  # now the model itself is the average
    assert_replicas_equal(strategy, model.weights)


def test_on_a_single_replica_it_does_nothing():
    results = []
    for callbacks in ([], [AverageReplicas()]):
        model = compiled(plain())
        fit(model, callbacks, validation_data=(X, Y))
        results.append(model.get_weights())
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_backup_behind_it_holds_the_average(tmp_path):
    """A run that resumes starts from it on every replica, with the mean of their momentum."""
    strategy = plain(2)
    backup = functools.partial(BackupAndRestore, tmp_path, delete_checkpoint=False)
    first = compiled(strategy)
    fit(first, [AverageReplicas(), backup()], epochs=1)
    second, watcher = compiled(strategy), Watcher()
    fit(second, [AverageReplicas(), backup(), watcher])
    assert list(watcher.seen) == ["batch 0", "batch end", "epoch 1 end", "epoch 1 own"]
    for replica in watcher.seen["batch 0"]:
        for now, before in zip(replica, first.weights, strict=True):
            np.testing.assert_array_equal(now, before.numpy())

    third, restore = compiled(strategy), backup()
    restore.set_model(third)
    restore.on_train_begin()
    ledger = third.optimizer.ledger(strategy)
    right = ledger_of(second.optimizer).worker_state.mean()["momentum/0"]
    assert np.abs(right).max() > 0
    for replica in range(2):
        found = ledger.worker_state.variable(replica, "momentum", "0", [6, 8], 0.0)
        np.testing.assert_allclose(found.numpy(), right, rtol=1e-6)


def test_weights_of_float64_come_back_to_the_digit():
    """They were kept, and averaged, as float32."""
    keras.config.set_dtype_policy("float64")
    strategy = plain(2)
    model = compiled(strategy)
    (kernels,) = copies(strategy, [model.layers[0].kernel])[:1]
    own = [kernels[0] + 1 / 3, kernels[0] + 2 / 7]
    for local, value in zip(
        strategy.experimental_local_results(model.layers[0].kernel.value), own, strict=True
    ):
        local.assign(value)
    callback = AverageReplicas()
    callback.set_model(model)
    callback.on_test_begin()
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), (own[0] + own[1]) / 2)
    callback.on_test_end()
    for (kernel,), value in zip(copies(strategy, [model.layers[0].kernel]), own, strict=True):
        np.testing.assert_array_equal(kernel, value)
