"""Workers that are given callbacks with the same paths; two of them, as threads of this process."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib

import keras
import numpy as np
import pytest

from tests.distribute.threads import Rendezvous, Transport
from tfqcomm.distribute import files


def model():
    built = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    built.compile("sgd", "mse")
    return built


def on_workers(make_callbacks, work, processes=2):
    """Calls `work(rank, callbacks)` of each worker in the scope, and returns all results."""
    rendezvous = Rendezvous(processes)
    models = [model() for _ in range(processes)]

    def run(rank):
        callbacks = make_callbacks(rank)
        with files.one_writer_per_path(callbacks, Transport(rendezvous, rank)):
            for callback in callbacks:
                callback.set_model(models[rank])
            return work(rank, callbacks)

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


def train(rank, callbacks, losses=(3.0, 2.0, 2.5)):
    """What `fit` calls; the losses of the epochs are given."""
    for hook, *args in [
        ("on_train_begin",),
        *(("on_epoch_end", epoch, {"loss": loss}) for epoch, loss in enumerate(losses)),
        ("on_train_end",),
    ]:
        for callback in callbacks:
            getattr(callback, hook)(*args)
    return callbacks


def saved_models(directory):
    return sorted(path.name for path in pathlib.Path(directory).rglob("*.keras"))


# ---------------------------------------------------------------------------------- the same path


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_with_one_path_are_written_once_and_judged_everywhere(tmp_path, weights_only):
    saved = []

    class Checkpoint(keras.callbacks.ModelCheckpoint):
        def __init__(self, rank, path):
            super().__init__(
                path, "loss", save_best_only=True, save_weights_only=weights_only, mode="min"
            )
            self.rank = rank

        def set_model(self, model):
            super().set_model(model)
            save = type(model).save_weights if weights_only else type(model).save
            name = "save_weights" if weights_only else "save"

            def record(*args, **kwargs):
                saved.append(self.rank)
                save(model, *args, **kwargs)

            setattr(model, name, record)

    path = tmp_path / "run" / ("best.weights.h5" if weights_only else "best.keras")
    found = on_workers(lambda rank: [Checkpoint(rank, path)], train)
    assert saved == [0, 0]  # of three epochs, the second was the best
    assert [float(callback.best) for (callback,) in found] == [2.0, 2.0]
    assert [callback.filepath for (callback,) in found] == [str(path)] * 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if weights_only:
        model().load_weights(path)
    else:
        keras.models.load_model(path)


def test_a_subclass_that_saves_in_a_hook_of_its_own_is_silenced_too(tmp_path):
    class AtTheEnd(keras.callbacks.ModelCheckpoint):
        def on_train_end(self, logs=None):
            self.model.save(tmp_path / f"end-{self.rank}.keras")

    def callbacks(rank):
        callback = AtTheEnd(tmp_path / "model.keras")
        callback.rank = rank
        return [callback]

    on_workers(callbacks, train)
    assert saved_models(tmp_path) == ["end-0.keras", "model.keras"]


def test_callbacks_and_models_are_afterwards_as_before(tmp_path):
    def make(rank):
        return [
            keras.callbacks.ModelCheckpoint(tmp_path / "model.keras", verbose=1),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TensorBoard(tmp_path / "logs"),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        ]

    def outlines(callbacks):
        paths = {str, pathlib.PosixPath}
        return [
            {name: value for name, value in vars(c).items() if type(value) in paths}
            for c in callbacks
        ]

    chief, other = on_workers(make, lambda rank, callbacks: callbacks)
    assert outlines(other) == outlines(chief)
    for callback in other:
        assert not [name for name in vars(callback) if name.startswith("on_")]
    assert other[0].verbose == 1
    trained = on_workers(make, train)[1][0].model
    assert not {"save", "save_weights", "export"} & vars(trained).keys()


def test_the_csv_log_has_one_line_for_each_epoch(tmp_path):
    on_workers(lambda rank: [keras.callbacks.CSVLogger(tmp_path / "log.csv")], train)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 3
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_tensorboard_of_the_others_goes_beneath_that_of_the_chief(tmp_path):
    on_workers(
        lambda rank: [keras.callbacks.TensorBoard(str(tmp_path), write_graph=False)], train, 3
    )
    events = {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("events*")}
    assert {str(path) for path in events} == {"train", "worker_1/train", "worker_2/train"}


@pytest.mark.parametrize("link", [False, True], ids=["relative", "symbolic link"])
def test_other_names_of_the_same_path_are_seen_through(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    other = "link/log.csv" if link else "real/../real/log.csv"
    names = [str(tmp_path / "real" / "log.csv"), other]
    on_workers(lambda rank: [keras.callbacks.CSVLogger(names[rank])], train)
    assert len((tmp_path / "real" / "log.csv").read_text().splitlines()) == 1 + 3


def test_it_is_said_once(tmp_path, caplog):
    for _ in range(2):
        on_workers(lambda rank: [keras.callbacks.CSVLogger(tmp_path / "log.csv")], train)
    messages = [r.message for r in caplog.records if "log.csv" in r.message]
    assert len(messages) == 1
    assert f"CSVLogger: several workers were given the path {tmp_path / 'log.csv'}" in messages[0]


# ------------------------------------------------------------------------------- paths of one's own


def test_the_tutorials_way_another_directory_for_the_others_keeps_working(tmp_path):
    def callbacks(rank):
        place = tmp_path if rank == 0 else tmp_path / f"workertemp_{rank}"
        return [
            keras.callbacks.ModelCheckpoint(place / "model.keras"),
            keras.callbacks.BackupAndRestore(place / "backup", delete_checkpoint=False),
        ]

    on_workers(callbacks, train)
    for place in (tmp_path, tmp_path / "workertemp_1"):
        assert {path.name for path in place.iterdir()} >= {"model.keras", "backup"}
        assert (place / "backup" / "training_metadata.json").exists()


def test_of_workers_that_share_a_path_but_not_the_chiefs_the_first_writes(tmp_path):
    names = ["chief.keras", "other.keras", "other.keras"]
    found = on_workers(
        lambda rank: [keras.callbacks.ModelCheckpoint(tmp_path / names[rank])],
        lambda rank, callbacks: pathlib.Path(callbacks[0].filepath).parent,
        3,
    )
    assert found[:2] == [tmp_path] * 2
    assert found[2] != tmp_path


def test_a_callback_on_the_chief_alone_is_left_alone(tmp_path):
    def callbacks(rank):
        return [keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")] if rank == 0 else []

    on_workers(callbacks, train)
    assert saved_models(tmp_path) == ["model.keras"]


def test_one_process_asks_nobody():
    class Alone:
        processes = 1

    with files.one_writer_per_path([keras.callbacks.CSVLogger("log.csv")], Alone()):
        pass


# ----------------------------------------------------------------------------------------- backups


def leave_backup(directory, epoch, value):
    """What a run leaves that ends in `epoch`; all weights are `value`."""
    callback = keras.callbacks.BackupAndRestore(str(directory))
    backed_up = model()
    backed_up.set_weights([np.full_like(w, value) for w in backed_up.get_weights()])
    callback.set_model(backed_up)
    callback.on_epoch_end(epoch - 1)


def resume(rank, callbacks):
    """The epoch and the weights that a worker begins with."""
    for callback in callbacks:
        callback.on_train_begin()
    weights = callbacks[-1].model.get_weights()
    return [float(w.flat[0]) for w in weights]


@pytest.mark.parametrize("second", ["backup", "elsewhere"])
@pytest.mark.parametrize("left", [None, 2], ids=["nothing of its own", "an older one of its own"])
def test_all_resume_from_the_chiefs_backup(tmp_path, second, left):
    leave_backup(tmp_path / "backup", 3, value=7.0)
    if left and second != "backup":
        leave_backup(tmp_path / second, left, value=5.0)
    places = [tmp_path / "backup", tmp_path / second]
    found = on_workers(lambda rank: [keras.callbacks.BackupAndRestore(places[rank])], resume)
    assert found == [[7.0, 7.0]] * 2


def test_a_backup_that_only_another_worker_has_left_is_not_resumed(tmp_path):
    leave_backup(tmp_path / "worker", 3, value=7.0)
    places = [tmp_path / "chief", tmp_path / "worker"]
    found = on_workers(lambda rank: [keras.callbacks.BackupAndRestore(places[rank])], resume)
    assert 7.0 not in found[0] + found[1]


def test_a_corrupt_backup_falls_back_on_the_one_before_on_all_workers(tmp_path):
    callback = keras.callbacks.BackupAndRestore(str(tmp_path), double_checkpoint=True)
    backed_up = model()
    callback.set_model(backed_up)
    for epoch in (1, 2):
        backed_up.set_weights([np.full_like(w, epoch) for w in backed_up.get_weights()])
        callback.on_epoch_end(epoch)
    (tmp_path / "latest.weights.h5").write_bytes(b"corrupt")
    found = on_workers(lambda rank: [keras.callbacks.BackupAndRestore(str(tmp_path))], resume)
    assert found == [[1.0, 1.0]] * 2


def test_a_shared_backup_is_written_and_removed_by_the_chief(tmp_path):
    def begin(rank, callbacks):
        callbacks[0].on_train_begin()
        callbacks[0].on_epoch_end(0)

    def callbacks(rank):
        return [keras.callbacks.BackupAndRestore(tmp_path / "backup")]

    on_workers(callbacks, begin)
    assert json.loads((tmp_path / "backup" / "training_metadata.json").read_text())["epoch"] == 1
    on_workers(callbacks, train)
    assert list(tmp_path.iterdir()) == []


def test_a_backup_on_the_chief_alone_is_refused_before_one_resumes_without_the_other(tmp_path):
    leave_backup(tmp_path, 3, value=7.0)

    def error_of(rank):
        transport = Transport(rendezvous, rank)
        callbacks = [keras.callbacks.BackupAndRestore(tmp_path)] if rank == 0 else []
        with (
            pytest.raises(ValueError) as caught,
            files.one_writer_per_path(callbacks, transport),
        ):
            pass
        return str(caught.value)

    rendezvous = Rendezvous(2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for message in pool.map(error_of, range(2)):
            assert "All workers must resume from the same backup" in message
            assert 'worker 0: {"epoch": 3' in message
            assert "worker 1: no backup" in message
