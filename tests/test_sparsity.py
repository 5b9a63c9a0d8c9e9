"""Exact zeros: how they are counted, exported and shown."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm import sparsity
from tfqcomm.callbacks import SparsityLogger
from tfqcomm.optimizers import QCMDAdagrad


@pytest.mark.parametrize(
    ("nonzeros", "size", "expected"),
    [
        (0, 0, 0),
        (0, 100, 0),
        (1, 1, 4),  # dense: neither a position nor a bitmap is needed
        (1, 1024, 6),  # 32 + 10 bits
        (100, 1024, 525),  # 3200 + 1000 bits: positions
        (200, 1024, 928),  # 6400 + 1024 bits: the bitmap is shorter than 2000
        (1024, 1024, 4096),  # dense
    ],
)
def test_bytes_by_hand(nonzeros, size, expected):
    assert sparsity.sparse_bytes(nonzeros, size) == expected


@pytest.mark.parametrize(("nonzeros", "bits"), [(0, 0), (100, 4500), (7000, 231_840)])
def test_bits_by_hand(nonzeros, bits):
    """Of 7840: 13 bits for a position, since 2^12 < 7840 <= 2^13."""
    assert sparsity.sparse_bits(nonzeros, 7840) == bits


def model_with_zeros():
    model = keras.Sequential([keras.Input([30]), keras.layers.Dense(20), keras.layers.Dense(1)])
    kernel = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    kernel[np.abs(kernel) < 1] = 0
    model.layers[0].kernel.assign(kernel)
    return model


def test_exported_weights_are_the_model_to_the_bit():
    model = model_with_zeros()
    exported = sparsity.export_sparse(model)
    assert list(exported) == [w.path for w in model.weights]
    for weight in model.weights:
        sparse = exported[weight.path]
        np.testing.assert_array_equal(tf.sparse.to_dense(sparse.tensor), weight.numpy())
        assert sparse.zeros == pytest.approx((weight.numpy() == 0).mean())
        assert sparse.num_bytes <= 4 * weight.numpy().size
    kernel, bias = list(exported.values())[:2]
    assert kernel.num_bytes < 0.5 * 4 * 600
    assert bias.num_bytes == 0  # all zero


def test_zero_share_of_nothing():
    assert sparsity.zero_share([]) == 0


def test_logger_sees_weights_become_zero():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([30]), keras.layers.Dense(20), keras.layers.Dense(1)])
    model.compile(QCMDAdagrad(0.1, l1=0.05, compressor="identity"), loss="mse")
    x = np.random.default_rng(0).normal(size=(64, 30)).astype("float32")
    logger = SparsityLogger()
    history = model.fit(x, x[:, :1], epochs=6, verbose=0, callbacks=[logger]).history
    shares = [record["zero_share"] for record in logger.history]
    assert [record["epoch"] for record in logger.history] == [*range(6)]
    assert history["zero_share"] == shares
    kernels = [layer.kernel.numpy() for layer in model.layers]
    assert shares[-1] == sum((k == 0).sum() for k in kernels) / 620 > 0.2
    assert logger.history[-1]["sparse_bytes"] < 4 * 620
    assert set(logger.history[-1]["by_weight"]) == {layer.kernel.path for layer in model.layers}


def test_vectors_must_be_a_bool():
    with pytest.raises(ValueError, match="`vectors` must be a bool. Received: vectors='all'"):
        SparsityLogger(vectors="all")
