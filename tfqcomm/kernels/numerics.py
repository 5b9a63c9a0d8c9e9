"""Guarded numerics: where zero, overflow, denormals or NaN need thought, and when to fuse."""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import tensorflow as tf

FUSE_FROM = 1 << 20  # elements; below, compiling costs more than a training run wins back
_ROW = 128  # float32 addends of one partial sum; the partial sums are added in float64
_LANES = 32
_SMALLEST_NORMAL = 2.0**-126
_in_kernel = contextvars.ContextVar("in_kernel", default=False)


def fuse(function: Callable, n: int, *static: Hashable, fuse_from: int = FUSE_FROM) -> Callable:
    """`function` as one XLA kernel if it works on `fuse_from` elements or more.

    Several passes over a large tensor become one. Small tensors run the same ops one by one. On a
    GPU all are compiled: there TensorFlow computes with int32 in the host's memory.

    Args:
        function: Module-level function of `static`, then tensors and plain values; static shapes
            only.
        n: Elements of the largest tensor it touches.
        *static: Its first arguments: codecs, layouts.
        fuse_from: As many are worth a compile.

    Returns:
        A function of the other arguments.
    """

    def fused(*args):
        if n >= fuse_from or any(on_gpu(x) for x in args if isinstance(x, tf.Tensor)):
            return _compiled(function, static)(*args)
        return function(*static, *args)

    return fused


def fuse_on_gpu(function: Callable, n: int, *static: Hashable) -> Callable:
    """Like `fuse` for what is quicker op by op on a CPU: only on GPUs it is compiled."""

    def fused(*args):
        if any(on_gpu(x) for x in args if isinstance(x, tf.Tensor)):
            return _compiled(function, static)(*args)
        return function(*static, *args)

    return fused


def compiling() -> bool:
    """Whether the body of a kernel is being traced, in which XLA must know all shapes."""
    return _in_kernel.get()


def on_gpu(tensor: tf.Tensor) -> bool:
    """Whether a tensor is computed on a GPU, as far as that is known when a graph is traced."""
    return "GPU" in (tensor.device or "")


def op_by_op(function: Callable, n: int, *static: Hashable) -> Callable:
    """Like `fuse` for what XLA cannot compile: the same function, as it is."""
    return functools.partial(function, *static)


@functools.cache
def _compiled(function, static):
    def body(*args):
        token = _in_kernel.set(True)
        try:
            return function(*static, *args)
        finally:
            _in_kernel.reset(token)

    return tf.function(body, jit_compile=True, autograph=False)


def magnitude_keys(x: tf.Tensor) -> tf.Tensor:
    """Integers that order float32 values by magnitude.

    The bits of |x| read as an integer grow with |x|. Unlike a comparison of floats this tells
    denormals from zero whatever the host's flush mode is, and it puts infinities and then NaN
    on top, so that whoever keeps the largest entries keeps those visible.

    Args:
        x: float32 tensor.

    Returns:
        int32 tensor, non-negative; 0 for both zeros.
    """
    return tf.bitwise.bitwise_and(tf.bitcast(x, tf.int32), 0x7FFFFFFF)


def is_finite(x: tf.Tensor) -> tf.Tensor:
    """True where float32 `x` is neither NaN nor infinite."""
    return magnitude_keys(x) < 0x7F800000


def finite(x: tf.Tensor) -> tf.Tensor:
    """Bool scalar: neither NaN nor infinity stands in a float32 vector. To be fused."""
    return max_key(x[None])[0] < 0x7F800000 if x.shape[0] else tf.constant(True)


def all_finite(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Bool scalar: neither NaN nor infinity stands in tensors of any float type."""
    flags = [tf.reduce_all(tf.math.is_finite(x)) for x in tensors]
    return tf.reduce_all(flags) if flags else tf.constant(True)


def is_negative(x: tf.Tensor) -> tf.Tensor:
    """The sign bit of float32 `x`: also of -0.0 and of denormals that the host would flush."""
    return tf.bitcast(x, tf.int32) < 0


def max_magnitude(x: tf.Tensor) -> tf.Tensor:
    """The largest |x| over the last axis; NaN counts as larger than everything.

    Args:
        x: float32[rows, n], n > 0

    Returns:
        float32[rows]
    """
    return tf.bitcast(max_key(x), tf.float32)


def max_key(x: tf.Tensor) -> tf.Tensor:
    """The largest of `magnitude_keys` over the last axis: float32[rows, n] -> int32[rows]."""
    rows, n = x.shape
    keys = magnitude_keys(x)
    if n < _ROW:
        return tf.reduce_max(keys, axis=-1)
    # First lane by lane: XLA vectorizes that, and a maximum of neighbours takes it three times as
    # long. Zeros are the smallest keys.
    keys = tf.pad(keys, [[0, 0], [0, -n % _ROW]]) if n % _ROW else keys
    lanes = tf.reduce_max(tf.reshape(keys, [-1, _ROW // _LANES, _LANES]), axis=1)
    # Types alternate, or XLA would make one reduction of two, a slow one.
    partial = tf.bitcast(tf.reduce_max(tf.bitcast(lanes, tf.uint32), axis=-1), tf.int32)
    return partial if n <= _ROW else tf.reduce_max(tf.reshape(partial, [rows, -1]), axis=-1)


def sums(x: tf.Tensor) -> tf.Tensor:
    """Sums over the last axis: runs of 128 in float32, and those in float64.

    Args:
        x: float32[rows, n], n > 0, with 128 max|x| in the range of float32.

    Returns:
        float64[rows]
    """
    rows, n = x.shape
    width = min(n, _ROW)
    x = tf.pad(x, [[0, 0], [0, -n % width]]) if n % width else x
    # A product with ones: XLA vectorizes it, but not a sum (it may not reorder additions).
    partial = tf.linalg.matvec(tf.reshape(x, [-1, width]), tf.ones([width]))
    return tf.reduce_sum(tf.cast(tf.reshape(partial, [rows, -1]), tf.float64), axis=-1)


def magnitude_sums(x: tf.Tensor) -> tf.Tensor:
    """Sums of |x| over the last axis, also where they are beyond float32.

    Scaling by 2^-7 keeps runs of 128 float32 in range; it loses |x| < 1.6e-36 only.

    Args:
        x: float32[rows, n], n > 0

    Returns:
        float64[rows]
    """
    return sums(tf.abs(x) / _ROW) * _ROW


def norm(x: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Euclidean norm over the last axis; of finite `x` at most the largest float32.

    Args:
        x: float32[rows, n], n > 0
        largest: `max_magnitude(x)`, float32[rows]

    Returns:
        float32[rows]
    """
    return norm_of(largest, sums(tf.square(relative(x, largest[:, None]))))


def norm_of(largest: tf.Tensor, squares: tf.Tensor) -> tf.Tensor:
    """Euclidean norms, given the largest magnitudes and the sums of squares relative to them."""
    norms = tf.cast(tf.cast(largest, tf.float64) * tf.sqrt(squares), tf.float32)
    return tf.where(is_finite(largest) & ~is_finite(norms), tf.float32.max, norms)


def global_norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Euclidean norm of all numbers there are, float32 and at most its largest.

    Squares of float32 leave its range above 1.8e19 and below 1e-23; only then a slower way in
    float64 is taken. Of tensors with NaN or infinities it is one of these.
    """
    tensors = [x if x.dtype == tf.float64 else tf.cast(x, tf.float32) for x in tensors]
    plain = tf.cast(tf.linalg.global_norm([tf.cast(x, tf.float32) for x in tensors]), tf.float32)

    def exact():
        squares = [tf.reduce_sum(tf.square(tf.cast(x, tf.float64))) for x in tensors]
        norm = tf.sqrt(tf.add_n(squares))
        largest = float(tf.float32.max)
        norm = tf.where(tf.math.is_finite(norm), tf.minimum(norm, largest), norm)
        return tf.cast(norm, tf.float32)

    return tf.cond(is_finite(plain) & (plain > 1e-15), lambda: plain, exact)


def squarable(x: tf.Tensor) -> tf.Tensor:
    """`x`, limited to magnitudes whose squares are finite: 1.8e19 in float32.

    A sum of squares that was infinite once would stay so, and nothing divided by its root would
    move again.
    """
    limit = math.sqrt(float(x.dtype.max)) * (1 - 2.0**-10)
    return tf.clip_by_value(x, -limit, limit)


def add_square(total: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Total + x^2, at most the largest number of its type, for a `squarable` x."""
    return tf.minimum(total + x * x, total.dtype.max)


def largest_summand(dtype: tf.DType, addends: int) -> float:
    """What each of so many numbers may be at most, so that their sum in `dtype` is finite.

    In whatever order they are added. Each of so many roundings makes a number larger by the unit
    roundoff at most; and sums of a power of two are exact, so that, rounding being monotonic, those
    of smaller numbers do not exceed them.
    """
    share = float(dtype.max) / addends
    if addends == 1:
        return share
    roundoff = 2.0 ** -{tf.float16: 11, tf.bfloat16: 8, tf.float32: 24}[dtype]
    return max(share * (1 - addends * roundoff), 2.0 ** math.floor(math.log2(share)))


def relative(x: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """X / scale, and zero where `scale` is zero or denormal.

    Args:
        x: float32 tensor.
        scale: float32 tensor, non-negative, that broadcasts to `x`.
    """
    return x / tf.where(scale < _SMALLEST_NORMAL, math.inf, scale)


def saturating_product(x: tf.Tensor, factor: float | np.ndarray) -> tf.Tensor:
    """`factor` times float32 `x`, beyond the range its largest value; NaN and inf stay."""
    largest = float(tf.float32.max)
    return tf.where(is_finite(x), tf.clip_by_value(x * factor, -largest, largest), x)


def saturating_cast(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Rounds to nearest even, beyond the range to its largest value; NaN and inf stay.

    Args:
        x: float32 tensor.
        dtype: A narrower float.
    """
    limit = float(dtype.max)
    return tf.cast(tf.where(is_finite(x), tf.clip_by_value(x, -limit, limit), x), dtype)
