"""No large tensor of a compressed step leaves a GPU: asked of TensorFlow's register of kernels.

What does so today is listed, and may only become less: a codec that is mended is struck from the
list, or its test fails.
"""

import keras
import pytest
import tensorflow as tf

from tests.catalogue import SCHEDULES
from tests.gpu_readiness import HOST_MEMORY, NO_KERNEL, violations
from tests.replicas import compressing, plain
from tfqcomm import compressors
from tfqcomm.kernels import numerics

# Adaptive codecs learn only in the step how much they send: their shapes are not static.
STATIC = sorted({name for name, _ in SCHEDULES if not compressors.get(name).adaptive})
BY_DEFAULT = ("block_sign", "float16", "top_k")

KNOWN: dict[str, set[str]] = {  # what leaves the GPU, and in whose steps
    # Top-k's selection, keys, digits and positions: how many candidates there are depends on the
    # data, so XLA cannot compile it.
    "AddV2(int32): host memory": {"top_k"},
    "ConcatV2(int32): host memory": {"top_k"},
    "EnsureShape(int32): host memory": {"top_k"},
    "Equal(bool, int32): host memory": {"top_k"},
    "FloorDiv(int32): host memory": {"top_k"},
    "FloorMod(int32): host memory": {"top_k"},
    "Greater(bool, int32): host memory": {"top_k"},
    "GreaterEqual(bool, int32): host memory": {"top_k"},
    "LessEqual(bool, int32): host memory": {"top_k"},
    "Max(int32): host memory": {"top_k"},
    "Max(uint32): no kernel": {"top_k"},
    "Mul(int32): host memory": {"top_k"},
    "Pad(int32): host memory": {"top_k"},
    "PartitionedCall(float32, int32): host memory": {"top_k"},
    "PartitionedCall(int32): host memory": {"top_k"},
    "RaggedBincount(int32): no kernel": {"top_k"},
    "Range(int32): host memory": {"top_k"},
    "Reshape(int32): host memory": {"top_k"},
    "Shape(int32): host memory": {"top_k"},
    "Size(int32): host memory": {"top_k"},
    "StridedSlice(int32): host memory": {"top_k"},
    "Sub(int32): host memory": {"top_k"},
    "Sum(int32): host memory": {"top_k"},
    "Unpack(int32): host memory": {"top_k"},
}


def graph_of_step(strategy: tf.distribute.Strategy) -> tf.Graph:
    """That of a training step with two large tensors, of 262,144 and 196,608 elements.

    Nothing is run. Kernels are chosen as on a GPU, where all that can be compiled is.
    """
    keras.backend.clear_session(free_memory=False)
    with strategy.scope():
        layers = [keras.layers.Dense(512, activation="relu"), keras.layers.Dense(384)]
        model = keras.Sequential([keras.Input([512]), *layers])
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y)) / 2
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    @tf.function
    def step(x, y):
        strategy.run(replica_step, args=(x, y))

    return step.get_concrete_function(tf.ones([8, 512]), tf.ones([8, 384])).graph


def known_of(compressor: str) -> set[str]:
    return {violation for violation, names in KNOWN.items() if compressor in names}


@pytest.mark.parametrize(
    "compressor",
    [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in STATIC],
)
def test_large_tensors_stay_on_the_gpu(compressor, monkeypatch):
    """In every schedule; but for what is known."""
    monkeypatch.setattr(numerics, "on_gpu", lambda tensor: True)
    found = {}
    for name, schedule in SCHEDULES:
        if name == compressor:
            strategy = compressing(2, compressor, schedule=schedule)
            for violation in violations(graph_of_step(strategy)):
                found.setdefault(violation, []).append(schedule)
    new = {violation: found[violation] for violation in found.keys() - known_of(compressor)}
    assert not new, "large tensors leave the GPU in these schedules"
    assert not known_of(compressor) - found.keys(), "mended: strike these from KNOWN"


def test_only_compressors_are_known():
    assert set().union(*KNOWN.values()) <= set(STATIC)


def test_plain_training_stays_on_the_gpu():
    assert violations(graph_of_step(plain(2))) == set()


def violations_in(function, *args) -> set[str]:
    return violations(tf.function(function).get_concrete_function(*args).graph)


INTEGERS, FLOATS = tf.ones([2000], tf.int32), tf.ones([2000])


@pytest.mark.parametrize(
    ("function", "argument", "expected"),
    [
        (lambda x: x + 1, FLOATS, set()),
        (lambda x: x + 1, INTEGERS[:1024], set()),
        (lambda x: x + 1, INTEGERS, {f"AddV2(int32): {HOST_MEMORY}"}),
        (lambda x: tf.bitwise.invert(x), INTEGERS, set()),
        (lambda x: x < 1, INTEGERS, {f"Less(bool, int32): {HOST_MEMORY}"}),
        (lambda x: tf.concat([x, x], 0), INTEGERS, {f"ConcatV2(int32): {HOST_MEMORY}"}),
        (lambda x: tf.pad(tf.cast(x, tf.uint16), [[0, 1]]), FLOATS, {f"Pad(uint16): {NO_KERNEL}"}),
        # A function that is inlined is walked, and has no border.
        (tf.function(lambda x: tf.bitwise.invert(x)), INTEGERS, set()),
        (tf.function(lambda x: x * 2), INTEGERS, {f"Mul(int32): {HOST_MEMORY}"}),
        # One that XLA compiles is not, but for its border.
        (
            tf.function(lambda x: tf.cast(tf.cast(x, tf.int32) + 1, tf.float32), jit_compile=True),
            FLOATS,
            set(),
        ),
        (
            tf.function(lambda x: x + 1, jit_compile=True),
            INTEGERS,
            {f"PartitionedCall(int32): {HOST_MEMORY}"},
        ),
        # Branches are walked, and have one.
        (
            lambda x: tf.cond(x[0] > 0, lambda: x - 1.0, lambda: x),
            FLOATS,
            set(),
        ),
        (
            lambda x: tf.cond(x[0] > 0, lambda: x * 2, lambda: tf.bitwise.invert(x)),
            INTEGERS,
            {
                f"StridedSlice(int32): {HOST_MEMORY}",
                f"StatelessIf(int32): {HOST_MEMORY}",
                f"Mul(int32): {HOST_MEMORY}",
            },
        ),
    ],
)
def test_the_register_is_read_as_a_gpu_would(function, argument, expected):
    found = violations_in(function, argument)
    assert {violation for violation in found if "Identity" not in violation} == expected


def test_lengths_that_are_not_known_may_be_large():
    unknown = tf.TensorSpec([None], tf.int32)
    assert f"AddV2(int32): {HOST_MEMORY}" in violations_in(lambda x: x + 1, unknown)
