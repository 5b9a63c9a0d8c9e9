"""How near `tfqcomm.advise` comes: predicted and measured steps, side by side in one run.

    python -m benchmarks.advise
    python -m benchmarks.advise --workers=4 --networks=100mbit --methods=dense,block_sign
    python -m benchmarks.advise --model=comp_ams_mnist_cnn

Real worker processes, each behind a network interface of its own, and worker i on core i, modulo
the number of cores, as in benchmarks/network.py, whose perceptron and flags these are. For each
network the workers measure what `report` measures (step, exchange, link), then train with each
method. `report` predicts for workers that each have a processor; where here there are more of them
than cores, what it found of the processor is multiplied by the workers of a core.

    measured    10th percentile of the steps of `fit`, of the slowest worker: predictions are for
                machines that do nothing else, and so are the quick steps of one that does
    median      of the same steps
    processor   its time in a step, predicted and measured: others on the machine change it little
    error       predicted / measured - 1

README.md has figures measured with it. Takes about two minutes for a network.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import dataclasses
import functools
import json
import pathlib
import sys
import time

import numpy as np
import tensorflow as tf
from absl import app, flags

import tfqcomm
from benchmarks import network, workers

FLAGS = flags.FLAGS
flags.FLAGS.set_default("methods", ["dense", "float16", "block_int8", "block_sign", "top_k"])
flags.FLAGS.set_default("networks", ["100mbit", "1gbit"])
flags.FLAGS.set_default("seconds", 6)
flags.FLAGS.set_default("out", "runs/advise.json")


def work() -> None:
    """One worker: predicts, trains with each method, and writes down both."""
    of_a_core = max(1, FLAGS.workers / len(os.sched_getaffinity(0)))
    task = workers.begin()
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()
    model = network.compiled()
    x, y = workers.noise(model, network.BATCH)
    names = [name for name in FLAGS.methods if name != network.DENSE]
    advice = tfqcomm.advise.report(
        model, x, y, workers=FLAGS.workers, compressors=names, strategy=strategy
    )
    shared = sharing(advice, of_a_core)
    found = []
    for name in FLAGS.methods:
        prediction = row_of(shared, name).prediction
        alone = row_of(advice, name).prediction
        found.append(
            {
                "method": name,
                "predicted_ms": 1e3 * prediction.seconds,
                "predicted_bytes": prediction.bytes_sent,
                "predicted_processor_ms": 1e3 * alone.processor_seconds,
                "codec_ms": 1e3 * prediction.codec_seconds,
                "link_ms": 1e3 * prediction.link_seconds,
                "compute_ms": 1e3 * advice.compute.seconds,
                **measured(name, task),
            }
        )
    workers.write(FLAGS.results, task, found)


def row_of(advice: tfqcomm.advise.Advice, name: str) -> tfqcomm.advise.Row:
    """What is predicted of a method with the schedule that a strategy would take."""
    if name == network.DENSE:
        return advice.dense()
    codec = tfqcomm.compressors.get(name)
    rows = [row for row in advice.rows() if row.method.compressor == codec]
    return min(rows, key=lambda row: (row.prediction.bytes_sent, row.method.schedule))


def sharing(advice: tfqcomm.advise.Advice, of_a_core: float) -> tfqcomm.advise.Advice:
    """The same for so many workers on each core."""
    methods = []
    for method in advice.methods:
        buckets = tuple(
            dataclasses.replace(
                bucket,
                before=of_a_core * bucket.before,
                after=of_a_core * bucket.after,
                after_each=of_a_core * bucket.after_each,
            )
            for bucket in method.buckets
        )
        methods.append(dataclasses.replace(method, buckets=buckets))
    compute = advice.compute.scaled_to(of_a_core * advice.compute.seconds)
    sending = of_a_core * advice.link.processor_seconds
    link = dataclasses.replace(advice.link, processor_seconds=sending)
    return dataclasses.replace(advice, compute=compute, methods=tuple(methods), link=link)


def measured(name: str, task: int) -> dict[str, float]:
    """A step of `fit` with a method, and the bytes it sends."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        None if name == network.DENSE else name
    )
    with strategy.scope():
        model = network.compiled()
    x, y = workers.noise(model, network.BATCH * FLAGS.workers)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat()
    watch = workers.Stopwatch()
    fit = functools.partial(model.fit, dataset, callbacks=[watch], verbose=0, shuffle=False)
    fit(steps_per_epoch=network.WARM_UP)
    steps = network.agreed(strategy, task, FLAGS.seconds / watch.seconds()[-1])
    before, busy = network.traffic(), time.process_time()
    fit(steps_per_epoch=steps)
    busy = time.process_time() - busy
    sent, _ = network.traffic().since(before)
    times = watch.seconds()
    return {
        "ms": 1e3 * float(np.median(times)),
        "low_ms": 1e3 * float(np.quantile(times, 0.1)),
        "processor_ms": 1e3 * busy / steps,
        "sent": sent / steps,
        "steps": steps,
    }


def run(rate: str) -> list[dict]:
    """Starts the workers on a network; returns a row for each method."""
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={FLAGS.workers}"]
    command += [f"--bandwidth={rate}", "-m", "benchmarks.advise", *sys.argv[1:]]
    command += ["--worker_of=all", "--shaped"]
    found = workers.found_by(command)
    rows = []
    for of_workers in zip(*found, strict=True):
        slowest = max(of_workers, key=lambda row: row["low_ms"])
        # The codecs' times are each worker's own; the slowest one's are all's.
        predicted = max(row["predicted_ms"] for row in of_workers)
        row = {"network": rate, "workers": len(found), **slowest, "predicted_ms": predicted}
        rows.append({**row, "error": predicted / row["low_ms"] - 1, "load": os.getloadavg()[0]})
    return rows


def table(rows: list[dict]) -> str:
    """In Markdown."""
    header = ["network", "method", "MB sent: predicted", "measured", "step, ms: predicted"]
    header += ["measured", "median", "error", "processor, ms: predicted", "measured"]
    lines = [header, ["---", "---", *["---:"] * 8]]
    for r in rows:
        sent = [f"{r['predicted_bytes'] / 1e6:.2f}", f"{r['sent'] / 1e6:.2f}"]
        times = [f"{r[name]:.0f}" for name in ("predicted_ms", "low_ms", "ms")]
        busy = [f"{r[name]:.0f}" for name in ("predicted_processor_ms", "processor_ms")]
        lines.append([r["network"], r["method"], *sent, *times, f"{r['error']:+.0%}", *busy])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(_):
    """Compares, or is one of the workers."""
    if FLAGS.worker_of:
        work()
        return
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for rate in FLAGS.networks:
        rows += run(rate)
        settings = {"workers": FLAGS.workers, "date": time.strftime("%Y-%m-%d")}
        out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(f"{FLAGS.workers} workers\n\n{table(rows)}")


if __name__ == "__main__":
    app.run(main)
