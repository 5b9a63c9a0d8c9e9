"""A worker that trains the perceptron of `benchmarks.time_to_accuracy` under PyTorch's DDP.

    python -m benchmarks.time_to_accuracy --methods=dense,top_k,ddp,ddp_power_sgd_4

starts it: with the extra `peers`, which is PyTorch. The same Keras model, on Keras' torch backend,
from the same weights, with the same batches and the same Adam, in the same network.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import time

import numpy as np
import tensorflow as tf
import torch
from absl import app, flags

import models
from benchmarks import ddp_workers, workers

INTERFACE = "eth0"
EPSILON = 1e-7  # of Keras' Adam

FLAGS = flags.FLAGS
flags.DEFINE_enum("method", None, workers.DDP, "What is exchanged.", required=True)
flags.DEFINE_string("arrays", None, "File of examples and first weights.", required=True)
flags.DEFINE_list("units", None, "Of the perceptron's hidden layers.", required=True)
flags.DEFINE_integer("batch", None, "Examples per worker and step.", required=True)
flags.DEFINE_float("learning_rate", None, "Step size.", required=True)
flags.DEFINE_float("target", None, "Accuracy on the test set to reach.", required=True)
flags.DEFINE_integer("seed", None, "Of the data's order.", required=True)
flags.DEFINE_integer("look", None, "Steps between two looks at the test set.", required=True)
flags.DEFINE_integer("most_looks", None, "After which training ends.", required=True)
flags.DEFINE_string("results", None, "Directory for what the workers find.", required=True)


def batches(x: np.ndarray, y: np.ndarray, task: int):
    """This worker's part of each batch of all."""
    tf.random.set_seed(FLAGS.seed)
    world = torch.distributed.get_world_size()
    data = workers.shuffled(x, y, FLAGS.batch * world, FLAGS.seed)
    own = slice(task * FLAGS.batch, (task + 1) * FLAGS.batch)
    for images, labels in data.as_numpy_iterator():
        yield torch.tensor(images[own]), torch.tensor(labels[own].astype("int64"))


def first_workers(number: float) -> float:
    """What the first worker found, so that all end together."""
    found = torch.tensor(number, dtype=torch.float64)
    torch.distributed.broadcast(found, 0)
    return float(found)


def main(_):
    """Trains until the target is reached, with the clock stopped at each look."""
    task = ddp_workers.join(INTERFACE)
    with np.load(FLAGS.arrays) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x", "y", "x_test", "y_test"))
        weights = [arrays[f"weight_{i}"] for i in range(2 * len(FLAGS.units) + 2)]
    model = models.mlp(x.shape[1:], hidden_units=list(map(int, FLAGS.units)))
    model.set_weights(weights)
    module = ddp_workers.parallel(model, FLAGS.method)
    optimizer = torch.optim.Adam(module.parameters(), lr=FLAGS.learning_rate, eps=EPSILON)
    drawn = batches(x, y, task)

    def step():
        images, labels = next(drawn)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()

    seconds, steps, accuracies = 0.0, 0, [0.0]
    before = ddp_workers.counters(INTERFACE)
    while accuracies[-1] < FLAGS.target and steps < FLAGS.look * FLAGS.most_looks:
        started = time.perf_counter()
        for _ in range(FLAGS.look):
            step()
            if steps == 0:
                started = time.perf_counter()
            steps += 1
        seconds += time.perf_counter() - started
        with torch.no_grad():
            guessed = model(torch.tensor(x_test)).argmax(dim=1).numpy()
        accuracies.append(first_workers(float(np.mean(guessed == y_test))))
    sent, _ = ddp_workers.counters(INTERFACE) - before
    found = {"seconds": seconds, "steps": steps, "accuracies": accuracies[1:]}
    found |= {"sent": float(sent), "parameters": int(model.count_params())}
    workers.write(FLAGS.results, task, found)
    ddp_workers.leave()


if __name__ == "__main__":
    app.run(main)
