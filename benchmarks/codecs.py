"""How fast every compressor is, in GB/s of float32 input, beside what its users had before.

    python -m benchmarks.codecs --elements=25000000

prints a markdown table. Speeds of different machines do not compare; the rows marked "NumPy" and
"TensorFlow" are run in the same process, so they do, and so does the column relative to `x + 1`.
"step" is all that a step does with a gradient beside sending: the message of error feedback, its
words, the new residual, and the mean of two payloads. The roofline is 16 bytes an element, read of
gradient and residual and written of residual and mean, at the speed of `x + 1`.
README.md has figures measured with it.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import app, flags

from tfqcomm import compressors
from tfqcomm.aggregators.error_feedback import decode_mean, encode_with_feedback
from tfqcomm.kernels.layout import Layout

FLAGS = flags.FLAGS
flags.DEFINE_integer("elements", 25_000_000, "Length of the vector.", lower_bound=1000)
flags.DEFINE_integer("repeats", 20, "Timed runs of each; the best one counts.", lower_bound=1)
flags.DEFINE_string("only", "", "Codecs whose name has this in it.")
flags.DEFINE_boolean("references", True, "Also time NumPy and TensorFlow doing it by hand.")

CODECS = {  # compressor -> encode + decode of peers, GB/s, two threads of another machine
    compressors.Identity(): "",
    compressors.Float16(): "Horovod 7.7, DDP hook 4.4",
    compressors.BFloat16(): "",
    compressors.BlockSign(): "BytePS 2.56",
    compressors.BlockSign(block=4096): "",
    compressors.TopK(0.01): "GRACE DGC 0.86, BytePS 0.43",
    compressors.TopK(0.01, value_dtype="bfloat16"): "",
    compressors.TopK(0.01, value_dtype="int8"): "",
    compressors.TopK(0.01, value_dtype="int4"): "",
    compressors.TopK(0.01, value_dtype="table2"): "",
    compressors.TopK(0.001): "",
    compressors.TopK(0.1): "",
    compressors.RandomK(0.01): "",
    compressors.Ternary(): "",
    compressors.QSGD(4): "",
    compressors.LogGrid(0): "",
    compressors.LogGrid(6): "",
    compressors.UniformGrid(8): "",
    compressors.UniformGrid(8, range="fixed"): "",
    compressors.ThresholdQuantizer("scaled"): "",
    compressors.ThresholdQuantizer("optimal"): "",
    compressors.BlockInt8(): "",
    compressors.Float8(): "",
    compressors.NaturalCompression(): "",
    compressors.TwoMeans(): "",
    compressors.PowerSGD(4): "GRACE 2.7, DDP hook 0.82, epfml 0.39",
}
SEED = tf.constant([1, 2])
HEADER = ("", "bits", "encode", "decode", "both", "/ (x + 1)", "step", "/ roofline", "peers: both")


def best_seconds(function: Callable, *args) -> float:
    """Seconds of the quickest run, after two that trace, compile and fill the allocator."""
    seconds = []
    for _ in range(FLAGS.repeats + 2):
        start = time.perf_counter()
        function(*args)
        tf.test.experimental.sync_devices()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def step_of(codec: compressors.Compressor, layout: Layout) -> Callable:
    """What a step does with a bucket beside sending: error feedback, the mean of two payloads."""

    @tf.function
    def step(gradient, residual, received):
        encoded = encode_with_feedback(codec, layout, gradient, residual, SEED)
        payloads = tf.stack([encoded.words, received])
        return encoded.left_out(), decode_mean(codec, layout, payloads)

    return step


def step_speed(codec: compressors.Compressor, x: tf.Tensor, residual: tf.Tensor) -> float:
    """GB/s of gradient."""
    layout = Layout((len(x),), codec.row(len(x)))
    gradient, residual = layout.pack([x]), layout.pack([residual])
    received = encode_with_feedback(codec, layout, residual, None, SEED).words
    step = step_of(codec, layout)
    return 4e-9 * len(x) / best_seconds(step, gradient, residual, received)


def numpy_sign(x: np.ndarray) -> None:
    """One bit an entry, really packed."""
    scale, octets = np.abs(x).mean(), np.packbits(x < 0)
    np.where(np.unpackbits(octets, count=len(x)).view(bool), -scale, scale)


def numpy_top_k(x: np.ndarray) -> None:
    """About 1%, by a threshold from a sample of 1%."""
    magnitudes = np.abs(x)
    sample = np.sort(magnitudes[::100])
    positions = np.flatnonzero(magnitudes >= sample[-len(sample) // 100])
    np.zeros_like(x)[positions] = x[positions]


@tf.function
def tensorflow_top_k(x: tf.Tensor) -> tf.Tensor:
    """Exactly 1%, by a sort."""
    positions = tf.math.top_k(tf.abs(x), len(x) // 100, sorted=False).indices
    return tf.scatter_nd(positions[:, None], tf.gather(x, positions), [len(x)])


def row(*cells) -> str:
    """A line of the table; numbers are GB/s."""
    return f"| {' | '.join(f'{c:.2f}' if isinstance(c, float) else str(c) for c in cells)} |"


def main(_):
    n = FLAGS.elements
    x = tf.random.stateless_normal([n], [1, 2])
    residual = tf.random.stateless_normal([n], [3, 4])

    def speed(function, *args):
        return 4e-9 * n / best_seconds(function, *args)

    yardstick = speed(tf.function(lambda x: x + 1), x)
    print(f"{n} elements; x + 1: {yardstick:.2f} GB/s\n")
    print(row(*HEADER))
    print(row(*["---"] * len(HEADER)), flush=True)
    for codec, peers in CODECS.items():
        if FLAGS.only not in str(codec):
            continue
        words = codec.encode(x)
        encode = speed(codec.encode, x)
        decode = speed(codec.decode, words, n)
        both = 1 / (1 / encode + 1 / decode)
        step = step_speed(codec, x, residual)
        share = 2 * step / yardstick  # 16 bytes an element in place of 8
        bits = 32 * codec.num_words(n) / n
        cells = (f"`{codec}`", bits, encode, decode, both, both / yardstick, step, share, peers)
        print(row(*cells), flush=True)
    if not FLAGS.references:
        return
    references = {"NumPy, 1 bit": numpy_sign, "NumPy, top 1% sampled": numpy_top_k}
    for name, function in references.items():
        both = speed(function, x.numpy())
        print(row(name, "", "", "", both, both / yardstick, "", "", ""), flush=True)
    both = speed(tensorflow_top_k, x)
    print(row("TensorFlow, top 1% exact", "", "", "", both, both / yardstick, "", "", ""))


if __name__ == "__main__":
    app.run(main)
