"""A run that crashed goes on: right epoch, same weights, and what the residuals owe is not lost."""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import zipfile

import keras
import numpy as np
import pytest

from tests.callbacks import backup_functions as functions
from tests.multi_process import run_workers, start_workers
from tfqcomm.callbacks import BackupAndRestore, TrafficLogger
from tfqcomm.compressors import PowerSGD, TopK
from tfqcomm.distribute import CompressedAllReduce
from tfqcomm.optimizers import AdaptiveTopKSGD, ElasticAveragingSGD, LeaderSGD, QAdam
from tfqcomm.state.ledger import ledger_for, ledger_of, memory_of, restore_state
from tfqcomm.transport.local import LocalTransport


@pytest.fixture
def strategy(mirrored_strategy):
    """Returns a function: a strategy of n replicas that compresses."""

    def make(n, compressor="block_sign", **options):
        return mirrored_strategy(n, CompressedAllReduce(compressor, **options))

    return make


def read(path, name):
    return zipfile.ZipFile(path).read(name)


def saved_epoch(path):
    return json.loads(read(path, "training.json"))["epoch"]


def saved_residuals(path):
    with np.load(io.BytesIO(read(path, "exchange-0.npz"))) as state:
        return {name.removeprefix("residual/"): value for name, value in state.items()}


# --------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("backup_dir", ["", None])
def test_backup_dir_must_be_a_path(backup_dir):
    with pytest.raises(ValueError, match="Argument `backup_dir` must be a path. Received: backup_"):
        BackupAndRestore(backup_dir)


@pytest.mark.parametrize("save_freq", [0, -1, 2.0, "batch", True, None])
def test_save_freq_must_be_epoch_or_positive(save_freq):
    with pytest.raises(ValueError, match="Argument `save_freq` must be 'epoch' or a positive numb"):
        BackupAndRestore("backup", save_freq)


def test_model_must_be_built(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="BackupAndRestore needs a model that is built before"):
        model.fit(np.ones([4, 2]), np.ones([4]), verbose=0, callbacks=[BackupAndRestore(tmp_path)])


# ------------------------------------------------------------------------------- when, and what


def test_backup_of_each_epoch_is_deleted_at_the_end(tmp_path, strategy):
    backup = BackupAndRestore(tmp_path / "new" / "directory")
    found = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: found.append(
            saved_epoch(backup.path) if backup.path.exists() else None
        )
    )
    functions.train(functions.compiled(strategy(2)), backup, 3, callbacks=[record])
    assert found == [None, 1, 2]
    assert list(backup.backup_dir.iterdir()) == []


def test_a_finished_run_has_nothing_left_to_do(tmp_path, strategy):
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    model = functions.compiled(strategy(2))
    functions.train(model, backup, 2)
    assert saved_epoch(backup.path) == 2
    again = functions.compiled(strategy(2))
    assert functions.train(again, BackupAndRestore(tmp_path), 2).epoch == []
    for one, two in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not backup.path.exists()


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_backup_every_few_batches(tmp_path, monkeypatch, strategy, steps_per_execution):
    """Of the 6 batches of an epoch, going on across epochs: after batches 5, 10 and 15."""
    saved = []
    save = BackupAndRestore._save

    def record(self, epoch):
        saved.append((epoch, int(self.model.optimizer.iterations.numpy())))
        save(self, epoch)

    monkeypatch.setattr(BackupAndRestore, "_save", record)
    model = functions.compiled(strategy(2))
    model.steps_per_execution = steps_per_execution
    functions.train(model, BackupAndRestore(tmp_path, save_freq=5), 3)
    expected = {1: [(0, 5), (1, 10), (2, 15)], 2: [(0, 6), (1, 12), (2, 18)]}
    assert saved == expected[steps_per_execution]


def test_interrupted_within_an_epoch(tmp_path, strategy):
    """The epoch begins again, with the weights of the last backup."""
    model = functions.compiled(strategy(2))
    backup = BackupAndRestore(tmp_path, save_freq=3)
    with pytest.raises(functions.Interrupted):
        functions.train(model, backup, 9, callbacks=[functions.InterruptAt(1, 5)])
    again = functions.compiled(strategy(2))
    history = functions.train(again, BackupAndRestore(tmp_path, save_freq=3), 3)
    assert history.epoch == [1, 2]
    assert again.optimizer.iterations.numpy() == 9 + 2 * 6  # saved after 3, 6 and 9 batches


def test_weights_and_optimizer_are_restored(tmp_path, strategy):
    model = functions.compiled(strategy(2), lambda: keras.optimizers.Adam(1e-2))
    with pytest.raises(functions.Interrupted):
        functions.train(model, BackupAndRestore(tmp_path), 9, callbacks=[functions.InterruptAt(2)])
    again = functions.compiled(strategy(2), lambda: keras.optimizers.Adam(1e-2))
    restored = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: restored.append(
            (epoch, [v.numpy() for v in [*again.weights, *again.optimizer.variables]])
        )
    )
    functions.train(again, BackupAndRestore(tmp_path), 3, callbacks=[record])
    ((epoch, values),) = restored
    assert epoch == 2
    expected = [v.numpy() for v in [*model.weights, *model.optimizer.variables]]
    for one, two in zip(values, expected, strict=True):
        np.testing.assert_array_equal(one, two)


# ----------------------------------------------------------------------- crashes, while saving too


def test_a_crash_while_saving_leaves_the_last_backup(tmp_path, monkeypatch, strategy):
    model = functions.compiled(strategy(2))

    def crash(self):
        if self.model.optimizer.iterations.numpy() > 6:
            raise functions.Interrupted
        return weights_to_bytes(self)

    weights_to_bytes = BackupAndRestore._weights_to_bytes
    with monkeypatch.context() as patch, pytest.raises(functions.Interrupted):
        patch.setattr(BackupAndRestore, "_weights_to_bytes", crash)
        functions.train(model, BackupAndRestore(tmp_path), 9)
    backup = BackupAndRestore(tmp_path)
    assert (tmp_path / "backup.partial").exists()
    assert saved_epoch(backup.path) == 1
    again = functions.compiled(strategy(2))
    assert functions.train(again, backup, 3).epoch == [1, 2]


def test_a_partial_file_alone_is_ignored(tmp_path, strategy):
    (tmp_path / "backup.partial").write_bytes(b"half a backup")
    history = functions.train(functions.compiled(strategy(2)), BackupAndRestore(tmp_path), 2)
    assert history.epoch == [0, 1]


# --------------------------------------------------------------------- what the residuals owe


@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param((2, "all_gather"), (1, "all_gather"), marks=pytest.mark.slow),
        ((2, "all_gather"), (4, "two_phase")),
        pytest.param((4, "two_phase"), (2, "all_gather"), marks=pytest.mark.slow),
        pytest.param((2, "two_phase"), (3, "two_phase"), marks=pytest.mark.slow),
    ],
)
def test_debt_is_conserved_on_other_numbers_of_replicas(tmp_path, strategy, before, after):
    (replicas, schedule), (new_replicas, new_schedule) = before, after
    model = functions.train_and_crash(strategy(replicas, schedule=schedule), tmp_path)
    expected = functions.settled(model)
    assert np.abs(functions.owed(model)[0]).max() > 1e-3
    keras.backend.clear_session(free_memory=False)
    again = functions.resume_without_gradients(
        strategy(new_replicas, schedule=new_schedule), tmp_path
    )
    assert again.optimizer.iterations.numpy() == 2 * 6 + 1
    for one, two in zip(functions.settled(again), expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_debt_is_restored_whatever_the_layers_are_called(tmp_path, strategy):
    """A notebook's cell, run again: `dense` is now `dense_2`."""
    model = functions.train_and_crash(strategy(2), tmp_path)
    again = functions.resume_without_gradients(strategy(2), tmp_path)
    assert [v.path for v in model.weights] != [v.path for v in again.weights]
    for one, two in zip(functions.settled(again), functions.settled(model), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_model_with_two_optimizers(tmp_path, strategy):
    def make():
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        place = strategy(2)
        with place.scope():
            model = functions.TwoOptimizers()
            model.compile(keras.optimizers.Adam(1e-2))
            model.optimizer.build(model.first.trainable_variables)
            model.second_optimizer.build(model.second.trainable_variables)
        return model

    model = make()
    with pytest.raises(functions.Interrupted):
        functions.train(model, BackupAndRestore(tmp_path), 9, callbacks=[functions.InterruptAt(1)])
    names = zipfile.ZipFile(tmp_path / "backup.zip").namelist()
    assert {"exchange-0.npz", "exchange-1.npz"} <= set(names)
    again = make()
    functions.train(again, BackupAndRestore(tmp_path), 3)
    for optimizer in (again.optimizer, again.second_optimizer):
        assert optimizer.iterations.numpy() == 18


@pytest.mark.slow
@pytest.mark.parametrize("container", [None, list, dict])
def test_optimizers_that_are_built_in_the_first_step_resume_where_they_were(
    tmp_path, strategy, container
):
    """They went on with iterations of 0 and no moments, behind a warning that was not an error."""

    def make():
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        with strategy(2).scope():
            model = functions.TwoOptimizers()
            second = model.second_optimizer
            if container is list:
                model.second_optimizer = [second]
            elif container is dict:
                model.second_optimizer = {"second": second}
            model.compile(keras.optimizers.Adam(1e-2))
        return model, second

    model, second = make()
    with pytest.raises(functions.Interrupted):
        functions.train(model, BackupAndRestore(tmp_path), 9, callbacks=[functions.InterruptAt(1)])
    again, second_again = make()
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: seen.append(
            [v.numpy() for o in (again.optimizer, second_again) for v in o.variables]
        )
    )
    functions.train(again, BackupAndRestore(tmp_path), 2, callbacks=[record])
    expected = [v.numpy() for o in (model.optimizer, second) for v in o.variables]
    np.testing.assert_equal(seen[0], expected)
    assert (again.optimizer.iterations.numpy(), second_again.iterations.numpy()) == (12, 12)


@pytest.mark.slow
def test_a_fit_after_the_resumed_one_trains(tmp_path, strategy):
    model = functions.compiled(strategy(2))
    with pytest.raises(functions.Interrupted):
        functions.train(model, BackupAndRestore(tmp_path), 9, callbacks=[functions.InterruptAt(2)])
    again = functions.compiled(strategy(2))
    assert functions.train(again, BackupAndRestore(tmp_path), 3).epoch == [2]
    x, y = functions.classification()
    assert again.fit(x, y, batch_size=functions.BATCH, epochs=2, verbose=0).epoch == [0, 1]


@pytest.mark.slow
def test_what_is_owed_is_paid_where_nothing_is_compressed_any_more(tmp_path, strategy):
    """Half of the entries sent to 4 replicas cost more than all: they travel dense, unfed."""
    half = {"compressor": TopK(0.5), "schedule": "auto", "min_size": 0}
    model = functions.train_and_crash(strategy(2, **half), tmp_path)
    expected = functions.settled(model)
    assert max(np.abs(debt).max() for debt in functions.owed(model)) > 1e-3
    again = functions.resume_without_gradients(strategy(4, **half), tmp_path)
    routes = ledger_of(again.optimizer).routes
    assert {route.schedule for route in routes} == {"dense"}
    for debt in functions.owed(again):
        np.testing.assert_array_equal(debt, np.zeros_like(debt))
    for weight, right in zip(again.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, right, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_what_is_owed_stays_in_a_backup_until_it_is_paid(tmp_path, strategy):
    """A backup before the first step held nothing of what had just been restored."""
    functions.train_and_crash(strategy(2), tmp_path)
    with np.load(io.BytesIO(read(tmp_path / "backup.zip", "exchange-0.npz"))) as state:
        saved = dict(state)
    optimizer = keras.optimizers.SGD()
    restore_state(optimizer, saved)
    ledger = ledger_for(optimizer, LocalTransport())
    np.testing.assert_equal(ledger.state(), saved)


OLD = pathlib.Path(__file__).parent / "data"
OPTIMIZERS = {
    "qadam": lambda: QAdam(0.01, compressor="log_grid", min_size=0, schedule="all_gather"),
    "adaptive": lambda: AdaptiveTopKSGD(
        0.1, 0.5, budget=0.25, rule="threshold", min_size=0, total_steps=50
    ),
    "leader": lambda: LeaderSGD(0.05, 0.5, global_period=2, loss_window=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("alternate", [False, True])
def test_the_warm_start_of_power_sgd_is_kept(tmp_path, strategy, alternate):
    """A run of two replicas goes on with four, from the factors that it had."""
    options = {"compressor": PowerSGD(2, alternate=alternate), "min_size": 0}
    model = functions.train_and_crash(strategy(2, **options), tmp_path)
    kept = {k: v for k, v in memory_of(model.optimizer).items() if k.startswith("factors/")}
    sides = ("left", "right") if alternate else ("right",)
    assert kept.keys() == {"factors/step", *(f"factors/{s}/{key}" for s in sides for key in "02")}
    again = functions.compiled(strategy(4, **options))
    found = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: found.append(memory_of(again.optimizer))
    )
    functions.train(again, BackupAndRestore(tmp_path), 9, callbacks=[record])
    for name, value in kept.items():
        np.testing.assert_array_equal(found[0][name], value)
        assert (found[-1][name] != value).any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_backups_of_earlier_versions_go_on_loading(tmp_path, mirrored_strategy, kind):
    """Written by 0.1.0 before it kept more: the names of members and keys are promises."""
    shutil.copy(OLD / f"backup_0.1.0_{kind}.zip", tmp_path / "backup.zip")
    with np.load(io.BytesIO(read(tmp_path / "backup.zip", "exchange-0.npz"))) as state:
        expected = dict(state)
    with mirrored_strategy(2).scope():
        layers = [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
        model = keras.Sequential([keras.Input([6]), *layers])
        model.compile(OPTIMIZERS[kind](), "mse")
    callback = BackupAndRestore(tmp_path, delete_checkpoint=False)
    x = np.zeros([16, 6], "float32")
    history = model.fit(x, x[:, :2], batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    assert (history.epoch, model.optimizer.iterations.numpy()) == ([], 8)
    with np.load(io.BytesIO(read(OLD / f"backup_0.1.0_{kind}.zip", "exchange-0.npz"))) as state:
        expected = dict(state)
    remembered = memory_of(model.optimizer)
    for name, value in expected.items():
        if not name.startswith("residual/"):
            np.testing.assert_array_equal(remembered[name], value)
    model.fit(x, x[:, :2], batch_size=4, epochs=1, verbose=0)
    assert ledger_of(model.optimizer).residuals.total().keys() == {
        name.removeprefix("residual/") for name in expected if name.startswith("residual/")
    }


@pytest.mark.slow
def test_the_centre_of_elastic_averaging_is_kept(tmp_path, mirrored_strategy):
    """A restored run began with a new one, the mean of the replicas."""

    def optimizer():
        return ElasticAveragingSGD(0.05, beta=0.5, period=2)

    model = functions.compiled(mirrored_strategy(2), optimizer)
    with pytest.raises(functions.Interrupted):
        functions.train(model, BackupAndRestore(tmp_path), 9, callbacks=[functions.InterruptAt(1)])
    centre = model.optimizer.shared["center"].numpy()
    again = functions.compiled(mirrored_strategy(2), optimizer)
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    functions.train(again, backup, 2, callbacks=[functions.StopAfter(1)])
    np.testing.assert_array_equal(again.optimizer.shared["center"].numpy(), centre)


# ----------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def left_by_two_workers(tmp_path_factory):
    directories = {s: str(tmp_path_factory.mktemp(s)) for s in ("all_gather", "two_phase")}
    args = {"backup_dirs": directories}
    results = run_workers(functions.crash_and_resume_on_two_workers, args=args, timeout=300)
    return directories, results


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("replicas", "schedule"), [(2, "all_gather"), (1, "two_phase"), (4, "two_phase")]
)
def test_two_workers_crash_and_others_go_on(left_by_two_workers, strategy, schedule, replicas):
    directories, results = left_by_two_workers
    before = [worker[schedule]["before"] for worker in results]
    if replicas == 2:
        after = [worker[schedule]["after"] for worker in results]
    else:
        place = strategy(replicas, schedule=schedule)
        model = functions.resume_without_gradients(place, directories[schedule])
        after = [functions.settled(model)] * 2
    for one, two in zip([*before[0], *before[0]], [*after[0], *after[1]], strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.multi_process
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_killed_worker_and_a_restart_of_both(tmp_path, strategy):
    args = {"backup_dir": str(tmp_path), "epochs": 8}
    with start_workers(functions.train_through_a_crash, args=args) as running:
        running.wait_for_output(0, "epoch 3 begins", timeout=240)
        running.kill(1)
        running.wait_for_output(0, "interrupted by", timeout=60)
        running.kill(0)
        path = tmp_path / "backup.zip"
        epoch, residuals = saved_epoch(path), saved_residuals(path)
        for i in range(2):
            running.restart(i)
        results = running.wait(timeout=240)
    assert epoch >= 3
    for worker in results:
        assert worker["epochs"] == list(range(epoch, 8))
        assert worker["restored"].keys() == residuals.keys()
        for key, value in residuals.items():
            np.testing.assert_array_equal(worker["restored"][key], value)
            assert np.abs(value).max() > 0
    for one, two in zip(*(worker["weights"] for worker in results), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not path.exists()

    model = functions.compiled(strategy(2, "top_k"), lambda: keras.optimizers.Adam(1e-2))
    without_crash = functions.train(model, TrafficLogger(verbose=0), 8).history["accuracy"][-1]
    assert results[0]["accuracy"] == pytest.approx(without_crash, abs=0.05)
    assert without_crash > 0.6
