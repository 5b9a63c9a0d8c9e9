"""Leader SGD against elastic and periodic averaging: replicas that train alone between pulls.

    python -m experiments.leader_sgd --experiment=sinc --out=runs/sinc
    python -m experiments.leader_sgd --experiment=matrix --out=runs/matrix
    python -m experiments.leader_sgd --dataset=mnist --data_dir=DIR --out=runs/leader_sgd

`sinc` (Figure 2 of the paper): L(x, y) = sin(pi r) / (pi r) has rings of ever poorer minima around
the best one. Four workers start in four valleys and descend for 100 steps, with rate and pull 0.1
at every step. The leader takes all to L = -0.2172, the global minimum; a centre between the valleys
ends at -0.0913.

`matrix` (Section 3 of the paper): F(X) = |X X' - M|^2 / 4 with a 200 x 200 matrix M of rank 10 has
all rotations of a solution for minima. The average of two is none: after 50 steps with rate 0.4 and
pull 0.1, four workers pulled to a leader have F <= 1e-5, and so has their average; the average of
those that are pulled to a centre has more than 1e-2.

`images`: the network of the authors' Fashion-MNIST demonstration (on CIFAR-10 their 7-layer one),
four workers with 128 examples each, momentum 0.9, weight decay 1e-5, rate 0.05, times 0.9 after
each epoch, a pull every 64 steps. The test accuracy is that of the workers' average. `synchronous`
averages at every step, which is synchronous SGD.

Expected for Fashion-MNIST after 12 epochs, in %: Leader SGD with a pull of 0.5 87.5, with 0.1 86.4;
synchronous 87.6, periodic averaging 87.2, EASGD with beta 0.9 86.5, with 0.43 84.7. Ours, on MNIST,
and the time it takes: experiments/README.md.

References:
    Teng et al.: Leader Stochastic Gradient Descent for Distributed Training of Deep Learning
    Models, NeurIPS 2019, https://arxiv.org/abs/1905.10395
    Zhang, Choromanska, LeCun: Deep Learning with Elastic Averaging SGD, NeurIPS 2015,
    https://arxiv.org/abs/1412.6651
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import models
from experiments import data, plots, report, training
from tfqcomm.callbacks import AverageReplicas
from tfqcomm.optimizers import ElasticAveragingSGD, LeaderSGD, PeriodicAveragingSGD

MODELS = {
    "digits": models.digits_cnn,
    "mnist": models.leader_sgd_cnn,
    "cifar10": models.leader_sgd_cnn7,
}
METHODS = ("leader_sgd", "elastic_averaging", "periodic_averaging", "synchronous")

SINC_STARTS = ((20.0, 11.0), (17.0, 8.0), (-6.0, -4.0), (-15.0, -18.0))
SINC = {"rate": 0.1, "pull": 0.1, "steps": 100}
MATRIX = {"rate": 0.4, "pull": 0.1, "steps": 50}
MATRIX_SIZE, MATRIX_RANK = 200, 10

FLAGS = flags.FLAGS
SETTINGS = [  # recorded in results.json
    flags.DEFINE_enum("experiment", "images", ["images", "sinc", "matrix"], "What to train."),
    flags.DEFINE_enum("dataset", "mnist", list(MODELS), "Data set, without augmentation."),
    flags.DEFINE_integer("workers", 4, "Workers, logical devices of this process.", 1),
    flags.DEFINE_integer("epochs", 12, "Passes over the training set.", 1),
    flags.DEFINE_list("methods", ",".join(METHODS), f"Some of {', '.join(METHODS)}."),
    flags.DEFINE_integer("period", 64, "Steps between two pulls.", 1),
    flags.DEFINE_float("pull", 0.5, "Of Leader SGD: how far to go towards the leader.", 0.0, 1.0),
    flags.DEFINE_float("beta", 0.9, "Of elastic averaging: its strength, all workers together."),
    flags.DEFINE_integer("groups", 1, "Of Leader SGD; global pulls come every second time.", 1),
    flags.DEFINE_string("leader_compressor", None, "Of Leader SGD: a compressor's name."),
    flags.DEFINE_integer("local_batch", 128, "Examples per worker and step.", 1),
    flags.DEFINE_float("learning_rate", 0.05, "Step size of the first epoch.", 0.0),
    flags.DEFINE_float("decay", 0.9, "What an epoch leaves of the step size.", 0.0, 1.0),
    flags.DEFINE_float("momentum", 0.9, "Of each worker.", 0.0, 1.0),
    flags.DEFINE_integer("seed", 0, "Of the weights and the data's order.", 0),
]
flags.DEFINE_string("data_dir", None, "Directory of a prepared tfds data set; else downloaded.")
flags.DEFINE_string("out", None, "Directory for results.json and a plot.", required=True)


# ------------------------------------------------------------------------------------------- images


def optimizer(method: str, learning_rate) -> keras.optimizers.Optimizer:
    """The optimizer of one of `--methods`."""
    common = {"momentum": FLAGS.momentum, "weight_decay": 1e-5}
    if method == "leader_sgd":
        return LeaderSGD(
            learning_rate,
            local_pull=FLAGS.pull,
            global_pull=FLAGS.pull,
            local_period=FLAGS.period,
            global_period=FLAGS.period * min(FLAGS.groups, 2),
            groups=FLAGS.groups,
            leader_compressor=FLAGS.leader_compressor,
            seed=FLAGS.seed,
            **common,
        )
    if method == "elastic_averaging":
        return ElasticAveragingSGD(learning_rate, beta=FLAGS.beta, period=FLAGS.period, **common)
    period = 1 if method == "synchronous" else FLAGS.period
    return PeriodicAveragingSGD(learning_rate, period=period, **common)


def images(devices: Sequence[str], dataset: data.Dataset) -> dict[str, dict]:
    """Trains once with each of `--methods`, from the same weights on the same data."""
    strategy = training.mirrored_strategy(devices)
    global_batch = FLAGS.local_batch * FLAGS.workers
    steps = len(dataset.x_train) // global_batch
    runs = {}
    for method in FLAGS.methods:
        print(f"\n=== {method}, {FLAGS.workers} workers", flush=True)
        rate = keras.optimizers.schedules.ExponentialDecay(
            FLAGS.learning_rate, steps, FLAGS.decay, staircase=True
        )
        model = training.compiled(
            MODELS[FLAGS.dataset],
            lambda method=method, rate=rate: optimizer(method, rate),
            strategy,
            FLAGS.seed,
        )
        epochs = training.train(
            model,
            dataset,
            epochs=FLAGS.epochs,
            global_batch=global_batch,
            seed=FLAGS.seed,
            first=[AverageReplicas()],
        )
        runs[method] = {
            "parameters": model.count_params(),
            **report.summary(epochs),
            "epochs": epochs,
        }
        if method == "leader_sgd":
            runs[method]["times_led"] = model.optimizer.times_led.tolist()
    return runs


# ------------------------------------------------------------------------------------------- toys


def sinc(point: tf.Tensor) -> tf.Tensor:
    """sin(pi r) / (pi r) of a point off the origin, r being its distance from there."""
    r = np.pi * tf.norm(point)
    return tf.sin(r) / r


def factorization() -> tuple[Callable[[tf.Tensor], tf.Tensor], np.ndarray]:
    """F(X) = |X X' - M|^2 / 4, and where the workers start."""
    rng = np.random.default_rng(FLAGS.seed)
    shape = (MATRIX_SIZE, MATRIX_RANK)
    solution = rng.normal(size=shape) / MATRIX_SIZE**0.5
    target = tf.constant(solution @ solution.T, tf.float32)
    starts = rng.normal(size=(FLAGS.workers, *shape)) / MATRIX_SIZE**0.5

    def loss(x):
        return tf.reduce_sum((x @ tf.transpose(x) - target) ** 2) / 4

    return loss, starts


def descend(strategy, make, loss, starts: np.ndarray, steps: int) -> dict:
    """Lets every worker descend from a start of its own.

    Returns:
        Losses float[steps, workers] on the way, the last ones, and that of the final average.
    """
    world = strategy.num_replicas_in_sync
    with strategy.scope():
        variable = keras.Variable(starts[0].astype("float32"))
        chosen = make()
        chosen.build([variable])
    own = strategy.experimental_local_results(variable.value)
    for copy, start in zip(own, starts, strict=True):
        copy.assign(start)

    def replica_step():
        with tf.GradientTape() as tape:
            value = loss(variable.value)
            scaled = chosen.scale_loss(value / world)
        chosen.apply([tape.gradient(scaled, variable.value)], [variable])
        return value

    @tf.function
    def step():
        return strategy.experimental_local_results(strategy.run(replica_step))

    history = [[float(value) for value in step()] for _ in range(steps)]
    return {
        "losses": history,
        "last": [float(loss(copy)) for copy in own],
        "last_of_average": float(loss(tf.add_n([copy.read_value() for copy in own]) / world)),
    }


def toys(devices: Sequence[str]) -> dict[str, dict]:
    """Descends with each method, pulling at every step."""
    if FLAGS.experiment == "sinc":
        setting, loss, starts = SINC, sinc, np.array(SINC_STARTS)
    else:
        loss, starts = factorization()
        setting = MATRIX
    rate, pull = setting["rate"], setting["pull"]
    makers = {
        "leader_sgd": lambda: LeaderSGD(rate, global_pull=pull, global_period=1, loss_window=1),
        "elastic_averaging": lambda: ElasticAveragingSGD(rate, alpha=pull, period=1),
        "alone": lambda: LeaderSGD(rate, global_pull=0.0),
    }
    runs = {}
    for name, make in makers.items():
        strategy = training.mirrored_strategy(devices)
        runs[name] = descend(strategy, make, loss, starts, setting["steps"])
        last, average = runs[name]["last"], runs[name]["last_of_average"]
        print(f"{name}: workers {min(last):.3g} to {max(last):.3g}, their average {average:.3g}")
    return runs


def main(_):
    """Runs the experiment."""
    tf.get_logger().setLevel("WARNING")
    unknown = set(FLAGS.methods) - set(METHODS)
    if unknown:
        raise app.UsageError(f"--methods are some of {METHODS}. Received: {sorted(unknown)}")
    if FLAGS.experiment == "sinc" and FLAGS.workers != len(SINC_STARTS):
        raise app.UsageError(f"--experiment=sinc is for {len(SINC_STARTS)} workers.")
    devices = training.logical_cpus(FLAGS.workers)
    path = os.path.join(FLAGS.out, f"{FLAGS.experiment}.png")
    if FLAGS.experiment == "images":
        runs = images(devices, data.load(FLAGS.dataset, FLAGS.data_dir))
        report.write_results(FLAGS.out, SETTINGS, runs)
        plots.plot_accuracy(path, {name: run["epochs"] for name, run in runs.items()}, "Leader SGD")
    else:
        runs = toys(devices)
        report.write_results(FLAGS.out, SETTINGS, runs)
        losses = {name: np.array(run["losses"]) for name, run in runs.items()}
        plots.plot_losses(path, losses, "Leader SGD", logarithmic=FLAGS.experiment == "matrix")
    print(f"\nWrote {FLAGS.out}/results.json and {FLAGS.experiment}.png")


if __name__ == "__main__":
    app.run(main)
