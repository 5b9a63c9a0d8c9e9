"""Worker-steps per second on parameter servers: ours beside TensorFlow's own strategy.

    python -m benchmarks.parameter_server
    python -m benchmarks.parameter_server --networks=100mbit --methods=tensorflow,async_quantized

Real processes through `tfqcomm.launch`: two workers, one parameter server, and the chief, on
loopback in a namespace of its own, or each behind a network interface of the given speed (Linux,
as root or with user namespaces). Perceptrons, batches of 32 per worker, SGD. The methods:

    tensorflow       `tf.distribute.ParameterServerStrategy`, a loop of `schedule` by hand
    async_dense      `tfqcomm.parameter_server.Trainer`, float32 both ways
    async_quantized  likewise, 2 bits up (`LogGrid(0)` with error feedback), 8 bits down
    sync_dense, sync_quantized   in rounds
    async_dense_ahead, async_quantized_ahead   with `pull_ahead=True`; not by default

All methods of one model and network run one after the other, TensorFlow's first; `ratio` is to
TensorFlow's in the same row of runs. Bytes are those that pass the interface per worker-step, in
both directions together, counted on loopback. Times of different machines do not compare; the
ratios do. Prints a table in Markdown; writes all figures to a file, and a plot beside it. A line
takes about 30 s.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import contextlib
import functools
import json
import pathlib
import signal
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tfqcomm
from benchmarks import plots, workers

BATCH = 32  # examples per worker
LOOPBACK = "loopback"
TENSORFLOW = "tensorflow"
METHODS = [TENSORFLOW, "async_dense", "async_quantized", "sync_dense", "sync_quantized"]
AHEAD = ["async_dense_ahead", "async_quantized_ahead"]
WARM_UP = 10  # steps of each worker; in the first one TensorFlow traces the step
FEWEST_STEPS, MOST_STEPS = 5, 2000  # of each worker, timed

FLAGS = flags.FLAGS
flags.DEFINE_integer("workers", 2, "Worker processes on this machine.", lower_bound=1)
flags.DEFINE_list("networks", [LOOPBACK, "100mbit", "1gbit"], "Bandwidth of each task.")
flags.DEFINE_list("methods", METHODS, "Which of them.")
flags.DEFINE_list("hidden", [710, 2560], "Units of both hidden layers; one model for each.")
flags.DEFINE_float("seconds", 8, "To time each method for.", lower_bound=0.1)
flags.DEFINE_string("out", "runs/parameter_server.json", "File for all figures.")
flags.DEFINE_string("chief_of", None, "Be the chief of this method, not for users.")
flags.DEFINE_integer("units", 0, "The chief's model, not for users.")
flags.DEFINE_boolean("shaped", False, "Whether tasks have interfaces of their own, not for users.")
flags.DEFINE_string("result", None, "File for what the chief finds, not for users.")


def build_model() -> keras.Model:
    """784-units-units-10: 1.07M weights with 710 units, 8.6M with 2560."""
    units = FLAGS.units
    hidden = [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input([784]), *hidden, keras.layers.Dense(10)])


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def noise(_=None) -> tf.data.Dataset:
    """The same batch for ever: no time goes into data."""
    x = tf.random.stateless_normal([BATCH, 784], [0, 1])
    y = tf.random.stateless_uniform([BATCH], [0, 2], 0, 10, tf.int32)
    return tf.data.Dataset.from_tensors((x, y)).repeat()


def bytes_passed() -> int:
    """Through loopback, which all tasks share."""
    return 0 if FLAGS.shaped else tfqcomm.launch.interface_bytes("lo").sent


class Stopwatch(keras.callbacks.Callback):
    """Seconds and bytes from the end of an epoch's first round to that of its last."""

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter(), bytes_passed()
        if batch == 0:
            self._begin = now
        self.seconds, self.bytes = (b - a for a, b in zip(self._begin, now, strict=True))


def run_ours(method: str):
    """A function that takes so many steps of each worker; returns seconds and bytes."""
    mode, precision, *ahead = method.split("_")
    quantized = {
        "compressor": tfqcomm.compressors.LogGrid(0),
        "weight_compressor": tfqcomm.compressors.UniformGrid(8),
    }
    trainer = tfqcomm.parameter_server.Trainer(
        build_model,
        optimizer=keras.optimizers.SGD(1e-3),
        loss=loss(),
        mode=mode,
        pull_ahead=bool(ahead),
        **(quantized if precision == "quantized" else {}),
    )

    def run(steps: int) -> tuple[float, float]:
        watch = Stopwatch()
        trainer.fit(noise, steps_per_epoch=steps + 1, callbacks=[watch], verbose=0)
        return watch.seconds, watch.bytes

    return run


def run_tensorflow():
    """Likewise, with TensorFlow's strategy and a loop by hand."""
    strategy = tf.distribute.ParameterServerStrategy(
        tf.distribute.cluster_resolver.TFConfigClusterResolver()
    )
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        model, error = build_model(), loss()
        optimizer = keras.optimizers.SGD(1e-3)
        optimizer.build(model.trainable_variables)

    def replica_step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            value = error(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return value

    @tf.function
    def step(iterator):
        return strategy.run(replica_step, args=(next(iterator),))

    make = functools.partial(strategy.distribute_datasets_from_function, noise)
    iterator = iter(coordinator.create_per_worker_dataset(make))

    def run(steps: int) -> tuple[float, float]:
        begin = time.perf_counter(), bytes_passed()
        for _ in range(steps * FLAGS.workers):
            coordinator.schedule(step, args=(iterator,))
        coordinator.join()
        return time.perf_counter() - begin[0], bytes_passed() - begin[1]

    return run


def be_chief(method: str) -> None:
    """Times one method."""
    tf.get_logger().setLevel("ERROR")
    run = run_tensorflow() if method == TENSORFLOW else run_ours(method)
    run(1)
    seconds, _ = run(WARM_UP)
    steps = int(np.clip(FLAGS.seconds * WARM_UP / seconds, FEWEST_STEPS, MOST_STEPS))
    seconds, passed = run(steps)
    found = {
        "steps": steps,
        "steps_per_second": steps * FLAGS.workers / seconds,
        "bytes": None if FLAGS.shaped else passed / (steps * FLAGS.workers),
        "parameters": build_model().count_params(),
    }
    pathlib.Path(FLAGS.result).write_text(json.dumps(found))


def measure(method: str, network: str, units: int) -> dict:
    """Starts a cluster for one method; returns what its chief has found."""
    launch = [sys.executable, "-m", "tfqcomm.launch"]
    launch += [f"--workers={FLAGS.workers}", "--parameter_servers=1"]
    shaped = network != LOOPBACK
    if shaped:
        launch.append(f"--bandwidth={network}")
    launch += ["-m", "benchmarks.parameter_server", *sys.argv[1:], f"--chief_of={method}"]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        result = pathlib.Path(directory, "result.json")
        command = [*launch, f"--units={units}", f"--shaped={shaped}", f"--result={result}"]
        if not shaped:  # of its own, so that nobody else's bytes are counted
            command = stack.enter_context(tfqcomm.launch.network(1)).command(0, command)
        workers.run(command)
        found = json.loads(result.read_text())
    load = os.getloadavg()[0]  # of the machine, at the end
    return {"method": method, "network": network, **found, "load": load}


def table(rows: list[dict]) -> str:
    """In Markdown."""
    header = ["parameters", "network", "method", "worker-steps per second", "ratio", "MB per step"]
    lines = [header, ["---:", "---", "---", "---:", "---:", "---:"]]
    for row in rows:
        moved = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = [f"{row['parameters']:,}", row["network"], row["method"]]
        lines.append([*cells, f"{row['steps_per_second']:.1f}", ratio, moved])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare() -> None:
    """Measures everything that the flags say; what there is is written after each method."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for units in map(int, FLAGS.hidden):
        for network in FLAGS.networks:
            theirs = None
            for method in FLAGS.methods:
                row = measure(method, network, units)
                if method == TENSORFLOW:
                    theirs = row["steps_per_second"]
                row["ratio"] = row["steps_per_second"] / theirs if theirs else None
                rows.append(row)
                print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
                settings = {name: FLAGS[name].value for name in ("workers", "hidden", "seconds")}
                settings |= {"batch": BATCH, "cores": len(os.sched_getaffinity(0))}
                settings["date"] = time.strftime("%Y-%m-%d")
                out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    plot(rows, out.with_suffix(".png"))
    print(f"{FLAGS.workers} workers, 1 parameter server\n\n{table(rows)}")


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """Steps per second of all methods, by model and network."""
    named = [{**row, "run": f"{row['parameters']:,},\n{row['network']}"} for row in rows]
    plots.bars(
        path,
        named,
        group="run",
        bar="method",
        value="steps_per_second",
        label="worker-steps per second",
        title=f"{FLAGS.workers} workers, 1 parameter server; parameters, network",
    )


def main(_):
    """Compares, or is the chief of one method."""
    if FLAGS.chief_of:
        be_chief(FLAGS.chief_of)
        return
    for network in FLAGS.networks:
        if network != LOOPBACK:
            try:
                tfqcomm.launch.bits_per_second(network)
            except ValueError as error:
                raise app.UsageError(f"--networks {error}. Received: {network}") from None
    for method in FLAGS.methods:
        if method not in METHODS + AHEAD:
            raise app.UsageError(f"--methods must be of {METHODS + AHEAD}. Received: {method}")
    compare()


if __name__ == "__main__":
    app.run(main)
