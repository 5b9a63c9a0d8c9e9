"""PowerSGD's arguments, sizes and what it does to matrices; its exchange: test_low_rank_mean.py."""

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.replicas import assert_replicas_equal, compressing, plain
from tfqcomm import optimizers
from tfqcomm.compressors import PowerSGD
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions


@pytest.mark.parametrize("rank", [0, -1, 257, 2.0, True, "4", None])
def test_rank_errors(rank):
    expected = r"Argument `rank` must be an integer from 1 to 256. Received: rank="
    with pytest.raises(ValueError, match=expected):
        PowerSGD(rank)


@pytest.mark.parametrize("alternate", [0, None, "yes"])
def test_alternate_errors(alternate):
    with pytest.raises(ValueError, match="Argument `alternate` must be a bool. Received: altern"):
        PowerSGD(alternate=alternate)


@pytest.mark.parametrize("schedule", ["dense", "all_gather", "two_phase"])
def test_it_has_a_schedule_of_its_own(schedule):
    expected = f"`schedule` must be 'auto' for a compressor of low rank.*schedule='{schedule}'"
    with pytest.raises(ValueError, match=expected):
        ExchangeOptions("power_sgd", schedule=schedule)


def test_there_is_no_matrix_of_a_whole_model():
    expected = "`granularity` must be 'tensor' for a compressor of low rank.*granularity='model'"
    with pytest.raises(ValueError, match=expected):
        ExchangeOptions("power_sgd", granularity="model")


def test_error_feedback_is_the_default():
    assert ExchangeOptions("power_sgd").feedback
    assert not ExchangeOptions("power_sgd", error_feedback=False).feedback


@pytest.mark.parametrize(
    ("rank", "shape", "floats"),
    [
        (4, (3072, 1024), 4 * 4096),
        (1, (3, 3, 64, 128), 576 + 128),
        (4, (8, 8), 64),  # factors of 2 x 32: no smaller
        (3, (8, 8), 3 * 16),
        (4, (5, 20), 100),
        (4, (6, 20), 4 * 26),
        (4, (1000,), 1000),
        (4, (), 1),
        (4, (0, 7), 0),
    ],
)
def test_what_is_sent_for_a_shape(rank, shape, floats):
    codec, elements = PowerSGD(rank), int(np.prod(shape))
    reduced = floats < elements
    assert codec.reduces(shape) == reduced
    assert codec.num_floats(shape) == (floats if reduced else elements)
    alternate = PowerSGD(rank, alternate=True)
    assert alternate.num_floats(shape) == (floats if reduced else 2 * elements)


def test_matrices_of_low_rank_lose_nothing():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=[30, 3]) @ rng.normal(size=[3, 30])).astype(np.float32)
    codec = PowerSGD(3)
    decoded = codec.decode(codec.encode(matrix.ravel(), 5), 900)
    # M Q is rounded to float32, relative to M, and what of it is small counts as much.
    tolerance = 1e-5 * np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(decoded, matrix.ravel(), atol=float(tolerance))


def test_the_approximation_is_a_projection_and_no_better_than_the_best():
    x = np.random.default_rng(0).normal(size=900).astype(np.float32)
    decoded = PowerSGD(4).decode(PowerSGD(4).encode(x, 5), 900).numpy()
    error = np.square(x - decoded).sum()
    np.testing.assert_allclose(error + np.square(decoded).sum(), np.square(x).sum(), rtol=1e-5)
    singular = np.linalg.svd(x.reshape(30, 30), compute_uv=False)
    assert np.square(singular[4:]).sum() < error < (1 - 4 / 30) * np.square(x).sum()


# --------------------------------------------------------------------------------------- learning


def digits():
    """1,297 images for training and 500 others."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    return (x[:1297], y[:1297]), (x[1297:], y[1297:])


def trained(strategy, optimizer, epochs):
    """A model 64-64-32-10, and its accuracy on images it has not seen."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        layers = [keras.layers.Dense(n, activation="relu") for n in (64, 32)]
        model = keras.Sequential([keras.Input([64]), *layers, keras.layers.Dense(10)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss, metrics=["accuracy"])
    train, test = digits()
    model.fit(*train, batch_size=32, epochs=epochs, verbose=0)
    return model, model.evaluate(*test, batch_size=100, verbose=0)[1]


@pytest.mark.slow
def test_digits_are_learnt_as_without_compression():
    """Rank 2 of kernels of 64 x 64, 64 x 32 and 32 x 10, with momentum, as in the paper."""

    def sgd():
        return keras.optimizers.SGD(0.05, momentum=0.9)

    _, dense = trained(plain(2), sgd, epochs=12)
    assert dense > 0.95
    for codec, factor in [(PowerSGD(2), 5), (PowerSGD(2, alternate=True), 9)]:
        strategy = compressing(2, codec)
        model, accuracy = trained(strategy, sgd, epochs=12)
        assert accuracy > dense - 0.02, codec
        traffic = ledger_of(model.optimizer).meter.read()
        assert traffic.skipped_steps == 0
        assert traffic.dense_bytes / traffic.bytes_sent > factor
        assert_replicas_equal(strategy, model.weights + model.optimizer.variables)


@pytest.mark.slow
@pytest.mark.parametrize("alternate", [False, True])
def test_xla_compiles_it_without_a_strategy(alternate):
    codec = PowerSGD(2, alternate=alternate)
    weights = []
    for jit_compile in (True, False):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([24]), keras.layers.Dense(16)])
        model.compile(optimizers.CompAMS(compressor=codec), "mse", jit_compile=jit_compile)
        x = np.random.default_rng(0).normal(size=[64, 24]).astype("float32")
        model.fit(x, x[:, :16], batch_size=16, verbose=0)
        weights.append(model.get_weights())
        assert model.optimizer.iterations.numpy() == 4
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)
