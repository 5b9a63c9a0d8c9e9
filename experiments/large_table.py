"""An embedding table of 2 GB that neither the chief nor a worker ever holds.

    python -m experiments.large_table --out=runs/large_table

Real processes by the launcher: the chief, two workers and two parameter servers. The same training
with a table of 8,000 and of 8,000,000 rows of 64 entries, by Adagrad, so the servers hold 4.1 GB
between them: rows and accumulators. Each run builds the model, trains 2 epochs of 20 rounds with
256 ids a step, evaluates on the chief and writes a backup. For every process the most memory that
it ever had (VmHWM of Linux) is printed. Expected: chief and workers grow by less than 300 MB.

About 2 minutes on 2 shared cores, half of it for backups; needs 9 GB of memory, and 8.4 GB of disk
below --out, where for a moment there are two backups.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfqcomm

FLAGS = flags.FLAGS
flags.DEFINE_list("rows", ["8000", "8000000"], "Of the table, in one run each.")
flags.DEFINE_integer("width", 64, "Entries of a row.", 1)
flags.DEFINE_integer("batch", 256, "Ids per step and worker.", 1)
flags.DEFINE_integer("steps", 20, "Rounds of an epoch; there are two.", 1)
flags.DEFINE_string("out", None, "Directory for results.json, and for the backup.", required=True)
flags.DEFINE_string("result", None, "File for what a run finds, not for users.")


def build_model(rows: int) -> keras.Model:
    """A score of each item."""
    ids = keras.Input([], dtype="int64")
    table = keras.layers.Embedding(rows, FLAGS.width, name="items")
    return keras.Model(ids, keras.layers.Dense(1)(table(ids)))


def batches(rows: int, context: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
    """Ids from anywhere in the table; the score of an item is whether its id is odd."""
    seed = [0 if context is None else 1 + context.input_pipeline_id, 0]

    def batch(step):
        ids = tf.random.stateless_uniform(
            [FLAGS.batch], seed + tf.stack([0, step]), 0, rows, tf.int64
        )
        return ids, tf.cast(ids % 2, tf.float32)[:, None]

    return tf.data.Dataset.range(FLAGS.steps, output_type=tf.int32).map(batch)


def peaks() -> dict[str, float]:
    """The most memory that each process of the cluster ever had, in MB."""
    cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
    found: dict[str, float] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(
                entry.split("=", 1)
                for entry in (path / "environ").read_text().split("\0")
                if "=" in entry
            )
            config = json.loads(environment.get("TF_CONFIG", "{}"))
            lines = (path / "status").read_text().splitlines()
        except OSError:  # it has ended, or is somebody else's
            continue
        if config.get("cluster") == cluster:
            task = f"{config['task']['type']} {config['task']['index']}"
            (line,) = (line for line in lines if line.startswith("VmHWM:"))
            found[task] = max(found.get(task, 0.0), int(line.split()[1]) / 1e3)
    return dict(sorted(found.items()))


def run(rows: int) -> dict:
    """The chief's part of a run."""
    began = time.monotonic()
    trainer = tfqcomm.parameter_server.Trainer(
        lambda: build_model(rows),
        optimizer=keras.optimizers.Adagrad(0.1),
        loss="mse",
        embedding_rows_from=1,
    )
    made = time.monotonic()
    with tempfile.TemporaryDirectory(dir=FLAGS.out) as directory:
        history = trainer.fit(
            lambda context: batches(rows, context),
            epochs=2,
            validation_data=batches(rows),
            callbacks=[tfqcomm.callbacks.BackupAndRestore(directory)],
            verbose=0,
        )
    return {
        "peaks": peaks(),
        "loss": history.history["loss"],
        "val_loss": history.history["val_loss"],
        "seconds": {"made": made - began, "trained": time.monotonic() - made},
    }


def launched(rows: int, directory: pathlib.Path) -> dict:
    """What a run in processes of its own finds."""
    result = directory / f"run-{rows}.json"
    command = [sys.executable, "-m", "tfqcomm.launch", "--workers=2", "--parameter_servers=2"]
    arguments = {
        "rows": rows,
        "width": FLAGS.width,
        "batch": FLAGS.batch,
        "steps": FLAGS.steps,
        "out": FLAGS.out,
        "result": result,
    }
    own = [f"--{name}={value}" for name, value in arguments.items()]
    subprocess.run([*command, "-m", "experiments.large_table", *own], check=True)
    return json.loads(result.read_text())


def table(results: dict[int, dict]) -> str:
    """In Markdown: memory of each task, in MB, and how much more it is than in the first run."""
    first, *_ = results.values()
    head = [f"{rows:,} rows of {FLAGS.width}" for rows in results]
    lines = [["peak memory, MB", *head, "more"], ["---"] * (len(head) + 2)]
    for task in first["peaks"]:
        own = [result["peaks"][task] for result in results.values()]
        lines.append([task, *(f"{peak:,.0f}" for peak in own), f"{own[-1] - own[0]:,.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(_) -> None:
    """All runs; or, as the chief of one, that one."""
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    if FLAGS.result:
        pathlib.Path(FLAGS.result).write_text(json.dumps(run(int(FLAGS.rows[0]))))
        return
    with tempfile.TemporaryDirectory() as directory:
        results = {int(rows): launched(int(rows), pathlib.Path(directory)) for rows in FLAGS.rows}
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print(table(results))
    for rows, result in results.items():
        seconds = {name: round(value, 1) for name, value in result["seconds"].items()}
        losses = np.round([*result["loss"], *result["val_loss"]], 4)
        print(f"{rows:,} rows: {seconds} s, losses {losses}")


if __name__ == "__main__":
    app.run(main)
