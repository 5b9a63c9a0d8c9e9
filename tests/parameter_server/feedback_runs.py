"""What the process of `test_row_feedback.py` does: rows that are pushed with error feedback.

`everything` makes one cluster and returns what all tests look at.
"""

from __future__ import annotations

import os
import warnings

import keras
import numpy as np
import tensorflow as tf

from tests.parameter_server import row_runs
from tests.parameter_server.row_runs import batches
from tfqcomm.parameter_server import Trainer
from tfqcomm.state.ledger import ledger_of

# Powers of two: so gradients are the same to the bit however TensorFlow divides by them.
STEPS, WORKERS, BATCH, LENGTH, ROWS, WIDTH, RATE = 50, 2, 4, 4, 23, 4, 2.0
BROKEN = 20  # the step in which the first worker finds a NaN
CASES = [  # codec, mode, slots; "async" with one worker
    ("int8", "sync", "all"),
    ("int8", "async", 5),
    ("bfloat16", "sync", 5),
    ("bfloat16", "async", "all"),
]
WAYS = {
    "async": {"mode": "async"},
    "bounded": {"mode": "async", "max_staleness": 1},
    "ahead": {"mode": "async", "pull_ahead": True},
}


def make_data() -> tuple[np.ndarray, np.ndarray]:
    """Ids [steps, workers, batch, length], many of them twice in a batch; targets [..., width]."""
    rng = np.random.default_rng(0)
    shape = [STEPS, WORKERS, BATCH, LENGTH]
    ids = np.minimum(rng.geometric(0.1, size=shape) - 1, ROWS - 1)
    targets = rng.normal(size=[*shape, WIDTH]).astype("float32")
    targets[BROKEN, 0, 1, 2, 3] = np.nan
    return ids, targets


def bare_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    table = keras.layers.Embedding(ROWS, WIDTH)
    return keras.Sequential([keras.Input([LENGTH], dtype="int32"), table])


def trainer_of(build, optimizer=None, **arguments) -> Trainer:
    arguments = {"row_codec": "int8", "row_feedback": "all", **arguments}
    return row_runs.trainer_of(build, optimizer or keras.optimizers.SGD(RATE), **arguments)


def workers_of(trainer: Trainer) -> list:
    return vars(trainer)["_fleet"].workers


def owed(worker) -> list[dict[int, np.ndarray]]:
    """For each table what is owed to which id; with what is pending, if it was accepted."""
    found = []
    for owners, rows, *pending in vars(worker)["_owed"]:
        slots = dict(enumerate(zip(owners.numpy().tolist(), rows.numpy(), strict=True)))
        if pending and vars(worker)["_accepted"]:
            types = tf.int64, tf.float32
            both = [
                tf.io.parse_tensor(variable.read_value(), dtype).numpy()
                for variable, dtype in zip(pending, types, strict=True)
            ]
            slots |= {i % len(slots): (int(i), row) for i, row in zip(*both, strict=True)}
        found.append({owner: row for owner, row in slots.values() if owner >= 0})
    return found


# -------------------------------------------------------------------------- As the NumPy reference


def step_by_step(codec: str, mode: str, slots) -> dict:
    """The table at the beginning and after each step, and what the workers owe in the end."""
    workers = WORKERS if mode == "sync" else 1
    how = {"workers": workers, "mode": mode, "row_codec": codec, "row_feedback": slots}
    trainer, tables = trainer_of(bare_model, **how), row_runs.Tables()
    initial = trainer.model.get_weights()[0]
    trainer.fit(
        batches(make_data()), epochs=STEPS, steps_per_epoch=1, callbacks=[tables], verbose=0
    )
    workers = workers_of(trainer)
    return {
        "tables": [initial, *tables.values],
        "owed": [owed(worker)[0] for worker in workers],
        "skipped": vars(trainer)["_fleet"].skipped,
        "routes": [route.codec for route in ledger_of(trainer.optimizer).routes],
    }


# ------------------------------------------------------------------------------- What is conserved


def two_lookups() -> keras.Model:
    """The rows of a table for two inputs, and those of another one for the second."""
    keras.utils.set_random_seed(0)
    first, second = keras.Input([LENGTH], dtype="int32"), keras.Input([2], dtype="int64")
    table, other = (keras.layers.Embedding(ROWS, WIDTH) for _ in range(2))
    rows = [table(first), table(second), other(second)]
    return keras.Model([first, second], keras.layers.Concatenate(1)(rows))


def linear(target, rows):
    """Each row's gradient is the target, whatever the row."""
    return tf.reduce_sum(target * rows, -1)


def conserved(**how) -> dict:
    """How far both tables have come, what is owed, and the sum of all gradients."""
    rng = np.random.default_rng(1)
    ids = np.minimum(rng.geometric(0.1, size=[BATCH, LENGTH + 2]) - 1, ROWS - 1)
    # So large that what is owed stands out, however many of the messages are of which worker.
    targets = rng.normal(0, 2, size=[BATCH, LENGTH + 4, WIDTH]).astype("float32")
    inputs = ids[:, :LENGTH], ids[:, LENGTH:].astype("int64")

    def same(context):  # whoever takes most steps
        return tf.data.Dataset.from_tensors((inputs, targets)).repeat(4)

    trainer = trainer_of(two_lookups, loss=linear, **how)
    initial = trainer.model.get_weights()
    trainer.fit(same, epochs=2, steps_per_epoch=STEPS // 2, verbose=0)
    count = STEPS * WORKERS  # as many messages in each mode
    found = {"moved": [], "owed": [], "gradients": []}
    for table, (before, after) in enumerate(zip(initial, trainer.model.get_weights(), strict=True)):
        found["moved"].append((before - after) / RATE * WORKERS)
        total = np.zeros([ROWS, WIDTH])
        for worker in workers_of(trainer):
            for row, value in owed(worker)[table].items():
                total[row] += value
        found["owed"].append(total)
        places = np.concatenate([ids, ids[:, LENGTH:]], 1)
        own = places[:, :-2] if table == 0 else places[:, -2:]
        values = targets[:, :-2] if table == 0 else targets[:, -2:]
        gradients = np.zeros([ROWS, WIDTH])
        np.add.at(gradients, own, count * values.astype(np.float64) / (BATCH * (LENGTH + 4)))
        found["gradients"].append(gradients)
    return found


# ------------------------------------------------------------------------- Messages one by one


def replayed() -> list[list[dict]]:
    """What is owed before and after a message is sent again, and after the next."""
    trainer = trainer_of(bare_model, mode="async")
    trainer.fit(batches(make_data()), steps_per_epoch=3, verbose=0)
    worker = workers_of(trainer)[0]
    errand, calls = vars(worker)["_errand"], []

    def send(*arguments):
        calls.append(arguments)
        return errand(*arguments)

    vars(worker)["_errand"] = send
    worker.step()
    found = [owed(worker)]
    _, number = calls[0][1]
    number.assign_sub(1)
    errand(*calls[0])
    found.append(owed(worker))
    worker.step()
    return [*found, owed(worker)]


def restored() -> list[list[dict]]:
    """What a worker owes before and after the state of a backup is loaded."""
    trainer = trainer_of(bare_model)
    trainer.fit(batches(make_data()), steps_per_epoch=3, verbose=0)
    worker, ledger = workers_of(trainer)[0], ledger_of(trainer.optimizer)
    before = owed(worker)
    ledger.load_state(ledger.state())
    return [before, owed(worker)]


def scaled() -> list[dict[int, np.ndarray]]:
    """What is owed under a loss scale of 2^15."""
    ids, y = row_runs.make_data()
    trainer = trainer_of(row_runs.mixed, keras.optimizers.SGD(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scale that meets an overflow
        trainer.fit(batches((ids, y[..., 0, :1])), steps_per_epoch=8, verbose=0)
    return [owed(worker)[0] for worker in workers_of(trainer)]


def with_moments() -> dict:
    """By QAdam, whose worker half is on the servers: losses with feedback and without."""
    ids, y = make_data()
    data = batches((ids, np.nan_to_num(y)))
    found = {}
    for feedback in (None, "all"):
        optimizer = row_runs.optimizers()["qadam"]()
        trainer = trainer_of(bare_model, optimizer, row_feedback=feedback)
        found[feedback] = trainer.fit(data, epochs=2, steps_per_epoch=12, verbose=0).history["loss"]
    return found


def words_and_variables() -> dict:
    """What a worker moves and keeps, and the shapes in its graph, with feedback and without."""
    found = {}
    for feedback in (None, 5):
        trainer = trainer_of(bare_model, row_feedback=feedback)
        trainer.fit(batches(make_data()), steps_per_epoch=8, verbose=0)
        program = vars(workers_of(trainer)[0])["_program"]
        ((graph, _),) = vars(program.step)["_graphs"].values()
        tensors = [tensor for op in graph.graph.get_operations() for tensor in op.outputs]
        found[feedback] = {
            "workers": trainer.workers,
            "kept": [v.shape for v in tf.nest.flatten(vars(workers_of(trainer)[0])["_owed"])],
            "arguments": len(graph.inputs),
            "operations": len(graph.graph.get_operations()),
            "rows": ROWS in [t.shape[0] for t in tensors if t.shape.rank],
        }
    return found


def everything() -> dict:
    os.environ.pop("TF_CONFIG", None)  # that of the test's own harness
    return {
        "steps": {case: step_by_step(*case) for case in CASES},
        "conserved": {name: conserved(**how) for name, how in WAYS.items()},
        "replayed": replayed(),
        "restored": restored(),
        "scaled": scaled(),
        "moments": with_moments(),
        "words": words_and_variables(),
    }
