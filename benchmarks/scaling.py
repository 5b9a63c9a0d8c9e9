"""What a worker sends, from 2 workers to 16, beside the formulas; and predicted to 1,024.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --units=784,256,10 --workers=2,4 --out=runs/scaling.json

Workers are logical devices of one process, which is enough to count: each step's exchange is the
one that so many processes would make, and `TrafficLogger` counts what each of them would send.
With p the bytes of one worker's payload and d the model's float32:

    dense           2 (W - 1) / W d
    all_gather      (W - 1) p
    two_phase       2 (W - 1) / W p

What is not compressed, here the biases, travels dense in each. Then `tfqcomm.advise` predicts the
step from 2 to 1,024 workers on `--bandwidth`; how near that comes, `benchmarks.advise` measures
with real processes. Takes about 20 minutes, most of it for 16 workers.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import pathlib

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging
from matplotlib.figure import Figure

import models
import tfqcomm
from tfqcomm import compressors

STEPS = 3
WORLDS = [2**exponent for exponent in range(1, 11)]  # of the prediction
METHODS = [  # compressor, schedule
    ("identity", "auto"),
    ("float16", "auto"),
    ("block_int8", "two_phase"),
    ("block_sign", "two_phase"),
    ("block_sign", "all_gather"),
    ("top_k", "all_gather"),
    ("power_sgd", "auto"),
]

FLAGS = flags.FLAGS
flags.DEFINE_list("workers", "2,3,4,8,16", "Numbers of workers to count with.")
flags.DEFINE_list("units", "784,1024,1024,10", "The perceptron: inputs, layers, classes.")
flags.DEFINE_string("bandwidth", "1Gbps", "Of the workers of the prediction.")
flags.DEFINE_string("latency", "0.2ms", "Of their messages.")
flags.DEFINE_string("out", "runs/scaling.json", "Figures; beside it the plot.")


def perceptron() -> keras.Model:
    """With the loss and the optimizer of `benchmarks.network`, and fewer units."""
    first, *hidden, last = map(int, FLAGS.units)
    model = models.mlp([first], last, hidden)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def counted(method: str, schedule: str, world: int) -> float:
    """Bytes that each of `world` workers sends in a step of `fit`."""
    devices = [f"CPU:{index}" for index in range(world)]
    ops = tfqcomm.distribute.CompressedAllReduce(method, schedule=schedule)
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)
    with strategy.scope():
        model = perceptron()
    traffic = tfqcomm.callbacks.TrafficLogger(verbose=0)
    x = np.zeros([world, model.input_shape[1]], np.float32)
    data = tf.data.Dataset.from_tensors((x, np.zeros([world], np.int64))).repeat()
    model.fit(data, steps_per_epoch=STEPS, callbacks=[traffic], verbose=0)
    return traffic.history[0]["bytes_sent"] / STEPS


def formula(method: str, schedule: str, world: int) -> float:
    """The same by the formulas above, from what the codec says of its words."""
    units = list(map(int, FLAGS.units))
    ring = 2 * (world - 1) / world
    dense = 4 * sum(units[1:])
    if method == "identity":
        return ring * (dense + 4 * sum(np.multiply(units[:-1], units[1:])))
    payload = 0
    for inputs, outputs in zip(units[:-1], units[1:], strict=True):
        payload += 4 * words(compressors.get(method), inputs, outputs)
    if schedule == "all_gather":
        return (world - 1) * payload + ring * dense
    return ring * (payload + dense)


def words(codec: compressors.Compressor, inputs: int, outputs: int) -> int:
    """Of a kernel's message: PowerSGD's are its two factors."""
    if codec.low_rank:
        return codec.rank * (inputs + outputs)
    return codec.num_words(inputs * outputs)


def bytes_table(rows: list[dict]) -> str:
    """In Markdown: MB of a step, and in brackets what part of the formula's that is."""
    worlds = sorted({row["workers"] for row in rows})
    lines = [["method", "schedule", *(f"W = {world}" for world in worlds)]]
    lines.append(["---", "---", *["---:"] * len(worlds)])
    for method, schedule in METHODS:
        found = [row for row in rows if (row["method"], row["schedule"]) == (method, schedule)]
        cells = [f"{r['sent'] / 1e6:.3f} ({r['sent'] / r['formula']:.3f})" for r in found]
        lines.append([f"`{method}`", schedule, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path: pathlib.Path, rows: list[dict], advice: tfqcomm.advise.Advice) -> None:
    """Bytes that were counted, and steps as predicted, against the number of workers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    sent, step = figure.subplots(1, 2)
    for method, schedule in METHODS:
        found = [row for row in rows if (row["method"], row["schedule"]) == (method, schedule)]
        label = method if schedule == "auto" else f"{method}, {schedule}"
        sent.loglog([r["workers"] for r in found], [r["sent"] for r in found], ".-", label=label)
    sent.set(xlabel="workers", ylabel="bytes sent by one worker in a step")
    sent.legend(fontsize="small")
    for method in advice.methods:
        rows_of = [row for world in WORLDS for row in advice.rows(world) if row.method == method]
        times = [1e3 * row.prediction.seconds for row in rows_of]
        step.loglog(WORLDS, times, ".-", label=f"{method}, {method.schedule or 'dense'}")
    step.set(xlabel="workers", ylabel=f"step in ms, predicted for {FLAGS.bandwidth}")
    step.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    worlds = sorted(map(int, FLAGS.workers))
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * worlds[-1]
    tf.config.set_logical_device_configuration(cpu, devices)
    rows = []
    for method, schedule in METHODS:
        for world in worlds:
            sent, expected = (f(method, schedule, world) for f in (counted, formula))
            row = {"method": method, "schedule": schedule, "workers": world}
            rows.append({**row, "sent": sent, "formula": expected})
    print(bytes_table(rows))
    names = list(dict.fromkeys(method for method, _ in METHODS if method != "identity"))
    advice = tfqcomm.advise.report(
        perceptron(),
        workers=2,
        bandwidth=FLAGS.bandwidth,
        latency=FLAGS.latency,
        compressors=names,
    )
    print(f"\n{advice.scaling(WORLDS)}")
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    plot(out.with_suffix(".png"), rows, advice)
    print(f"\nWrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    app.run(main)
