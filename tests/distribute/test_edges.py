"""Training at the edges: defaults that must converge, every float type, very large gradients."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import apply_gradients, assert_replicas_equal, build, compressing, plain
from tfqcomm import optimizers
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step.verification import fingerprint

SHAPE = (40, 30)


def regression(optimizer, steps, strategy):
    """Losses of a linear regression with noise, of heavy tails in some features."""
    rng = np.random.default_rng(0)
    world = strategy.num_replicas_in_sync
    x = rng.normal(size=[steps, world, 16, SHAPE[0]]) * rng.lognormal(0, 1, size=SHAPE[0])
    truth = rng.normal(size=SHAPE)
    y = x @ truth + 0.1 * rng.normal(size=[steps, world, 16, SHAPE[1]])
    optimizer, (weights,) = build(strategy, optimizer, [SHAPE])

    def replica_step(x, y):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(x[rank] @ weights.value - y[rank])) / world
        optimizer.apply(tape.gradient(loss, [weights.value]), [weights])

    @tf.function
    def run(x, y):
        losses = tf.TensorArray(tf.float32, steps)
        for step in tf.range(steps):
            error = tf.reduce_mean(tf.square(x[step] @ weights.value - y[step]))
            losses = losses.write(step, error)
            strategy.run(replica_step, args=(x[step], y[step]))
        return losses.stack()

    losses = run(tf.constant(x, tf.float32), tf.constant(y, tf.float32)).numpy()
    assert_replicas_equal(strategy, [weights])
    return losses


@pytest.fixture(scope="module")
def dense_losses():
    return regression(lambda: keras.optimizers.SGD(0.1), 250, plain(2))


@pytest.mark.parametrize("compressor", ["qsgd", pytest.param("ternary", marks=pytest.mark.slow)])
def test_the_defaults_of_codecs_that_round_at_random_train_like_dense(compressor, dense_losses):
    """Error feedback made the loss of "qsgd" go from 3 to 1e17, and "ternary" learn nothing."""
    losses = regression(lambda: keras.optimizers.SGD(0.1), 250, compressing(2, compressor))
    assert np.isfinite(losses).all()
    assert losses[-20:].mean() <= 0.05 * losses[0] + 2 * dense_losses[-20:].mean()


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ["qsgd", "ternary"])
def test_error_feedback_that_is_asked_for_converges_with_them_too(compressor):
    strategy = compressing(2, compressor, error_feedback=True)
    losses = regression(lambda: keras.optimizers.SGD(0.05), 250, strategy)
    assert losses[-20:].mean() <= 0.2 * losses[0]


def test_papers_optimizers_keep_feedback_for_their_own_codecs():
    for optimizer, feedback in [
        (optimizers.CompAMS(), True),
        (optimizers.CompAMS(compressor="ternary"), False),
        (optimizers.CompAMS(compressor="ternary", error_feedback=True), True),
        (optimizers.QAdam(), True),
        (optimizers.QAdam(compressor="qsgd"), False),
        (optimizers.AdaptiveTopKSGD(), True),
        (optimizers.QCMDAdagrad(), False),
        (optimizers.QRDAAdagrad(), False),
    ]:
        assert optimizer.options.feedback == feedback, optimizer
        config = optimizer.get_config()
        assert config["error_feedback"] == optimizer.options.error_feedback
        assert type(optimizer).from_config(config).options == optimizer.options


@pytest.mark.parametrize("compressor", [None, "top_k"])
def test_a_gradient_that_all_replicas_share_counts_once_as_in_tensorflow(compressor):
    """Computed outside of `strategy.run` it is one tensor for all: this was an IndexError."""
    gradient = tf.one_hot(5, SHAPE[0])[:, None] * tf.one_hot(3, SHAPE[1])  # no more than is kept

    def weights_after_a_step(strategy):
        optimizer, (weights,) = build(strategy, lambda: keras.optimizers.SGD(1.0), [SHAPE])
        step = functools.partial(strategy.run, lambda: optimizer.apply([gradient], [weights]))
        tf.function(step, autograph=False)()
        return weights.numpy()

    np.testing.assert_array_equal(
        weights_after_a_step(compressing(2, compressor)), weights_after_a_step(plain(2))
    )


@pytest.mark.parametrize("compressor", [None, "identity"])
def test_float64_models_lose_nothing(compressor):
    """Gradients were rounded to float32 even where nothing compressed them."""
    strategy = compressing(2, compressor)
    with strategy.scope():
        weights = keras.Variable(np.ones(3), dtype="float64")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([weights])
    gradients = tf.constant([[1 / 3, 1e-12, 1e100], [1 / 7, 1e-13, 1e101]], tf.float64)

    def replica_step():
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([gradients[rank] / 2], [weights])

    tf.function(lambda: strategy.run(replica_step))()
    np.testing.assert_allclose(weights.numpy(), 1 - gradients.numpy().mean(axis=0), rtol=1e-15)
    assert ledger_of(optimizer).routes[0].codec == "float64"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mean_beyond_the_type_of_its_variable_saturates(dtype):
    """The mean of float16 gradients is float32: as float16 again it was infinite."""
    strategy = compressing(2, None)
    with strategy.scope():
        weights = keras.Variable(np.zeros(2), dtype=dtype)
        optimizer = keras.optimizers.SGD(2.0**-10)
        optimizer.build([weights])
    gradient = tf.cast([6e4, 1.0], dtype)
    step = functools.partial(strategy.run, lambda: optimizer.apply([gradient * 1], [weights]))
    tf.function(step, autograph=False)()
    expected = -(65504 if dtype == "float16" else 120000) / 2**10
    assert float(weights.numpy()[0]) == pytest.approx(expected, rel=2**-7)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_half_precision_all_reduce_of_large_gradients_keeps_weights_finite(world):
    """Float16 with gradients of 60,000: every message was finite, and the weights NaN."""
    strategy = compressing(world, "float16")
    optimizer, (weights,) = build(strategy, lambda: keras.optimizers.SGD(1e-5), [(2, 2)])
    gradients = np.zeros([8, world, 2, 2], np.float32)
    gradients[0] = 60_000 * world
    before = weights.numpy().copy()
    apply_gradients(strategy, optimizer, [weights], [gradients])
    assert_replicas_equal(strategy, [weights])
    np.testing.assert_allclose(before - weights.numpy(), 0.6 * world, rtol=1e-2)


@pytest.mark.parametrize("name", ["CompAMS", "QAdam", "QCMDAdagrad", "QRDAAdagrad"])
def test_a_square_beyond_the_range_does_not_make_a_second_moment_infinite(name):
    """1e25 squared is infinite in float32: the sum of squares stayed so, and its entry froze."""
    make = functools.partial(getattr(optimizers, name), 0.1, min_size=0, compressor="identity")
    optimizer, (weights,) = build(plain(1), make, [(2, 2)])
    gradients = np.ones([4, 1, 2, 2], np.float32)
    gradients[0, 0, 0] = 1e25, -3e38
    before = weights.numpy().copy()
    (history,) = apply_gradients(plain(1), optimizer, [weights], [gradients])
    assert np.isfinite(history).all()
    first = history[0] - (0 if "qrda" in optimizer.name else before)
    assert (np.abs(first[0]) > 0.01).all()  # and that step was one, of about the usual size
    assert (np.abs(first) < 5).all()
    state = ledger_of(optimizer).worker_state.mean()
    for value in [*state.values(), *(v.numpy() for v in optimizer.variables)]:
        assert np.isfinite(np.asarray(value, np.float64)).all()


def test_fingerprints_see_what_float32_would_not():
    ones = np.ones(3)
    other = ones + np.array([0, 1e-12, 0])
    assert fingerprint([tf.constant(ones)]) != fingerprint([tf.constant(other)])
    assert fingerprint([tf.constant(ones)]) == fingerprint([tf.constant(ones)])
    assert fingerprint([tf.constant(ones, tf.bfloat16)]).shape == [1]


def test_one_input_pipeline_for_each_replica():
    """Of several pipelines the first alone was asked for a batch, and `fit` ended in IndexError."""
    strategy = compressing(2, "identity")
    options = tf.distribute.InputOptions(
        experimental_fetch_to_device=False,
        experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
    )

    def pipeline(context):
        x = tf.fill([6, 3], float(context.input_pipeline_id))
        return tf.data.Dataset.from_tensor_slices((x, tf.ones([6, 1]))).batch(2)

    with strategy.scope():
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    data = strategy.distribute_datasets_from_function(pipeline, options)
    model.fit(data, epochs=2, verbose=0)
    assert model.optimizer.iterations.numpy() == 6
