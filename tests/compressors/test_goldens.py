"""Payloads as literals: a word that changes breaks every mixed cluster, so it must fail here.

The words are written in hexadecimal, as bits. Those of `SMALL` can be checked by hand.
"""

import numpy as np
import pytest

from tests.catalogue import COMPRESSORS
from tfqcomm.compressors import (
    BFloat16,
    BlockSign,
    Float16,
    Identity,
    RandomK,
    TopK,
)

SMALL = np.float32([0.5, -1.5, 0.0, -0.0, 3.0, -70000.0, 1e-3])
# Three blocks of 65536: two entries in each of the first two, one in the last.
BLOCKS = np.zeros(131073, np.float32)
BLOCKS[[1, 65535, 65536, 131071, 131072]] = 1, -2, 3, -4, 5

# Adds up to 14 without rounding, whatever the order of additions.
EVEN = np.float32([0.5, -1.5, 0.0, -0.0, 3.0, -9.0, 0.0])

SMALL_SEED = 0x1_23456789  # low word first

GOLDENS = [  # compressor, input, seed, payload
    (Identity(), SMALL, 0, "3f000000 bfc00000 00000000 80000000 40400000 c788b800 3a83126f"),
    # First of a pair in the low half; -70000 saturates; the odd one is padded with zero.
    (Float16(), SMALL, 0, "be003800 80000000 fbff4200 00001419"),
    (BFloat16(), SMALL, 0, "bfc03f00 80000000 c7894040 00003a83"),
    # Positions 4 and 5, then their values.
    (TopK(0.3), SMALL, 0, "00050004 40400000 c788b800"),
    # Positions 1, 4, 5 and values, each with a half of padding.
    (TopK(0.4, value_dtype="bfloat16"), SMALL, 0, "00040001 00000005 4040bfc0 0000c789"),
    # Counts of the blocks; offsets 1, 65535, 0, 65535, 0; values.
    (
        TopK(5 / 131073),
        BLOCKS,
        0,
        "00000002 00000002 00000001 ffff0001 ffff0000 00000000 "
        "3f800000 c0000000 40400000 c0800000 40a00000",
    ),
    (
        TopK(5 / 131073, value_dtype="bfloat16"),
        BLOCKS,
        0,
        "00000002 00000002 00000001 ffff0001 ffff0000 00000000 c0003f80 c0804040 000040a0",
    ),
    # The seed, then positions 6, 0, 3 (or 2), 5 as the seed draws them.
    (RandomK(0.5), SMALL, SMALL_SEED, "23456789 00000001 3a83126f 3f000000 80000000 c788b800"),
    # Mean magnitude 2; signs 0101010 from the top bit on.
    (BlockSign(), EVEN, 0, "40000000 54000000"),
    # Means of the first four, 1/2, and of the other three, 4.
    (BlockSign(block=4), EVEN, 0, "3f000000 40800000 54000000"),
]


def words_of(hexadecimal: str) -> np.ndarray:
    return np.array([int(word, 16) for word in hexadecimal.split()], np.uint32).view(np.int32)


@pytest.mark.parametrize(
    ("codec", "x", "seed", "payload"), GOLDENS, ids=lambda value: str(value)[:40]
)
def test_payload(codec, x, seed, payload):
    np.testing.assert_array_equal(codec.encode(x, seed), words_of(payload))


def test_decoded_payloads():
    def decode(index):
        codec, x, _, payload = GOLDENS[index]
        return codec.decode(words_of(payload), len(x)).numpy()

    np.testing.assert_array_equal(decode(0), SMALL)
    half = [0.5, -1.5, 0, 0, 3, -65504, np.float16(1e-3)]
    np.testing.assert_array_equal(decode(1), np.float32(half))
    np.testing.assert_array_equal(decode(3), [0, 0, 0, 0, 3, -70000, 0])
    np.testing.assert_array_equal(decode(5), BLOCKS)
    np.testing.assert_array_equal(decode(8), [2, -2, 2, -2, 2, -2, 2])
    np.testing.assert_array_equal(decode(9), [0.5, -0.5, 0.5, -0.5, 4, -4, 4])


def test_every_compressor_has_a_golden():
    assert {type(case.compressor) for case in COMPRESSORS} == {type(row[0]) for row in GOLDENS}
