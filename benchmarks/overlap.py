"""How much of DiLoCo's exchange is hidden behind the steps that follow it.

    python -m benchmarks.overlap
    python -m benchmarks.overlap --networks=50mbit --overlaps=0,4,12

Real worker processes, each behind a network interface of its own, and worker i on core i, modulo
the number of cores, as in `benchmarks.network`, whose perceptron and flags these are. Each trains
with DiLoCo, which exchanges every `--every` steps and merges what comes of it `overlap` steps
later. With overlap 0 the step that exchanges waits for all of it: what a round takes beyond as many
steps without an exchange is the exchange's own time.

    round       median of the times of `--every` steps in a row, of the slowest worker
    exchange    round - every * median step, with overlap 0
    hidden      of that, what the round takes less with an overlap
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

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

DENSE = "dense"
ROUNDS = 6  # that are timed, after one in which TensorFlow traces the step

FLAGS = flags.FLAGS
flags.FLAGS.set_default("methods", [DENSE, "block_int8"])
flags.FLAGS.set_default("networks", ["100mbit"])
flags.FLAGS.set_default("units", ["784", "1024", "1024", "10"])
flags.FLAGS.set_default("out", "runs/overlap.json")
flags.DEFINE_integer("every", 16, "Steps between two exchanges.", lower_bound=2)
flags.DEFINE_list("overlaps", "0,8,15", "Steps between sending and merging; 0 is needed.")
flags.DEFINE_integer("overlap_of", 0, "That of this worker, not for users.")


def work(method: str) -> None:
    """One worker: times its steps."""
    task = workers.begin()
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model = network.compiled(
            functools.partial(
                tfqcomm.optimizers.DiLoCo,
                every=FLAGS.every,
                compressor=None if method == DENSE else method,
                overlap=FLAGS.overlap_of,
            )
        )
    x, y = workers.noise(model, network.BATCH * strategy.num_replicas_in_sync)
    dataset = tf.data.Dataset.from_tensors((x, y)).repeat()
    watch = workers.Stopwatch()
    fit = functools.partial(model.fit, dataset, callbacks=[watch], verbose=0, shuffle=False)
    fit(steps_per_epoch=FLAGS.every + FLAGS.overlap_of)  # from here on a round ends in a merge
    fit(steps_per_epoch=ROUNDS * FLAGS.every)
    steps = 1e3 * watch.seconds().reshape([ROUNDS, FLAGS.every])
    found = {"round_ms": float(np.median(steps.sum(axis=1))), "step_ms": float(np.median(steps))}
    found["parameters"] = model.count_params()
    workers.write(FLAGS.results, task, found)


def run(rate: str, method: str, overlap: int) -> dict:
    """Starts the workers of one method on one network; returns what the slowest found."""
    command = [sys.executable, "-m", "tfqcomm.launch", f"--workers={FLAGS.workers}"]
    command += [f"--bandwidth={rate}", "-m", "benchmarks.overlap", *sys.argv[1:]]
    command += [f"--worker_of={method}", f"--overlap_of={overlap}"]
    found = workers.found_by(command)
    slowest = max(found, key=lambda worker: worker["round_ms"])
    return {"network": rate, "method": method, "overlap": overlap, **slowest}


def with_hidden(rows: list[dict]) -> list[dict]:
    """Adds what follows from the rows of one method, of which the first has no overlap."""
    first = rows[0]
    exchange = first["round_ms"] - FLAGS.every * first["step_ms"]
    return [
        {**row, "exchange_ms": exchange, "hidden_ms": first["round_ms"] - row["round_ms"]}
        for row in rows
    ]


def table(rows: list[dict]) -> str:
    """In Markdown."""
    header = ["network", "method", "overlap", "step, ms", "round, ms", "exchange, ms", "hidden, ms"]
    lines = [header, ["---", "---", *["---:"] * 5]]
    for r in rows:
        cells = [r["network"], r["method"], str(r["overlap"]), f"{r['step_ms']:.1f}"]
        lines.append([*cells, *(f"{r[n]:.0f}" for n in ("round_ms", "exchange_ms", "hidden_ms"))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(_) -> None:
    if FLAGS.worker_of:
        work(FLAGS.worker_of)
        return
    overlaps = sorted(map(int, FLAGS.overlaps))
    if overlaps[0] != 0 or overlaps[-1] >= FLAGS.every:
        raise app.UsageError(
            f"--overlaps must be from 0, which is needed, to below --every={FLAGS.every}. "
            f"Received: {FLAGS.overlaps}"
        )
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for rate in FLAGS.networks:
        for method in FLAGS.methods:
            rows += with_hidden([run(rate, method, overlap) for overlap in overlaps])
            settings = {"every": FLAGS.every, "workers": FLAGS.workers}
            settings |= {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
            out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(f"{FLAGS.workers} workers, {rows[0]['parameters']:,} parameters\n\n{table(rows)}")


if __name__ == "__main__":
    app.run(main)
