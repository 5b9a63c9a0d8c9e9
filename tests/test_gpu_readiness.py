"""No large tensor of a compressed step leaves a GPU: asked of TensorFlow's register of kernels."""

import keras
import pytest
import tensorflow as tf

from tests.catalogue import SCHEDULES
from tests.gpu_readiness import HOST_MEMORY, NO_KERNEL, NOT_COMPILED, violations
from tests.replicas import compressing, plain
from tfqcomm import compressors
from tfqcomm.kernels import numerics

CODECS = sorted({name for name, _ in SCHEDULES})
BY_DEFAULT = ("block_sign", "float16", "top_k")


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


@pytest.mark.parametrize(
    "compressor",
    [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in CODECS],
)
def test_large_tensors_stay_on_the_gpu(compressor, monkeypatch):
    """In every schedule."""
    monkeypatch.setattr(numerics, "on_gpu", lambda tensor: True)
    found = {}
    for name, schedule in SCHEDULES:
        if name == compressor:
            strategy = compressing(2, compressor, schedule=schedule)
            for violation in violations(graph_of_step(strategy)):
                found.setdefault(violation, []).append(schedule)
    assert not found, "large tensors leave the GPU in these schedules"


@pytest.mark.slow
def test_one_support_for_all_stays_on_the_gpu(monkeypatch):
    monkeypatch.setattr(numerics, "on_gpu", lambda tensor: True)
    strategy = compressing(2, compressors.TopK(value_dtype="bfloat16", support="shared"))
    assert violations(graph_of_step(strategy)) == set()


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
        (
            tf.function(
                lambda x: tf.math.segment_max(x, tf.zeros([2000], tf.int32)), jit_compile=True
            ),
            FLOATS,
            {f"SegmentMax: {NOT_COMPILED}"},
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
