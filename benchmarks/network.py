"""What a step of `fit` takes on networks of several speeds, with each compressor and without.

    python -m benchmarks.network
    python -m benchmarks.network --workers=4 --networks=100mbit --methods=dense,power_sgd --turns=3
    python -m benchmarks.network --methods=dense,top_k,ddp,ddp_power_sgd_4
    python -m benchmarks.network --model=resnet20 --networks=100mbit
    python -m benchmarks.network --networks=50mbit,200mbit,1gbit,5gbit --methods=dense,diloco_16

Real worker processes, each behind a network interface of its own (`tfqcomm.launch --bandwidth`:
Linux, as root or with user namespaces); "loopback" is without limit. A perceptron of 15.0M
parameters, batches of 32 per worker, SGD with momentum; worker i computes on core i, modulo the
number of cores. The step of one worker alone, which exchanges nothing, is timed anew for each
network, so that all ratios of a row are of one time:

    wire           bytes that a worker sends or receives per step, whichever is more / bandwidth
    ratio          step / max(alone, wire): 1 is what perfect overlap would reach
    utilisation    alone / step
    processor      the processor time of a step / that of the step alone: what compression costs a
                   worker, also on a machine that others use too

Method "auto" is what a strategy chooses by itself. "diloco_16" is `DiLoCo` with an exchange every
16 steps, "diloco_16_block_int8" compresses it; their step is that of a round's mean. Methods
"ddp..." are of PyTorch, on the same Keras model: see `benchmarks.ddp`; so is their step alone.

Times of different machines do not compare; the ratios do, and where the speed changes those of
several `--turns`. README.md has figures measured with it. Prints a table in Markdown; writes all
figures to a file, and a plot of the steps beside it. A line takes about 20 s, and the dense one at
100 Mbit/s 40 s.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import collections
import contextlib
import functools
import json
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import models
import tfqcomm
from benchmarks import plots, workers
from benchmarks.network_rows import ALONE, LOOPBACK, alone_of, rows_of, table

BATCH = 32  # examples per worker
DENSE = "dense"
AUTO = "auto"
DILOCO = re.compile(r"diloco_([2-9]|[1-9]\d+)(?:_(\w+))?")  # steps of a round, compressor
WARM_UP = 2  # steps; in the first one TensorFlow traces the step
MOST_STEPS, FEWEST_STEPS = 200, 3

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", 2, "Worker processes on this machine.", lower_bound=2)
flags.DEFINE_list("networks", [LOOPBACK, "100mbit", "1gbit"], "Bandwidth of each worker.")
flags.DEFINE_list("methods", [DENSE, "block_sign", "top_k"], "Compressors, dense, auto, ...")
flags.DEFINE_float("seconds", 8, "To time each method for, after two steps.", lower_bound=0.1)
flags.DEFINE_integer("turns", 1, "Times each method is timed, in turn; the median counts.", 1)
flags.DEFINE_list("units", [784, 3072, 3072, 1024, 10], "Of the perceptron, input and output too.")
flags.DEFINE_string("model", None, "A function of `models`, in place of the perceptron.")
flags.register_validator(  # here, as other benchmarks have this flag, too
    "model",
    lambda name: name is None or name in models.__all__,
    f"--model must be one of {sorted(models.__all__)}",
)
flags.DEFINE_string("out", "runs/network.json", "File for all figures.")
flags.DEFINE_string("worker_of", None, "Be a worker of this method, not for users.")
flags.DEFINE_boolean("shaped", False, "Whether a worker has an interface, not for users.")
flags.DEFINE_string("results", None, "Directory for what the workers find, not for users.")


def compiled(outer: Callable = lambda inner: inner) -> keras.Model:
    """784-3072-3072-1024-10 unless told otherwise: 15.0M weights, 60 MB of gradient.

    Args:
        outer: makes the optimizer out of SGD, such as `DiLoCo`.
    """
    keras.utils.set_random_seed(0)
    first, *hidden, last = map(int, FLAGS.units)
    model = getattr(models, FLAGS.model)() if FLAGS.model else models.mlp([first], last, hidden)
    model.compile(
        outer(keras.optimizers.SGD(1e-3, momentum=0.9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def work(method: str) -> None:
    """One worker: times its steps and counts its bytes."""
    task = workers.begin()
    local = DILOCO.fullmatch(method)
    every = int(local[1]) if local else 1
    if method == ALONE:
        strategy = tf.distribute.get_strategy()
    else:
        compressor = None if method == DENSE or local else method
        strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(compressor)
    with strategy.scope():
        if local:
            diloco = tfqcomm.optimizers.DiLoCo
            model = compiled(functools.partial(diloco, every=every, compressor=local[2]))
        else:
            model = compiled()
    replicas = strategy.num_replicas_in_sync
    x, y = workers.noise(model, BATCH * replicas)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat()

    watch = workers.Stopwatch(every)
    fit = functools.partial(model.fit, dataset, callbacks=[watch], verbose=0, shuffle=False)
    fit(steps_per_epoch=WARM_UP * every)
    steps = every * agreed(strategy, task, FLAGS.seconds / every / watch.seconds()[-1])
    before, busy = traffic(), time.process_time()
    fit(steps_per_epoch=steps)
    busy = time.process_time() - busy
    sent, received = traffic().since(before)
    found = {
        "ms": 1e3 * float(np.median(watch.seconds())),
        "low_ms": 1e3 * float(np.quantile(watch.seconds(), 0.1)),
        "processor_ms": 1e3 * busy / steps,
        "steps": steps,
        "sent": sent / steps,
        "received": received / steps,
        "parameters": model.count_params(),
    }
    workers.write(FLAGS.results, task, found)


def agreed(strategy: tf.distribute.Strategy, task: int, steps: float) -> int:
    """The first worker's number of steps, or of rounds, within limits."""
    steps = min(max(int(steps), FEWEST_STEPS), MOST_STEPS) if task == 0 else 0

    @tf.function
    def total():
        return strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce("sum", tf.constant(steps))
        )

    return int(total())


def traffic() -> tfqcomm.launch.Traffic:
    """What has passed this worker's interface; on loopback that of all workers, which is one."""
    return tfqcomm.launch.interface_bytes("eth0" if FLAGS.shaped else "lo")


def run(method: str, network: str) -> dict[str, float]:
    """Starts the workers of one method on one network; returns what they found."""
    world = 1 if method in (ALONE, workers.DDP_ALONE) else FLAGS.workers
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={world}"]
    if network != LOOPBACK:
        command.append(f"--bandwidth={network}")
    command += worker(method, network)
    with contextlib.ExitStack() as stack:
        if network == LOOPBACK:  # of its own, so that nobody else's bytes are counted
            command = stack.enter_context(tfqcomm.launch.network(1)).command(0, command)
        found = workers.found_by(command)
    shared = world if network == LOOPBACK else 1  # all workers' bytes pass the one interface
    return {
        "method": method,
        "network": network,
        "processor_ms": float(np.mean([worker["processor_ms"] for worker in found])),
        "ms": max(worker["ms"] for worker in found),
        "low_ms": max(worker["low_ms"] for worker in found),  # nearer to a machine of one's own
        "steps": found[0]["steps"],
        "sent": float(np.mean([worker["sent"] for worker in found])) / shared,
        "received": float(np.mean([worker["received"] for worker in found])) / shared,
        "parameters": found[0]["parameters"],
        "load": os.getloadavg()[0],  # of the machine, at the end
    }


def worker(method: str, network: str) -> list[str]:
    """What each worker runs."""
    if method not in (*workers.DDP, workers.DDP_ALONE):
        shaped = f"--shaped={network != LOOPBACK}"
        return ["-m", "benchmarks.network", *sys.argv[1:], f"--worker_of={method}", shaped]
    return [
        *("-m", "benchmarks.ddp", f"--method={method}", f"--seconds={FLAGS.seconds}"),
        *([f"--model={FLAGS.model}"] if FLAGS.model else []),
        f"--units={','.join(map(str, FLAGS.units))}",
        f"--batch={BATCH}",
        f"--limits={FEWEST_STEPS},{MOST_STEPS}",
        f"--interface={'lo' if network == LOOPBACK else 'eth0'}",
    ]


def compare() -> None:
    """Measures everything that the flags say; what there is is written after each method."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for network in FLAGS.networks:
        before, found = rows, collections.defaultdict(list)  # method -> what each turn found
        for turn in range(FLAGS.turns):
            for method in FLAGS.methods:
                own = alone_of(method)
                if len(found[own]) == turn:
                    found[own].append(run(own, LOOPBACK))
                found[method].append(run(method, network))
                milliseconds = found[method][-1]["ms"]
                print(f"{network}, {method}: {milliseconds:.0f} ms", file=sys.stderr, flush=True)
                rows = [*before, *rows_of(FLAGS.methods, found)]
                write(out, rows)
    title = f"{FLAGS.workers} workers, {rows[0]['parameters']:,} parameters"
    named = {"group": "network", "bar": "method", "value": "ms", "label": "step [ms]"}
    plots.bars(out.with_suffix(".png"), rows, **named, title=title)
    print(f"{title}\n\n{table(rows)}")


def write(out: pathlib.Path, rows: Sequence[Mapping]) -> None:
    """Keeps the rows, with what they were measured with."""
    flags_kept = ("workers", "units", "model", "seconds", "turns")
    settings = {name: FLAGS[name].value for name in flags_kept}
    settings |= {"batch": BATCH, "cores": len(os.sched_getaffinity(0))}
    settings["date"] = time.strftime("%Y-%m-%d")
    out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def main(_):
    """Compares, or is one of the workers."""
    if FLAGS.worker_of:
        work(FLAGS.worker_of)
        return
    for network in FLAGS.networks:
        if network != LOOPBACK:
            try:
                tfqcomm.launch.bits_per_second(network)
            except ValueError as error:
                raise app.UsageError(f"--networks {error}. Received: {network}") from None
    workers.refuse_without_torch(FLAGS.methods)
    for method in FLAGS.methods:
        local = DILOCO.fullmatch(method)
        compressor = local[2] if local else method
        if compressor not in (None, DENSE, AUTO, *workers.DDP):
            tfqcomm.compressors.get(compressor)  # or its error, before anything is started
    compare()


if __name__ == "__main__":
    app.run(main)
