"""Blockwise 8 bit against its definition."""

import numpy as np
import pytest

from tfqcomm.compressors import BlockInt8
from tfqcomm.kernels.numerics import FUSE_FROM


def decoded(codec, x):
    x = np.asarray(x, np.float32)
    return codec.decode(codec.encode(x), len(x)).numpy()


def reference(x, block):
    """Values s round(127 x / s) / 127 with s = max|x| of the block; and s."""
    values, scales = np.zeros(len(x)), np.zeros(len(x))
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        scales[part] = abs(x[part]).max()
        values[part] = np.round(x[part] / np.maximum(scales[part], 1e-30) * 127)
    return values * scales / 127, scales


@pytest.mark.parametrize("block", [None, 1, 3, 100, 256, 10**6])
@pytest.mark.parametrize("n", [1, 33, 1000, 10_001])
def test_equals_the_definition(n, block):
    x = np.random.default_rng(n).normal(size=n).astype(np.float32)
    expected, scales = reference(x, block or n)
    y = decoded(BlockInt8(block=block), x)
    # Rounding in float32 may decide an entry in the middle between two levels otherwise.
    assert np.mean(abs(y - expected) > 1e-6 * scales) <= 1e-3
    assert (abs(y - x) <= scales / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("block", [None, 256, 1000])
def test_error_is_at_most_half_a_step_where_kernels_are_fused(block):
    x = np.random.default_rng(0).standard_cauchy(size=FUSE_FROM + 77).astype(np.float32)
    _, scales = reference(x, block or len(x))
    assert (abs(decoded(BlockInt8(block=block), x) - x) <= scales / 254 * (1 + 1e-5)).all()


def test_the_largest_entry_of_every_block_is_exact():
    x = np.random.default_rng(0).normal(size=2560).astype(np.float32)
    largest = abs(x.reshape(-1, 256)).argmax(axis=1) + 256 * np.arange(10)
    np.testing.assert_array_equal(decoded(BlockInt8(), x)[largest], x[largest])


def test_a_large_entry_coarsens_its_block_only():
    x = np.random.default_rng(0).normal(size=1024).astype(np.float32)
    x[300] = 1e6
    outside = np.r_[0:256, 512:1024]
    y, whole = decoded(BlockInt8(), x), decoded(BlockInt8(block=None), x)
    assert abs(y - x)[outside].max() < 0.02
    assert not whole[outside].any()


def test_one_zero_block_among_others_and_one_bad_entry():
    x = np.concatenate([np.ones(40), np.zeros(40), -np.ones(20)]).astype(np.float32)
    codec = BlockInt8(block=40)
    np.testing.assert_array_equal(decoded(codec, x), x)
    x[5] = np.nan
    y = decoded(codec, x)
    assert np.isnan(y[:40]).all()
    np.testing.assert_array_equal(y[40:], x[40:])


@pytest.mark.parametrize("block", [0, -1, 2.0, True, "8"])
def test_block_errors(block):
    with pytest.raises(ValueError, match="Argument `block` must be None or a positive integer"):
        BlockInt8(block=block)
    with pytest.raises(TypeError):
        BlockInt8(256)
