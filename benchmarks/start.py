"""How long training takes to start: the first step of ResNet50, beside a later one.

    python -m benchmarks.start
    python -m benchmarks.start --methods=stock,identity,block_sign,top_k,power_sgd

`keras.applications.ResNet50` on images of 64 x 64, `MirroredStrategy` on two logical devices; each
method in a process of its own, one after the other. "stock" is plain `MirroredStrategy`. Ratios to
"identity" are of one run; times of different machines do not compare.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import json
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from tfqcomm.distribute import CompressedAllReduce

FLAGS = flags.FLAGS
flags.DEFINE_list("methods", ["stock", "identity", "block_sign", "top_k"], "Compressors.")
flags.DEFINE_float("bucket_mb", 32.0, "Size of a bucket.")
flags.DEFINE_integer("steps", 6, "Timed steps after the first.", lower_bound=1)
flags.DEFINE_string("one", "", "Measure this method in this process, and print JSON.")


def measure(method: str) -> dict[str, float]:
    """Seconds of the first step, and of the shortest later one."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    ops = None if method == "stock" else CompressedAllReduce(method, bucket_mb=FLAGS.bucket_mb)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=ops)
    with strategy.scope():
        model = keras.applications.ResNet50(weights=None, input_shape=[64, 64, 3], classes=10)
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    x, y = np.zeros([8, 64, 64, 3], np.float32), np.zeros([8], np.int64)
    data = tf.data.Dataset.from_tensors((x, y)).repeat().prefetch(1)
    times = []
    for _ in range(1 + FLAGS.steps):
        start = time.perf_counter()
        model.fit(data, steps_per_epoch=1, verbose=0)
        times.append(time.perf_counter() - start)
    return {"first": times[0], "later": min(times[1:])}


def main(_) -> None:
    if FLAGS.one:
        print(json.dumps(measure(FLAGS.one)))
        return
    found = {}
    for method in FLAGS.methods:
        command = [sys.executable, "-m", "benchmarks.start", f"--one={method}"]
        command += [f"--steps={FLAGS.steps}", f"--bucket_mb={FLAGS.bucket_mb}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[method] = json.loads(output.splitlines()[-1])
    basis = found.get("identity") or found[FLAGS.methods[0]]
    print("| method | first step, s | ratio | later step, s | ratio |\n|---|---:|---:|---:|---:|")
    for method, times in found.items():
        first, later = (times[name] / basis[name] for name in ("first", "later"))
        cells = [method, f"{times['first']:.1f}", f"{first:.2f}"]
        cells += [f"{times['later']:.2f}", f"{later:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    app.run(main)
