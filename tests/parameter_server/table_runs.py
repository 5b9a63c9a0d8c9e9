"""What the process of `test_tables_on_servers.py` does: one cluster of one process."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.parameter_server import row_runs
from tests.parameter_server.runs import Interruption
from tfqcomm import _tf_private
from tfqcomm.parameter_server import Trainer
from tfqcomm.transport.of_strategy import transport_for

ROWS, WIDTH, LENGTH, BATCH = 29, 4, 3, 4


def build_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    ids = keras.Input([LENGTH], dtype="int32")
    rows = keras.layers.Embedding(ROWS, WIDTH, name="items", mask_zero=True)(ids)
    rows = keras.layers.GlobalAveragePooling1D()(rows)
    return keras.Model(ids, keras.layers.Dense(1)(rows))


def unbuilt_model() -> keras.Model:
    """Its layers are built by the first `fit`."""
    keras.utils.set_random_seed(0)
    embedding = keras.layers.Embedding(ROWS, WIDTH, embeddings_initializer="he_normal")
    return keras.Sequential([embedding, keras.layers.Flatten(), keras.layers.Dense(1)])


class Weights(keras.layers.Layer):
    """A weight per id, in a matrix that is no embedding's."""

    def build(self, _):
        self.table = self.add_weight((ROWS, 1), initializer="ones", name="table")

    def call(self, ids):
        return keras.ops.take(self.table, ids, axis=0)


def weighted_model() -> keras.Model:
    """With a table that is large enough, and one that `rows` was given."""
    keras.utils.set_random_seed(0)
    ids = keras.Input([LENGTH], dtype="int32")
    weights = tfqcomm.parameter_server.rows(Weights(), "table")(ids)
    rows = keras.layers.Embedding(ROWS, WIDTH, name="items")(ids) * weights
    return keras.Model(ids, keras.layers.Dense(1)(keras.layers.Flatten()(rows)))


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Ids [batches, batch, length] and targets."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, ROWS, size=[6, BATCH, LENGTH])
    return ids, rng.normal(size=[6, BATCH, 1]).astype("float32")


def dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(make_data())


def trainer_of(build=build_model, optimizer="sgd", **arguments) -> Trainer:
    arguments = {"workers": 1, "parameter_servers": 2, "embedding_rows_from": 50, **arguments}
    return Trainer(build, optimizer=optimizer, loss="mse", **arguments)


def elsewhere(variables) -> list[bool]:
    return [_tf_private.store_of(variable) is not None for variable in variables]


def plain_copy(model: keras.Model) -> keras.Model:
    """A model of this process alone, with the same weights."""
    plain = build_model()
    plain.compile(optimizer="sgd", loss="mse")
    plain.set_weights(model.get_weights())
    return plain


def like_a_plain_model(directory: str) -> dict:
    """What a user does with `trainer.model`, and what a plain one says."""
    ids, y = (np.concatenate(a) for a in make_data())
    trainer = trainer_of(optimizer=keras.optimizers.Adam(0.05))
    model = trainer.model
    found: dict = {"elsewhere": [elsewhere(model.weights)], "pairs": {}}

    def compare(when):
        plain = plain_copy(model)
        found["pairs"][when, "evaluate"] = (
            trainer.evaluate(ids, y, verbose=0),
            plain.evaluate(ids, y, verbose=0),
        )
        found["pairs"][when, "predict"] = (
            model.predict(ids, verbose=0),
            plain.predict(ids, verbose=0),
        )
        found["pairs"][when, "call"] = model(ids), plain(ids)

    compare("at first")
    random = np.random.default_rng(1)
    loaded = [random.normal(size=w.shape).astype("float32") for w in model.get_weights()]
    model.set_weights(loaded)
    found["pairs"]["loaded", "weights"] = (
        np.concatenate([w.ravel() for w in model.get_weights()]),
        np.concatenate([w.ravel() for w in loaded]),
    )
    compare("loaded")
    history = trainer.fit(dataset, validation_data=(ids, y), verbose=0)
    found["pairs"]["trained", "validation"] = (
        history.history["val_loss"][0],
        plain_copy(model).evaluate(ids, y, verbose=0),
    )
    found["moved"] = np.abs(model.get_weights()[0] - loaded[0]).max()
    compare("trained")
    found["elsewhere"] += [elsewhere(model.weights), elsewhere(trainer.optimizer.variables)]
    found["slots"] = [tuple(v.shape) for v in trainer.optimizer.variables]
    found["moments"] = [np.abs(np.array(v)).max() for v in trainer.optimizer.variables[2:]]
    table = model.get_layer("items").embeddings
    table.assign(table + 1.0)
    trainer.fit(dataset, verbose=0, epochs=1)
    compare("assigned")
    model.save(f"{directory}/model.keras")
    again = keras.models.load_model(f"{directory}/model.keras")
    for number, (a, b) in enumerate(zip(model.get_weights(), again.get_weights(), strict=True)):
        found["pairs"]["saved", number] = a, b
    for number, (a, b) in enumerate(
        zip(trainer.optimizer.variables, again.optimizer.variables, strict=True)
    ):
        found["pairs"]["saved slots", number] = np.array(a), np.array(b)
    return found


def other_ways() -> dict:
    """Whether tables are elsewhere in the end, and the loss of two epochs."""
    found = {}
    before = build_model()
    ways = {
        "unbuilt": {"build": unbuilt_model},
        "not lazy": {"optimizer": "nadam", "embedding_rows_from": "auto"},
        "small": {"embedding_rows_from": 10**6},
        "bfloat16": {"build": bfloat16_model},
        "built before": {"build": lambda: before},
    }
    for name, arguments in ways.items():
        trainer = trainer_of(**arguments)
        history = trainer.fit(dataset, epochs=3, verbose=0)
        found[name] = elsewhere(trainer.model.weights), history.history["loss"]
    return found


def bfloat16_model() -> keras.Model:
    """Its table is bfloat16 for Keras, and float32 on the servers."""
    keras.utils.set_random_seed(0)
    ids = keras.Input([LENGTH], dtype="int32")
    rows = keras.layers.Embedding(ROWS, WIDTH, dtype="bfloat16")(ids)
    return keras.Model(ids, keras.layers.Dense(1)(keras.layers.Flatten()(rows)))


def frozen_later() -> list:
    """A table that is frozen before the first `fit` travels as frozen weights do."""
    trainer = trainer_of()
    layer = trainer.model.get_layer("items")
    before, was = layer.embeddings.numpy(), elsewhere([layer.embeddings])
    layer.trainable = False
    trainer.fit(dataset, verbose=0)
    return [was, elsewhere([layer.embeddings]), np.abs(layer.embeddings.numpy() - before).max()]


def with_a_frozen_table() -> keras.Model:
    """As large as the other one, and part of the weights."""
    keras.utils.set_random_seed(0)
    ids = keras.Input([LENGTH], dtype="int32")
    frozen = keras.layers.Embedding(ROWS, WIDTH, name="frozen")
    rows = [keras.layers.Embedding(ROWS, WIDTH, name="items")(ids), frozen(ids)]
    frozen.trainable = False
    rows = keras.layers.GlobalAveragePooling1D()(keras.layers.Concatenate()(rows))
    return keras.Model(ids, keras.layers.Dense(1)(rows))


def exported(directory: str) -> dict:
    """What was trained, and what a directory and a file have of it."""
    ids, _ = (np.concatenate(a) for a in make_data())
    place = pathlib.Path(directory, "exported")
    trainer = trainer_of(with_a_frozen_table, "adam")
    trainer.fit(dataset, verbose=0)
    trainer.export(place)
    trainer.export(f"{place}.keras")
    loaded = tfqcomm.parameter_server.load_export(place)
    models = [trainer.model, loaded, keras.models.load_model(f"{place}.keras")]
    errors = []
    for what in (lambda: loaded.set_weights(loaded.get_weights()), lambda: trainer.export(place)):
        try:
            what()
        except ValueError as error:
            errors.append(str(error))
    return {
        "predictions": [model.predict(ids, verbose=0) for model in models],
        "weights": [model.get_weights() for model in models],
        "elsewhere": [elsewhere(model.weights) for model in models],
        "files": sorted(path.name for path in place.parent.glob("exported*/*")),
        "table": np.load(place / "table-0.npy"),
        "errors": errors,
    }


def resumed(directory: str, name: str, breaks: int) -> dict:
    """Three epochs in one run; and on 2 servers, interrupted, then on 3.

    Args:
        name: of the optimizer.
        breaks: how many of the backups break off before they are complete.
    """
    place = pathlib.Path(directory, f"{name}-{breaks}")

    def trainer(servers):
        optimizer = row_runs.optimizers()[name]()
        return trainer_of(optimizer=optimizer, parameter_servers=servers)

    def all_of(one):
        rows = [
            (saved.name, start, saved.read(start, stop).numpy())
            for server in vars(one)["_fleet"].servers
            for saved in server.rows.saved()
            for start, stop in saved.blocks()
        ]
        names = sorted({key for key, _, _ in rows})
        parts = {
            key: np.concatenate([v for k, _, v in sorted(rows, key=lambda r: r[1]) if k == key])
            for key in names
        }
        dense = {str(i): w for i, w in enumerate(one.model.get_weights()[1:])}
        return parts | dense | {"iterations": int(one.optimizer.iterations)}

    whole = trainer(2)
    whole.fit(dataset, epochs=3, verbose=0)

    def interrupt(epoch, logs):
        if epoch == 2:
            raise Interruption

    parts = trainer(2)
    backup = tfqcomm.callbacks.BackupAndRestore(place, delete_checkpoint=False)
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with contextlib.suppress(Interruption):
        parts.fit(dataset, epochs=3, callbacks=[backup, stop], verbose=0)
    if breaks:  # the tables are written, the archive is not
        with contextlib.suppress(Interruption):
            parts.fit(dataset, epochs=3, callbacks=[Broken(place), stop], verbose=0)
    files = sorted(path.name for path in place.iterdir())
    third = trainer(3)
    seen = third.model.get_weights()[0]
    end = tfqcomm.callbacks.BackupAndRestore(place)
    third.fit(dataset, epochs=3, callbacks=[end], verbose=0)
    return {
        "whole": all_of(whole),
        "parts": all_of(third),
        "files": files,
        "left": sorted(path.name for path in place.iterdir()),
        "initial": seen,
    }


def from_whole_tables(directory: str) -> dict:
    """A backup of a run with whole tables, with what compression has left out, goes on by rows."""
    place = pathlib.Path(directory, "whole")
    how = {"optimizer": "adam", "compressor": "top_k", "min_size": 50}
    whole = trainer_of(embedding_rows_from=None, **how)
    backup = tfqcomm.callbacks.BackupAndRestore(place, delete_checkpoint=False)
    whole.fit(dataset, callbacks=[backup], verbose=0)
    rows, values = trainer_of(**how), []

    def stop(epoch, logs):
        values.append([np.array(v) for v in (*rows.model.weights, *rows.optimizer.variables)])
        raise Interruption

    stopper = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(Interruption):
        warnings.simplefilter("always")
        rows.fit(dataset, epochs=2, callbacks=[backup, stopper], verbose=0)
    return {
        "whole": [np.array(v) for v in (*whole.model.weights, *whole.optimizer.variables)],
        "rows": values[0],
        "elsewhere": elsewhere(rows.model.weights),
        "warnings": [str(one.message) for one in caught],
    }


class Broken(tfqcomm.callbacks.BackupAndRestore):
    """One whose process is killed when the servers have written, and the chief has not."""

    def on_train_begin(self, logs=None):
        """Begins anew, and restores nothing."""
        self._transport = transport_for(self.model.distribute_strategy)

    def _weights_to_bytes(self):
        raise Interruption


class Slowly(keras.callbacks.Callback):
    """Says which epoch has ended, and ends training some epochs after its beginning."""

    def __init__(self, epochs: int):
        super().__init__()
        self._epochs = epochs
        self.first: int | None = None
        self.last = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Notes the first one."""
        self.first = epoch if self.first is None else self.first

    def on_epoch_end(self, epoch, logs=None):
        """Gives others time to interfere."""
        print(f"epoch {epoch}", flush=True)
        time.sleep(0.2)
        self.last = epoch
        self.model.stop_training = epoch + 1 - self.first >= self._epochs


def on_a_real_cluster(directory: str, servers: int, epochs: int) -> dict | str:
    """Trains with backups, from the last one on; the error if a server is lost.

    Returns:
        Of a run that ended the first epoch and the last one; its weights and slots, and those of
        one as long in a single piece; which of its weights are elsewhere.
    """
    how = {"optimizer": "adam", "parameter_servers": servers, "workers": 2}
    how["build"] = weighted_model
    trainer, slowly = trainer_of(**how), Slowly(epochs)
    backup = tfqcomm.callbacks.BackupAndRestore(directory, delete_checkpoint=False)
    try:
        trainer.fit(dataset, epochs=10_000, callbacks=[backup, slowly], verbose=0)
    except tfqcomm.parameter_server.ServerLost as error:
        return str(error)
    whole = trainer_of(**how)
    whole.fit(dataset, epochs=slowly.last + 1, verbose=0)
    values = [
        [np.array(v) for v in (*one.model.weights, *one.optimizer.variables)]
        for one in (trainer, whole)
    ]
    there = elsewhere(trainer.model.weights)
    return {"epochs": (slowly.first, slowly.last), "values": values, "elsewhere": there}


def within_an_epoch(directory: str) -> dict:
    """A backup while workers go on: all of one moment."""
    place = pathlib.Path(directory, "within")
    trainer = trainer_of(optimizer=keras.optimizers.SGD(0.1), mode="async", workers=2)
    backup = tfqcomm.callbacks.BackupAndRestore(place, save_freq=2, delete_checkpoint=False)
    trainer.fit(dataset, epochs=2, callbacks=[backup], verbose=0)
    again = trainer_of(optimizer=keras.optimizers.SGD(0.1))
    restored = {}

    def note(epoch, logs):
        restored["iterations"] = int(again.optimizer.iterations)
        raise Interruption

    with contextlib.suppress(Interruption):
        again.fit(
            dataset,
            epochs=3,
            callbacks=[backup, keras.callbacks.LambdaCallback(on_epoch_begin=note)],
            verbose=0,
        )
    restored["same"] = [
        float(np.abs(a - b).max())
        for a, b in zip(trainer.model.get_weights(), again.model.get_weights(), strict=True)
    ]
    return restored


def refused(directory: str) -> dict[str, str]:
    """The errors for what would need the table in the chief's process."""
    model = trainer_of().model
    found = {}
    for what in (lambda: model.fit(dataset(), verbose=0), lambda: model.export(directory)):
        try:
            what()
        except ValueError as error:
            found["export" if found else "fit"] = str(error)
    return found


def strange_id() -> str:
    """The error for an id in the data of an evaluation."""
    ids, y = (np.concatenate(a) for a in make_data())
    ids[3, 1] = ROWS
    try:
        trainer_of().evaluate(ids, y, verbose=0)
    except ValueError as error:
        return str(error)
    return "no error"


def another_trainer() -> tuple[list, bool]:
    """Where the table is for either trainer, and whether the second one begins with it."""
    first = trainer_of()
    first.fit(dataset, verbose=0)
    table, model = first.model.get_layer("items").embeddings, first.model
    devices, before = [_tf_private.store_of(table).devices], table.numpy()
    second = trainer_of(lambda: model, "adam", parameter_servers=3)
    noted = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: noted.append(table.numpy()))
    second.fit(dataset, callbacks=[note], verbose=0)
    devices.append(_tf_private.store_of(table).devices)
    return devices, np.array_equal(noted[0], before) and not np.array_equal(table.numpy(), before)


def refused_backups(directory: str) -> list[str]:
    """The errors for a backup of another optimizer, and for one process."""
    place = pathlib.Path(directory, "other")
    backup = tfqcomm.callbacks.BackupAndRestore(place, delete_checkpoint=False)
    trainer_of().fit(dataset, callbacks=[backup], verbose=0)
    adam, plain = trainer_of(optimizer="adam"), build_model()
    plain.compile(optimizer="sgd", loss="mse")
    found = []
    for fit in (adam.fit, plain.fit):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras' own, of the other weights
                fit(dataset if fit == adam.fit else dataset(), callbacks=[backup], verbose=0)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return found


def everything(directory: str) -> dict:
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    trainer_of(parameter_servers=3, workers=2)  # the most there are
    return {
        "like a plain model": like_a_plain_model(directory),
        "other ways": other_ways(),
        "frozen": frozen_later(),
        "refused": refused(directory),
        "strange": strange_id(),
        "another trainer": another_trainer(),
        "exported": exported(directory),
        "refused backups": refused_backups(directory),
        "resumed": {
            (name, breaks): resumed(directory, name, breaks)
            for name, breaks in (("adam", 0), ("adam", 1), ("qadam by t", 0), ("qrda", 0))
        },
        "from whole tables": from_whole_tables(directory),
        "within": within_an_epoch(directory),
    }
