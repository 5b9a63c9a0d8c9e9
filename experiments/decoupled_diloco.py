r"""Decoupled DiLoCo on parameter servers: one slow worker, one that is killed, and nobody waits.

    python -m tfqcomm.launch --workers=4 --parameter_servers=2 --max_restarts=2 \
        -m experiments.decoupled_diloco --dataset=mnist --data_dir=DIR --out=runs/decoupled_diloco

Four workers with 128 examples each and Adam inside. Every worker takes `--step_seconds` for a step,
or longer if the machine does, and the last one `--slowdown` times that. Where `--kill_at` of all
steps are done the second one is killed, and the launcher starts it again. Three runs:

    synchronous   `parameter_server.Trainer`, with as many steps of the same Adam; nobody is slow or
                  killed: the accuracy to compare with
    alone         the same workers, slow and killed as they are, and no rounds: the steps per second
                  to compare with
    decoupled     `parameter_server.DiLoCoTrainer`

The step that the killed worker is at does not count. Without the launcher the cluster is embedded
in this process, and nobody is killed.

Ours, and the time it takes: experiments/README.md.

References:
    Decoupled DiLoCo, https://arxiv.org/abs/2604.21428
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time

import keras
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from experiments import data, plots, report

MODELS = {"digits": models.digits_cnn, "mnist": models.leader_sgd_cnn}
RUNS = ("synchronous", "alone", "decoupled")
NEVER = 1 << 20  # steps between exchanges
KILLED = 1  # the worker

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("dataset", "digits", list(MODELS), "Data set, without augmentation."),
    flags.DEFINE_list("runs", ",".join(RUNS), f"Some of {', '.join(RUNS)}."),
    flags.DEFINE_integer("workers", 4, "Workers of an embedded cluster.", 2),
    flags.DEFINE_integer("parameter_servers", 2, "Its parameter servers.", 1),
    flags.DEFINE_integer("epochs", 4, "Passes over the training set.", 1),
    flags.DEFINE_float("step_seconds", 0.1, "What a step takes at least.", 0.0),
    flags.DEFINE_float("slowdown", 3.0, "Of the slow worker.", 1.0),
    flags.DEFINE_float("kill_at", 0.5, "Part of all steps; 0: nobody is killed.", 0.0, 1.0),
    flags.DEFINE_integer("every", 16, "Steps between two rounds of a fragment.", 1),
    flags.DEFINE_integer("fragments", 4, "Parts of the model that take turns.", 1),
    flags.DEFINE_float("mixing", 0.5, "Share of the global weights in what learners take."),
    flags.DEFINE_string("compressor", "block_int8", "Of the differences: its name."),
    flags.DEFINE_integer("local_batch", 128, "Examples per worker and step.", 1),
    flags.DEFINE_float("learning_rate", 1e-3, "Of Adam.", 0.0),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


class Clock(keras.callbacks.Callback):
    """Notes the seconds between the end of the first step and that of the last, epoch by epoch.

    Those of the first epoch begin with its second half: before, TensorFlow compiles.

    Args:
        trainer: whose workers say how many steps they have taken, if they do.
        steps: of an epoch.
    """

    def __init__(self, trainer, steps: int):
        super().__init__()
        self.seconds = 0.0
        self.steps = 0
        self._trainer = trainer
        self._first = {0: steps // 2}
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        """Notes which one it is."""
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Starts, or looks."""
        now = time.monotonic()
        taken = sum(worker.get("steps", 0) for worker in self._trainer.workers)
        if batch == self._first.get(self._epoch, 0):
            self._start, self._before = now, taken
        self._last, self._taken = now, taken

    def on_epoch_end(self, epoch, logs=None):
        """Adds what the epoch took."""
        self.seconds += self._last - self._start
        self.steps += self._taken - self._before


class Killer(keras.callbacks.Callback):
    """Kills one worker when a number of steps is done."""

    def __init__(self, step: int):
        super().__init__()
        self.killed = False
        self._left = step

    def on_train_batch_end(self, batch, logs=None):
        """Counts."""
        self._left -= 1
        if self._left == 0:
            self.killed = kill_worker(KILLED)


def kill_worker(index: int) -> bool:
    """Kills a worker that the launcher has started on this machine, as a lack of memory would."""
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    config["task"] = {"type": "worker", "index": index}
    wanted = f"TF_CONFIG={json.dumps(config)}".encode()
    found = []
    for environment in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # not ours, or gone
            continue
    for process in found:
        os.kill(process, signal.SIGKILL)
    return bool(found)


def build_model() -> keras.Model:
    """The same weights for every run."""
    keras.utils.set_random_seed(FLAGS.seed)
    return MODELS[FLAGS.dataset]()


def batches(dataset: data.Dataset, context, paced: bool) -> tf.data.Dataset:
    """A worker's data, at its pace."""
    last = context.input_pipeline_id == context.num_input_pipelines - 1
    stream = data.worker_batches(dataset, context, FLAGS.local_batch, FLAGS.seed)
    seconds = FLAGS.step_seconds * (FLAGS.slowdown if last else 1.0)
    return data.paced(stream, seconds) if paced else stream


def make_trainer(name: str):
    """Of one of the runs."""
    inner = keras.optimizers.Adam(FLAGS.learning_rate)
    arguments = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        "workers": FLAGS.workers,
        "parameter_servers": FLAGS.parameter_servers,
    }
    if name == "synchronous":
        return tfqcomm.parameter_server.Trainer(build_model, optimizer=inner, **arguments)
    optimizer = tfqcomm.optimizers.DiLoCo(
        inner,
        every=NEVER if name == "alone" else FLAGS.every,
        fragments=FLAGS.fragments,
        compressor=FLAGS.compressor,
    )
    return tfqcomm.parameter_server.DiLoCoTrainer(
        build_model, optimizer=optimizer, mixing=FLAGS.mixing, **arguments
    )


def run(name: str, dataset: data.Dataset) -> dict:
    """Trains once, and tells what results.json says of it."""
    print(f"\n=== {name}", flush=True)
    steps = len(dataset.x_train) // (FLAGS.local_batch * FLAGS.workers)
    trainer = make_trainer(name)
    traffic, clock = tfqcomm.callbacks.TrafficLogger(), Clock(trainer, steps)
    served = "TF_CONFIG" in os.environ and name != "synchronous"
    killer = Killer(int(FLAGS.kill_at * FLAGS.epochs * steps) if served else 0)
    history = trainer.fit(
        lambda context: batches(dataset, context, paced=name != "synchronous"),
        epochs=FLAGS.epochs,
        steps_per_epoch=steps,
        validation_data=(dataset.x_test, dataset.y_test),
        callbacks=[traffic, clock, killer],
        verbose=2,
    ).history
    epochs = report.served_epochs(traffic.history, history)
    return {
        "parameters": trainer.model.count_params(),
        "test_accuracy": epochs[-1]["test_accuracy"],
        "workers": trainer.workers,
        "rounds": getattr(trainer, "rounds", 0),
        "killed": killer.killed,
        "steps_per_second": clock.steps / clock.seconds,
        "seconds": clock.seconds,
        "age": history["staleness"][-1] if "staleness" in history else None,
        "epochs": epochs,
    }


def table(runs: dict[str, dict]) -> str:
    """One line for each run, in Markdown."""
    header = ["run", "test accuracy", "steps of each worker", "useful steps per s", "rounds"]
    rows = [[*header, "answers taken, dropped", "bytes up", "bytes down"]]
    for name, result in runs.items():
        workers = result["workers"]
        mean = {
            key: sum(worker[f"bytes_{key}"] for worker in workers) / len(workers)
            for key in ("pushed", "pulled")
        }
        answers = [sum(worker.get(key, 0) for worker in workers) for key in ("taken", "dropped")]
        rows.append(
            [
                name,
                f"{result['test_accuracy']:.2%}",
                " ".join(str(worker["steps"]) for worker in workers if "steps" in worker),
                f"{result['steps_per_second']:.1f}" if name != "synchronous" else "",
                str(result["rounds"]),
                "{}, {}".format(*answers),
                f"{mean['pushed']:,.0f}",
                f"{mean['pulled']:,.0f}",
            ]
        )
    return report.markdown(rows)


def main(_):
    """Trains each of `--runs`, then prints the table."""
    tf.get_logger().setLevel("WARNING")
    unknown = set(FLAGS.runs) - set(RUNS)
    if unknown:
        raise app.UsageError(f"--runs are some of {RUNS}. Received: {sorted(unknown)}")
    dataset = data.load(FLAGS.dataset, FLAGS.data_dir)
    runs = {name: run(name, dataset) for name in FLAGS.runs}
    report.write_results(FLAGS.out, SETTINGS, runs)
    path = os.path.join(FLAGS.out, "accuracy.png")
    plots.plot_accuracy(path, report.up_and_down(runs), "Decoupled DiLoCo: bytes up and down")
    print(f"\n{table(runs)}\n\nWrote {FLAGS.out}/results.json and accuracy.png")


if __name__ == "__main__":
    app.run(main)
