"""What the processes of `test_rows.py` do: embeddings by rows, in clusters of one process.

`everything` makes one cluster and returns what all tests look at: a process takes seconds to begin.
"""

from __future__ import annotations

import contextlib
import os
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfqcomm
from tests.parameter_server.runs import Interruption
from tfqcomm.parameter_server import Trainer
from tfqcomm.state.ledger import ledger_of

STEPS, WORKERS, BATCH, LENGTH, ROWS, WIDTH = 50, 2, 4, 3, 23, 5
EMBEDDING = keras.layers.Embedding


def optimizers() -> dict:
    """By the names of the reference."""
    k, t = keras.optimizers, tfqcomm.optimizers
    plain = {"compressor": None, "min_size": 1 << 20}
    return {
        "sgd": lambda: k.SGD(0.1),
        "momentum": lambda: k.SGD(0.1, momentum=0.9),
        "nesterov": lambda: k.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adagrad": lambda: k.Adagrad(0.1),
        "adam": lambda: k.Adam(0.05),
        "amsgrad": lambda: k.Adam(0.05, amsgrad=True),
        "adamw": lambda: k.AdamW(0.05, weight_decay=0.1),
        "rmsprop": lambda: k.RMSprop(0.02),
        "centered": lambda: k.RMSprop(0.02, momentum=0.9, centered=True),
        "comp_ams": lambda: t.CompAMS(0.05, **plain),
        "qadam": lambda: t.QAdam(0.05, **plain),
        "qadam by t": lambda: t.QAdam(0.05, beta_2="1-1/t", **plain),
        "qcmd": lambda: t.QCMDAdagrad(0.05, 1e-3, **plain),
        "qrda": lambda: t.QRDAAdagrad(0.05, 1e-3, **plain),
        "qrda from x": lambda: t.QRDAAdagrad(0.05, 1e-3, center="initial", **plain),
    }


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Ids [steps, workers, batch, length], many of them twice in a batch; targets [..., width]."""
    rng = np.random.default_rng(0)
    shape = [STEPS, WORKERS, BATCH, LENGTH]
    ids = np.minimum(rng.geometric(0.15, size=shape) - 1, ROWS - 1)
    return ids, rng.normal(size=[*shape, WIDTH]).astype("float32")


def batches(arrays):
    """Arrays [steps, workers, ...] as the batches of each worker."""

    def dataset(context):
        own = tf.nest.map_structure(lambda a: a[:, context.input_pipeline_id], arrays)
        return tf.data.Dataset.from_tensor_slices(own)

    return dataset


def bare_model() -> keras.Model:
    """Nothing but a table."""
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input([LENGTH], dtype="int32"), EMBEDDING(ROWS, WIDTH)])


class Tables(keras.callbacks.Callback):
    """Notes the weights after each epoch, of one step."""

    def __init__(self):
        super().__init__()
        self.values: list[np.ndarray] = []

    def on_epoch_end(self, epoch, logs=None):
        self.values.append(self.model.get_weights()[0])


def trainer_of(build, optimizer, **arguments) -> Trainer:
    arguments = {
        "workers": WORKERS,
        "parameter_servers": 2,
        "loss": "mse",
        "embedding_rows_from": 1,
        **arguments,
    }
    return Trainer(build, optimizer=optimizer, **arguments)


def step_by_step() -> dict[str, list[np.ndarray]]:
    """For each optimizer the table at the beginning, and after each step."""
    found = {}
    for name, make in optimizers().items():
        trainer, tables = trainer_of(bare_model, make()), Tables()
        initial = trainer.model.get_weights()[0]
        trainer.fit(
            batches(make_data()), epochs=STEPS, steps_per_epoch=1, callbacks=[tables], verbose=0
        )
        found[name] = [initial, *tables.values]
    return found


# ------------------------------------------------------------------------- As with whole tables


def pooled(rows):
    return keras.layers.GlobalAveragePooling1D()(rows)


def two_lookups() -> keras.Model:
    """A history and an item of one table, and a bias per item."""
    keras.utils.set_random_seed(0)
    history, item = keras.Input([LENGTH], dtype="int64"), keras.Input([], dtype="uint8")
    table = EMBEDDING(ROWS, WIDTH, mask_zero=True)
    user = keras.layers.Dense(WIDTH)(pooled(table(history)))
    score = keras.layers.Dot(1)([user, table(item)])
    return keras.Model([history, item], score + EMBEDDING(ROWS, 1)(item))


def high_rank() -> keras.Model:
    """Float ids of rank 3, as Keras takes them."""
    keras.utils.set_random_seed(0)
    ids = keras.Input([LENGTH, 2])
    rows = keras.layers.Flatten()(EMBEDDING(ROWS, WIDTH, name="table")(ids))
    return keras.Model(ids, keras.layers.Dense(1)(rows))


def mixed() -> keras.Model:
    keras.utils.set_random_seed(0)
    policy = {"dtype": "mixed_float16"}
    ids = keras.Input([LENGTH], dtype="int32")
    rows = pooled(EMBEDDING(ROWS, WIDTH, **policy)(ids))
    return keras.Model(ids, keras.layers.Dense(1, **policy)(rows))


def non_negative() -> keras.Model:
    keras.utils.set_random_seed(0)
    table = EMBEDDING(ROWS, WIDTH, embeddings_constraint="non_neg", embeddings_initializer="ones")
    return keras.Sequential([keras.Input([LENGTH], dtype="int32"), table])


class RaggedSum(keras.Model):
    """Ids in rows of any length, also none at all."""

    def __init__(self):
        super().__init__()
        self.embed = EMBEDDING(ROWS, WIDTH)
        self.score = keras.layers.Dense(1)

    def build(self, _):
        self.embed.build()
        self.score.build([None, WIDTH])
        self.built = True

    def call(self, ids):
        return self.score(tf.ensure_shape(tf.reduce_sum(self.embed(ids), 1), [BATCH, WIDTH]))


def ragged_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = RaggedSum()
    model.build(None)
    return model


def ragged_batches(context) -> tf.data.Dataset:
    """Every fourth batch has no ids at all."""
    ids, y = make_data()
    ids, y = ids[:8, context.input_pipeline_id], y[:8, context.input_pipeline_id, :, 0, :1]
    lengths = np.array([[0, 1, 2, 3], [3, 0, 1, 1], [0, 0, 0, 0], [2, 2, 0, 3]] * 2)

    def cut(ids, lengths, y):
        return tf.RaggedTensor.from_tensor(ids, lengths), y

    return tf.data.Dataset.from_tensor_slices((ids, lengths, y)).map(cut)


def different_ids() -> np.ndarray:
    """No id twice in a batch of a worker."""
    rng = np.random.default_rng(1)
    batches = [rng.permutation(ROWS)[: BATCH * LENGTH] for _ in range(STEPS * WORKERS)]
    return np.reshape(batches, [STEPS, WORKERS, BATCH, LENGTH])


def as_with_whole_tables() -> dict[str, dict]:
    """How far rows are from whole tables, where both mean the same."""
    ids, y = make_data()
    pairs = {
        "two lookups": (two_lookups, ((ids, ids[..., 0].astype("uint8")), y[..., :1, 0])),
        "high rank": (high_rank, (np.stack([ids, ids[::-1]], -1).astype("float32"), y[..., 0, :1])),
        "mixed": (mixed, (ids, y[..., 0, :1])),
        "non negative": (non_negative, (ids, y)),
        "different ids": (bare_model, (different_ids(), y)),
        "negative ids": (bare_model, (np.where(ids > 3, ids - ROWS, ids), y)),
    }
    cases = {name: (build, batches(arrays)) for name, (build, arrays) in pairs.items()}
    cases["ragged"] = (ragged_model, ragged_batches)
    rounds, one_by_one = {"workers": WORKERS}, {"workers": 1, "mode": "async"}
    ways = {
        "sgd": (lambda: keras.optimizers.SGD(0.5), rounds),
        # Of ids that are there once: of others Keras takes the norm before it adds them up.
        "clipped": (lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.05), rounds),
        "one by one": (lambda: keras.optimizers.SGD(0.5), one_by_one),
    }
    runs = [*((name, "sgd") for name in cases), ("different ids", "clipped")]
    runs += [(name, "one by one") for name in ("two lookups", "mixed")]
    return {f"{name}, {way}": both_ways(*cases[name], *ways[way]) for name, way in runs}


def both_ways(build, dataset, optimizer, arguments) -> dict[str, list[np.ndarray]]:
    """The weights at the beginning, with whole tables, and with rows."""
    found = {}
    for kind, rows_from in {"dense": None, "rows": 1}.items():
        trainer = trainer_of(build, optimizer(), embedding_rows_from=rows_from, **arguments)
        if "initial" in found:  # tables on servers begin with other values
            trainer.model.set_weights(found["initial"])
        found["initial"] = trainer.model.get_weights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scale that meets an overflow
            trainer.fit(dataset, steps_per_epoch=8, verbose=0)
        found[kind] = trainer.model.get_weights()
    return found


# ------------------------------------------------------------------------------ Bytes, and codecs


def large_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    ids = keras.Input([], dtype="int32")
    return keras.Model(ids, keras.layers.Dense(1)(EMBEDDING(200_000, 32)(ids)))


def large_batches(context) -> tf.data.Dataset:
    """256 different rows in each."""
    rng = np.random.default_rng(context.input_pipeline_id)
    ids = np.stack([rng.choice(200_000, 256, replace=False) for _ in range(4)])
    return tf.data.Dataset.from_tensor_slices((ids, np.ones([4, 256, 1], "float32")))


def bytes_of_codecs() -> dict:
    """With the default threshold: what `TrafficLogger` says of an epoch, and the loss of each."""
    found = {}
    for codec in ("float32", "bfloat16", "int8"):
        trainer = Trainer(
            large_model,
            optimizer=keras.optimizers.Adagrad(0.1),
            loss="mse",
            workers=2,
            parameter_servers=2,
            row_codec=codec,
        )
        traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
        history = trainer.fit(large_batches, 2, callbacks=[traffic], verbose=0)
        found[codec] = {
            "traffic": traffic.history,
            "workers": trainer.workers,
            "loss": history.history["loss"],
            "routes": [vars(r) for r in ledger_of(trainer.optimizer).routes],
        }
    return found


# ------------------------------------------------------------------------- Messages one by one


def one_by_one() -> tuple[np.ndarray, np.ndarray]:
    """A loss that is linear in the rows: the order of messages does not matter, only their sum."""
    ids, y = make_data()
    trainer = trainer_of(
        bare_model,
        keras.optimizers.SGD(0.1),
        mode="async",
        loss=lambda target, rows: tf.reduce_sum(target * rows, -1),
    )
    initial = trainer.model.get_weights()[0]
    # An epoch has as many steps as there are batches, whoever takes them: all see the same ones.
    same = np.repeat(ids[:, :1], WORKERS, 1), np.repeat(y[:, :1], WORKERS, 1)
    trainer.fit(batches(tuple(a[:1] for a in same)), steps_per_epoch=STEPS, verbose=0)
    expected = initial.astype(np.float64)
    np.add.at(expected, ids[0, 0], -0.1 * STEPS * y[0, 0] / (BATCH * LENGTH))
    return trainer.model.get_weights()[0], expected


def replayed(name: str) -> dict[str, list]:
    """All that servers hold of rows before and after a message is sent again, and after the next.

    Args:
        name: of the optimizer.
    """
    trainer = trainer_of(bare_model, optimizers()[name](), mode="async")
    trainer.fit(batches(make_data()), steps_per_epoch=3, verbose=0)
    fleet = vars(trainer)["_fleet"]
    worker, servers = fleet.workers[0], fleet.servers
    errand, calls = vars(worker)["_errand"], []

    def send(*arguments):
        calls.append(arguments)
        return errand(*arguments)

    def held():
        rows = [np.array(v) for s in servers for kept in s.held().values() for v in kept]
        return rows + [value for s in servers for value in s.rows.mean_moments().values()]

    vars(worker)["_errand"] = send
    worker.step()
    before = held()
    _, number = calls[0][1]
    number.assign_sub(1)
    errand(*calls[0])
    after = held()
    worker.step()
    return {"before": before, "after": after, "next": held()}


def tensors_of_a_worker() -> list[list[int | None]]:
    """The shapes of all there is in the graph of a worker's step, but for scalars."""
    sgd = keras.optimizers.SGD(0.1, global_clipnorm=1.0)
    trainer = trainer_of(two_lookups, sgd, parameter_servers=1)
    ids, y = make_data()
    arrays = (ids, ids[..., 0].astype("uint8")), y[..., :1, 0]
    trainer.fit(batches(arrays), steps_per_epoch=2, verbose=0)
    program = vars(vars(trainer)["_fleet"].workers[0])["_program"]
    ((graph, _),) = vars(program.step)["_graphs"].values()
    tensors = [tensor for op in graph.graph.get_operations() for tensor in op.outputs]
    return [t.shape.as_list() for t in tensors if t.shape.rank]


# ------------------------------------------------------------------------------ What is an error


def strange_ids(mode: str, strange: int, dtype: str) -> str:
    """The error for an id that the table does not have."""
    ids, y = make_data()
    ids = ids.astype(dtype)
    ids[5, :, 2, 1] = strange  # whoever takes most steps gets there
    trainer = trainer_of(bare_model, keras.optimizers.SGD(0.1), mode=mode)
    try:
        trainer.fit(batches((ids, y)), steps_per_epoch=10, verbose=0)
    except ValueError as error:
        return str(error)
    return "no error"


def shared_table() -> keras.Model:
    """Scores of all items: what reads the whole table."""
    ids, table = keras.Input([], dtype="int32"), EMBEDDING(ROWS, WIDTH, name="items")

    class Scores(keras.layers.Layer):
        def call(self, user):
            return tf.matmul(user, table.embeddings, transpose_b=True)

    return keras.Model(ids, Scores()(table(ids)))


def looping() -> keras.Model:
    """Looks up one example after the other."""
    ids, table = keras.Input([LENGTH], dtype="int32"), EMBEDDING(ROWS, WIDTH, name="t")
    table.build()

    class OneByOne(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.table = table

        def call(self, ids):
            return tf.map_fn(self.table, ids, fn_output_signature=tf.float32)

    return keras.Model(ids, OneByOne()(ids))


def regularized(**arguments):
    return keras.Sequential(
        [keras.Input([LENGTH], dtype="int32"), EMBEDDING(ROWS, WIDTH, name="table", **arguments)]
    )


def refusals() -> dict[str, str]:
    ids, y = make_data()
    quantized = tfqcomm.optimizers.QAdam(0.1, weight_compressor="uniform_grid")
    sgd = keras.optimizers.SGD
    cases = {
        "optimizer": (bare_model, keras.optimizers.Nadam(0.1), ids, y),
        "weight_compressor": (bare_model, quantized, ids, y),
        "regularizer": (lambda: regularized(embeddings_regularizer="l2"), sgd(0.1), ids, y),
        "constraint": (lambda: regularized(embeddings_constraint="unit_norm"), sgd(0.1), ids, y),
        "shared": (shared_table, sgd(0.1), ids[..., 0], np.zeros([STEPS, WORKERS, BATCH, ROWS])),
        "loop": (looping, sgd(0.1), ids, y),
    }
    found = {}
    for name, (build, optimizer, x, target) in cases.items():
        try:
            trainer = trainer_of(build, optimizer)
            trainer.fit(batches((x, target.astype("float32"))), steps_per_epoch=2, verbose=0)
            found[name] = "no error"
        except ValueError as error:
            found[name] = str(error)
        trainer = trainer_of(build, optimizer, embedding_rows_from=None)
        trainer.fit(batches((x, target.astype("float32"))), steps_per_epoch=2, verbose=0)
    return found


# --------------------------------------------------------------------------------------- Backups


def resumed(directory: str, name: str) -> dict:
    """A run of 3 epochs, and one that is interrupted within the second and begins it again."""

    def trainer():
        return trainer_of(two_lookups, optimizers()[name](), workers=1)

    ids, y = (a[:8, :1] for a in make_data())
    dataset = batches(((ids, ids[..., 0].astype("uint8")), y[..., :1, 0]))
    whole = trainer()
    whole.fit(dataset, epochs=3, verbose=0)

    def interrupt(epoch, logs):
        if epoch == 2:
            raise Interruption

    for callbacks in ([keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)], []):
        parts = trainer()
        backup = tfqcomm.callbacks.BackupAndRestore(f"{directory}/{name}", delete_checkpoint=False)
        with contextlib.suppress(Interruption):
            parts.fit(dataset, epochs=3, callbacks=[backup, *callbacks], verbose=0)
    states = [ledger_of(t.optimizer).state() for t in (whole, parts)]
    return {
        "whole": [*whole.model.get_weights(), *(np.array(v) for v in whole.optimizer.variables)],
        "parts": [*parts.model.get_weights(), *(np.array(v) for v in parts.optimizer.variables)],
        "memory": [[state[key] for key in sorted(state)] for state in states],
        "keys": [sorted(state) for state in states],
    }


def everything(directory: str) -> dict:
    from tests.parameter_server import named_runs  # which is made of this file

    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    trainer_of(bare_model, "sgd", parameter_servers=3)  # the most there are
    return {
        "steps": step_by_step(),
        "whole tables": as_with_whole_tables(),
        "bytes": bytes_of_codecs(),
        "one by one": one_by_one(),
        "replayed": {name: replayed(name) for name in ("adam", "qadam by t")},
        "tensors": tensors_of_a_worker(),
        "strange": {
            (mode, strange, dtype): strange_ids(mode, strange, dtype)
            for mode in ("sync", "async")
            for strange, dtype in ((ROWS, "int32"), (-ROWS - 1, "int64"), (255, "uint8"))
        },
        "refusals": refusals(),
        "named": named_runs.everything(directory),
        "backups": {name: resumed(directory, name) for name in ("adam", "qadam by t", "qrda")},
    }
