"""Worker processes of a benchmark: how each begins, and how what they find comes home."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, logging

DDP = ("ddp", "ddp_bf16", "ddp_fp16", "ddp_power_sgd_1", "ddp_power_sgd_4")  # PyTorch's methods
DDP_ALONE = "ddp_alone"  # its step without any


class Stopwatch(keras.callbacks.Callback):
    """Seconds of each step, with what `fit` does between two.

    Args:
        every: steps in a round, of which the mean counts.
    """

    def __init__(self, every: int = 1):
        super().__init__()
        self._every = every

    def on_epoch_begin(self, epoch, logs=None):
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())

    def seconds(self) -> np.ndarray:
        """Of a step in each round of the last epoch."""
        return np.diff(self.times).reshape(-1, self._every).mean(axis=1)


def refuse_without_torch(methods: Sequence[str]) -> None:
    """Before anything is started.

    Raises:
        UsageError: for methods of PyTorch's DDP where there is no PyTorch.
    """
    of_torch = [method for method in methods if method in DDP]
    if of_torch and not importlib.util.find_spec("torch"):
        raise app.UsageError(
            f"--methods={','.join(of_torch)} needs PyTorch: pip install '.[peers]'"
        )


def begin() -> int:
    """Keeps this worker i to core i, modulo the number of cores, and to itself; returns i.

    To be called before TensorFlow makes its threads.
    """
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.WARNING)
    task = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[task % len(cores)]})
    return task


def noise(model: keras.Model, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples for a classifier, and labels: the same ones for all workers."""
    random = np.random.RandomState(0)
    x = random.randn(examples, *model.input_shape[1:]).astype("float32")
    return x, random.randint(0, model.output_shape[1], examples)


def shuffled(x: np.ndarray, y: np.ndarray, batch: int, seed: int) -> tf.data.Dataset:
    """Batches of all workers, without an end: the same ones for a seed, which Keras has, too."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).repeat()
    return dataset.batch(batch, drop_remainder=True).prefetch(2)


def write(results: str, task: int, found) -> None:
    """What this worker has found, to be read by `found_by`."""
    pathlib.Path(results, f"{task}.json").write_text(json.dumps(found))


def run(command: Sequence[str]) -> None:
    """Runs the launcher, which is killed when this process ends; its failure is an error.

    Not by `preexec_fn` and `die_with_parent`: Python then calls what is registered to be called at
    a fork, and an interrupt that comes just there is lost.
    """
    subprocess.run(["setpriv", "--pdeathsig=KILL", *command], check=True, stdout=sys.stderr)


def found_by(command: Sequence[str]) -> list:
    """Runs the launcher; returns what its workers wrote to `--results`, in their order."""
    with tempfile.TemporaryDirectory() as results:
        run([*command, f"--results={results}"])
        paths = sorted(pathlib.Path(results).glob("*.json"))
        return [json.loads(path.read_text()) for path in paths]
