"""Seconds and bytes until a model is as accurate as asked for, on a slow network.

    python -m benchmarks.time_to_accuracy
    python -m benchmarks.time_to_accuracy --dataset=mnist --data_dir=DIR --target=0.98

Real worker processes, each behind a network interface of its own (`tfqcomm.launch --bandwidth`:
Linux, as root or with user namespaces); worker i computes on core i, modulo the number of cores. A
perceptron with Adam; all methods start from the same weights and see the same batches, and none
has a learning rate of its own. Every `--look` steps all workers look at the test set, for which
the clock stands still, and end together once the target is reached. The clock starts after the
first step, in which TensorFlow traces; bytes are those of the interfaces, first step included.
Methods "ddp..." are of PyTorch, on the same Keras model: see `benchmarks.ddp_accuracy`.

Prints a table in Markdown and writes all figures to a file. README.md has figures measured with it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from benchmarks import workers

EVERY = 16  # steps between two exchanges of DiLoCo


@dataclasses.dataclass(frozen=True)
class Method:
    """How gradients, or models, are exchanged.

    Attributes:
        compressor: of the strategy.
        optimizer: from its learning rate.
        local: whether workers train alone in between.
        warm_up: steps in which gradients travel dense.
    """

    compressor: str | None = None
    optimizer: Callable[[float], keras.optimizers.Optimizer] = keras.optimizers.Adam
    local: bool = False
    warm_up: int = 0


def _diloco(rate):
    inner = keras.optimizers.Adam(rate)
    return tfqcomm.optimizers.DiLoCo(inner, every=EVERY, compressor="block_int8")


METHODS = {
    "dense": Method(),
    "bfloat16": Method("bfloat16"),
    "block_int8": Method("block_int8"),
    "block_sign": Method("block_sign"),
    "top_k": Method("top_k"),
    "top_k_warm": Method("top_k", warm_up=2),
    "power_sgd": Method("power_sgd"),
    "power_sgd_warm": Method("power_sgd", warm_up=2),  # as DDP's hook, which cannot begin earlier
    "comp_ams": Method(optimizer=functools.partial(tfqcomm.optimizers.CompAMS, compressor="top_k")),
    "diloco": Method(optimizer=_diloco, local=True),
}

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "digits", ["digits", "mnist"], "Data set; digits needs no download.")
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_float("target", 0.95, "Accuracy on the test set to reach.", 0.0, 1.0)
flags.DEFINE_integer("workers", 4, "Worker processes on this machine.", lower_bound=2)
flags.DEFINE_string("bandwidth", "100mbit", "Of each worker.")
flags.DEFINE_list("methods", list(METHODS), f"Which; also {', '.join(workers.DDP)}.")
flags.DEFINE_list("units", [512, 512], "Of the perceptron's hidden layers.")
flags.DEFINE_integer("batch", 64, "Examples per worker and step.", lower_bound=1)
flags.DEFINE_float("learning_rate", 1e-3, "Step size of all methods.", 0.0)
flags.DEFINE_integer("seed", 0, "Of the first weights and of the data's order.", lower_bound=0)
flags.DEFINE_integer("look", 3 * EVERY, "Steps between two looks at the test set.", lower_bound=1)
flags.DEFINE_integer("most_looks", 60, "After which a method ends in any case.", lower_bound=1)
flags.DEFINE_string("out", "runs/time_to_accuracy.json", "File for all figures.")
flags.DEFINE_string("worker_of", None, "Be a worker of this method, not for users.")
flags.DEFINE_string("results", None, "Directory for what the workers find, not for users.")


def load() -> list[np.ndarray]:
    """Examples of [0, 1] and labels, for training and for testing."""
    if FLAGS.dataset == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = (x / 16).astype("float32")
        return [x[:1437], y[:1437], x[1437:], y[1437:]]
    import tensorflow_datasets as tfds

    splits = {"split": ["train", "test"], "batch_size": -1, "as_supervised": True}
    found = tfds.load("mnist", data_dir=FLAGS.data_dir, download=FLAGS.data_dir is None, **splits)
    (x, y), (x_test, y_test) = tfds.as_numpy(found)
    return [x.astype("float32") / 255, y, x_test.astype("float32") / 255, y_test]


def perceptron(shape) -> keras.Model:
    """With the same first weights each time, for a seed."""
    keras.utils.set_random_seed(FLAGS.seed)
    return models.mlp(shape, hidden_units=list(map(int, FLAGS.units)))


class Look(keras.callbacks.Callback):
    """Ends training once the target is reached, and notes when that was, and what each look saw.

    An epoch is what lies between two looks. The seconds are those of epochs alone.
    """

    def __init__(self, x_test: np.ndarray, y_test: np.ndarray):
        super().__init__()
        self._x, self._y = tf.constant(x_test), y_test
        self.seconds, self.steps = 0.0, 0
        self.accuracies: list[float] = []
        self._started: float | None = None

    def on_train_begin(self, logs=None):
        self._logits = tf.function(lambda x: self.model(x, training=False))

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.perf_counter() if epoch else None

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self._started = self._started or time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.perf_counter() - self._started
        guessed = self._logits(self._x).numpy().argmax(axis=1)
        self.accuracies.append(float(np.mean(guessed == self._y)))
        self.model.stop_training = self.accuracies[-1] >= FLAGS.target


def work(name: str) -> None:
    """One worker: trains until the target is reached, and writes down what that took."""
    task = workers.begin()
    method = METHODS[name]
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        method.compressor, warm_up=method.warm_up
    )
    x, y, x_test, y_test = load()
    with strategy.scope():
        model = perceptron(x.shape[1:])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(method.optimizer(FLAGS.learning_rate), loss)
    dataset = workers.shuffled(x, y, FLAGS.batch * FLAGS.workers, FLAGS.seed)
    look = Look(x_test, y_test)
    average = [tfqcomm.callbacks.AverageReplicas()] if method.local else []
    fit = {"epochs": FLAGS.most_looks, "steps_per_epoch": FLAGS.look, "shuffle": False}
    before = tfqcomm.launch.interface_bytes("eth0")
    model.fit(dataset, callbacks=[*average, look], verbose=0, **fit)
    sent, _ = tfqcomm.launch.interface_bytes("eth0").since(before)
    found = {"seconds": look.seconds, "steps": look.steps, "accuracies": look.accuracies}
    found |= {"sent": sent, "parameters": model.count_params()}
    workers.write(FLAGS.results, task, found)


def run(name: str) -> dict:
    """Starts the workers of one method; returns what the slowest found, and the mean of bytes."""
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={FLAGS.workers}"]
    command.append(f"--bandwidth={FLAGS.bandwidth}")
    if name in workers.DDP:
        found = found_by_ddp(command, name)
    else:
        command += ["-m", "benchmarks.time_to_accuracy", *sys.argv[1:], f"--worker_of={name}"]
        found = workers.found_by(command)
    slowest = max(found, key=lambda worker: worker["seconds"])
    sent = float(np.mean([worker["sent"] for worker in found]))
    last = {"accuracy": slowest["accuracies"][-1], "load": os.getloadavg()[0]}
    return {"method": name, **slowest, "sent": sent, **last}


def found_by_ddp(command: list[str], name: str) -> list[dict]:
    """Of PyTorch's workers, which get examples and first weights in a file."""
    passed = ("units", "batch", "learning_rate", "target", "seed", "look", "most_looks")
    with tempfile.TemporaryDirectory() as directory:
        x, y, x_test, y_test = load()
        named = {f"weight_{i}": w for i, w in enumerate(perceptron(x.shape[1:]).get_weights())}
        arrays = os.path.join(directory, "arrays.npz")
        np.savez(arrays, x=x, y=y, x_test=x_test, y_test=y_test, **named)
        command = [*command, "-m", "benchmarks.ddp_accuracy", f"--method={name}"]
        command += [f"--arrays={arrays}", *(FLAGS[flag].serialize() for flag in passed)]
        return workers.found_by(command)


def table(rows: list[dict]) -> str:
    """In Markdown; ratios to the first row."""
    header = ["method", "seconds", "less time", "MB sent", "fewer bytes", "steps", "ms a step"]
    lines = [[*header, "accuracy, %"], ["---", *["---:"] * 7]]
    for r in rows:
        reached = "" if r["accuracy"] >= FLAGS.target else " (not reached)"
        cells = [f"{r['seconds']:.1f}", f"{rows[0]['seconds'] / r['seconds']:.1f}x"]
        cells += [f"{r['sent'] / 1e6:.1f}", f"{rows[0]['sent'] / r['sent']:.1f}x", str(r["steps"])]
        cells += [f"{1e3 * r['seconds'] / r['steps']:.0f}", f"{100 * r['accuracy']:.2f}{reached}"]
        lines.append([r["method"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(_) -> None:
    if FLAGS.worker_of:
        work(FLAGS.worker_of)
        return
    unknown = sorted(set(FLAGS.methods) - {*METHODS, *workers.DDP})
    if unknown:
        known = [*METHODS, *workers.DDP]
        raise app.UsageError(f"--methods must be among {known}. Received: {unknown}")
    workers.refuse_without_torch(FLAGS.methods)
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in FLAGS.methods:
        rows.append(run(name))
        kept = ("dataset", "target", "workers", "bandwidth", "seed")
        settings = {key: FLAGS[key].value for key in kept}
        settings |= {"cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d")}
        out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        print(f"{name}: {rows[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(f"{FLAGS.workers} workers, {rows[0]['parameters']:,} parameters, {FLAGS.bandwidth}\n")
    print(table(rows))


if __name__ == "__main__":
    app.run(main)
