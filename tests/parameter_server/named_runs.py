"""What the process of `test_rows.py` does with tables that `rows` was given."""

from __future__ import annotations

import pathlib

import keras
import tensorflow as tf

from tests.parameter_server import row_runs
from tfqcomm import _tf_private
from tfqcomm.parameter_server import Trainer, load_export, rows

ROWS, WIDTH, LENGTH = row_runs.ROWS, row_runs.WIDTH, row_runs.LENGTH


class Scaled(keras.layers.Embedding):
    """One with a `call` of its own."""

    def call(self, ids):
        return 3.0 * super().call(ids)


class Table(keras.layers.Layer):
    """A matrix of which `reads` says what is read."""

    def __init__(self, reads="take", **arguments):
        super().__init__(**arguments)
        self.reads = reads

    def build(self, _):
        self.table = self.add_weight((ROWS, WIDTH), initializer="normal", name="table")

    def call(self, ids):
        if self.reads == "gather":
            return tf.gather(self.table, ids)
        if self.reads == "lookup":
            return tf.nn.embedding_lookup(self.table, ids)
        if self.reads == "sum":
            self.add_loss(keras.ops.sum(self.table))
        found = keras.ops.take(self.table, ids, axis=0)
        if self.reads == "tied":
            scores = keras.ops.matmul(found, keras.ops.transpose(self.table))
            return keras.ops.matmul(scores, self.table)
        return found

    def get_config(self):
        return {**super().get_config(), "reads": self.reads}


CUSTOM = {"Scaled": Scaled, "Table": Table}


READS = {"take": "float32", "gather": "mixed_bfloat16", "lookup": "mixed_bfloat16"}


def build_model(named: bool) -> keras.Model:
    """Four tables, each read in another way, one by two calls."""
    keras.utils.set_random_seed(0)
    layers = {reads: Table(reads, name=reads, dtype=dtype) for reads, dtype in READS.items()}
    scaled = Scaled(ROWS, WIDTH, name="scaled")
    if named:
        rows(scaled)
        layers = {reads: rows(layer, "table") for reads, layer in layers.items()}
    ids = keras.Input([LENGTH], dtype="int32")
    found = [layer(ids) for layer in (scaled, *layers.values())]
    found.append(layers["take"](keras.ops.flip(ids, 1)[:, :2]))
    pooled = [keras.layers.GlobalAveragePooling1D()(one) for one in found]
    return keras.Model(ids, keras.layers.Dense(1)(keras.layers.Concatenate()(pooled)))


def trainer_of(build, optimizer="sgd", **arguments) -> Trainer:
    return row_runs.trainer_of(build, optimizer, embedding_rows_from=None, **arguments)


def batches():
    ids, y = row_runs.make_data()
    return row_runs.batches((ids, y[..., 0, :1]))


def trained(named: bool, initial: list | None, directory: str) -> dict:
    """What becomes of the model, and of what is saved of it."""
    trainer = trainer_of(lambda: build_model(named), keras.optimizers.SGD(0.5))
    model = trainer.model
    layers = [model.get_layer(name) for name in ("scaled", *READS)]
    found = {
        "config": [layer.get_config() for layer in layers],
        "made there": [_tf_private.store_of(v) is not None for v in model.weights],
    }
    model.set_weights(initial or model.get_weights())
    found["initial"] = model.get_weights()
    trainer.fit(batches(), steps_per_epoch=8, verbose=0)
    found["trained"] = model.get_weights()
    if named:
        place = pathlib.Path(directory, "named")
        model.save(f"{place}.keras")
        trainer.export(place)
        again = keras.models.load_model(f"{place}.keras", custom_objects=CUSTOM)
        found["again"] = again.get_weights()
        ids, _ = row_runs.make_data()
        models = (model, again, load_export(place, custom_objects=CUSTOM))
        found["predictions"] = [one.predict(ids[0, 0], verbose=0) for one in models]
        found["files"] = len(list(place.glob("*.npy")))
    return found


def refusals() -> dict[str, str]:
    """The errors for what cannot travel by rows."""

    def model_of(layer):
        return keras.Sequential([keras.Input([LENGTH], dtype="int32"), rows(layer, "table")])

    found = {}
    for reads in ("tied", "sum"):
        trainer = trainer_of(lambda reads=reads: model_of(Table(reads, name="items")))
        try:
            trainer.fit(row_runs.batches(row_runs.make_data()), steps_per_epoch=1, verbose=0)
            found[reads] = "no error"
        except ValueError as error:
            found[reads] = str(error)
    return found


def everything(directory: str) -> dict:
    whole = trained(False, None, directory)
    named = trained(True, whole["initial"], directory)
    return {"whole": whole, "named": named, "refusals": refusals()}
