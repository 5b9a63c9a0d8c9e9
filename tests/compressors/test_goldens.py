"""Payloads as literals: a word that changes breaks every mixed cluster, so it must fail here.

The words are written in hexadecimal, as bits. Those of `SMALL` can be checked by hand.
"""

import numpy as np
import pytest

from tests.catalogue import COMPRESSORS
from tfqcomm.compressors import (
    QSGD,
    AdaptiveTopK,
    BFloat16,
    BlockInt8,
    BlockSign,
    Float8,
    Float16,
    Identity,
    LogGrid,
    NaturalCompression,
    PowerSGD,
    RandomK,
    Ternary,
    ThresholdQuantizer,
    TopK,
    TwoMeans,
    UniformGrid,
)

SMALL = np.float32([0.5, -1.5, 0.0, -0.0, 3.0, -70000.0, 1e-3])
# Three blocks of 65536: two entries in each of the first two, one in the last.
BLOCKS = np.zeros(131073, np.float32)
BLOCKS[[1, 65535, 65536, 131071, 131072]] = 1, -2, 3, -4, 5

# Adds up to 14 without rounding, whatever the order of additions.
EVEN = np.float32([0.5, -1.5, 0.0, -0.0, 3.0, -9.0, 0.0])

# A matrix of rank one, [1 2 2]^T [3 4 -2], row by row. No column of zeros: a product of matrices
# gives 0.0 for it or -0.0, as the processor adds.
RANK_ONE = np.float32([3, 4, -2, 6, 8, -4, 6, 8, -4])

SMALL_SEED = 0x1_23456789  # low word first

GOLDENS = [  # compressor, input, seed, payload
    (Identity(), SMALL, 0, "3f000000 bfc00000 00000000 80000000 40400000 c788b800 3a83126f"),
    # First of a pair in the low half; -70000 saturates; the odd one is padded with zero.
    (Float16(), SMALL, 0, "be003800 80000000 fbff4200 00001419"),
    (BFloat16(), SMALL, 0, "bfc03f00 80000000 c7894040 00003a83"),
    # Positions 4 and 5: low bits 0 and 1, bits 2 and 3 of the bitmap; then their values.
    (TopK(0.3), SMALL, 0, "40000000 30000000 40400000 c788b800"),
    # Positions 1, 4, 5: low bits 101, bits 0, 3, 4; values with a half of padding.
    (TopK(0.4, value_dtype="bfloat16"), SMALL, 0, "a0000000 98000000 4040bfc0 0000c789"),
    # Positions 1, 4 * 2^14 - 1, 4 * 2^14, 8 * 2^14 - 1, 8 * 2^14: 14 low bits, all 0 or 1 but for
    # the first; bits 0, 4, 6, 10, 12; values.
    (
        TopK(5 / 131073),
        BLOCKS,
        0,
        "0007fff0 003fff00 00000000 8a280000 3f800000 c0000000 40400000 c0800000 40a00000",
    ),
    (
        TopK(5 / 131073, value_dtype="bfloat16"),
        BLOCKS,
        0,
        "0007fff0 003fff00 00000000 8a280000 c0003f80 c0804040 000040a0",
    ),
    # The seed, then positions 6, 0, 3 (or 2), 5 as the seed draws them.
    (RandomK(0.5), SMALL, SMALL_SEED, "23456789 00000001 3a83126f 3f000000 80000000 c788b800"),
    # Mean magnitude 2; signs 0101010 from the top bit on.
    (BlockSign(), EVEN, 0, "40000000 54000000"),
    # Means of the first four, 1/2, and of the other three, 4.
    (BlockSign(block=4), EVEN, 0, "3f000000 40800000 54000000"),
    # Scale 9. Then planes, highest first; -3 and -1 are 101 and 111, the levels of three bits.
    (LogGrid(0), EVEN, 0, "41100000 04000000 04000000"),  # 0 0 0 0 0 -1 0
    (LogGrid(1), EVEN, 0, "41100000 04000000 04000000 08000000"),  # 0 0 0 0 1 -2 0
    (UniformGrid(3), EVEN, 0, "41100000 04000000 00000000 0c000000"),  # 0 0 0 0 1 -3 0
    # No scale: 3 -3 0 0 3 -3 0.
    (UniformGrid(3, range="fixed"), EVEN, 0, "44000000 88000000 cc000000"),
    # Scale 4.5, that of -1.5, 3, -9; and 9, that of -9 alone.
    (ThresholdQuantizer(), EVEN, 0, "40900000 44000000 4c000000"),
    (ThresholdQuantizer("optimal"), EVEN, 0, "41100000 04000000 04000000"),
    # Scales 1.5 and 9; bytes 42, -127, 0, 0 and 42, -127, 0, the first one lowest.
    (BlockInt8(block=4), EVEN, 0, "3fc00000 41100000 0000812a 0000812a"),
    # Buckets of one entry leave nothing to chance: its magnitude is the norm, its level is +-3.
    (
        QSGD(3, bucket=1),
        EVEN,
        SMALL_SEED,
        "3f000000 3fc00000 00000000 00000000 40400000 41100000 00000000 44000000 88000000 cc000000",
    ),
    # The same with norms of four entries, 1.58 and 9.49, rounded as the seed draws.
    (QSGD(3, bucket=4), EVEN, SMALL_SEED, "3fca62c2 4117ca12 44000000 00000000 cc000000"),
    # Zeros and largest entries leave nothing to chance.
    (Ternary(clip=None), np.sign(EVEN), SMALL_SEED, "3f800000 44000000 cc000000"),
    # Clipped to one standard deviation, 3.49; and not at all.
    (Ternary(clip=1.0), EVEN, SMALL_SEED, "405fac59 44000000 4c000000"),
    (Ternary(clip=None), EVEN, SMALL_SEED, "41100000 44000000 44000000"),
    # As top-k, of the average number of entries.
    (AdaptiveTopK("2 entries/step"), SMALL, 0, "40000000 30000000 40400000 c788b800"),
    # Scales 1.5 and 9; 448 / 3 rounds to 144 = 1.125 * 2^7, or 57344 / 3 to 20480 = 1.25 * 2^14;
    # the byte of -0.0 is that of 0 with a sign, those of the largest are fe and fb.
    (Float8(block=4), EVEN, 0, "3fc00000 41100000 8000fe71 0000fe71"),
    (Float8("e5m2", block=4), EVEN, 0, "3fc00000 41100000 8000fb75 0000fb75"),
    # Signs, then exponents 126, 127, 0, 0, 128, 143, 117: those of 0.5, -1, 0, 0, 2, -65536, 2^-10.
    (NaturalCompression(), SMALL, SMALL_SEED, "54000000 00007f7e 00758f80"),
    # Means -7/2 (one of three is -0.0) and 7/8; those of the blocks, -3/4, -9, 1/4, 3/2.
    (TwoMeans(), EVEN, 0, "c0600000 3f600000 54000000"),
    (TwoMeans(block=4), EVEN, 0, "bf400000 c1100000 3e800000 3fc00000 54000000"),
    # Scale 8; -1/3, -2/3, -2/3, of length 1; -3 [3 4 -2] / 8, that is -9/8, -12/8, 6/8.
    (
        PowerSGD(1),
        RANK_ONE,
        SMALL_SEED,
        "41000000 beaaaaab bf2aaaab bf2aaaab bf900000 bfc00000 3f400000",
    ),
    # Two factors of four columns would be longer.
    (PowerSGD(4), EVEN, 0, "3f000000 bfc00000 00000000 80000000 40400000 c1100000 00000000"),
    # Positions 1, 4, 5 as above, scale 9, and bytes -21, 42, -127; or -1, 2, -7, larger by 8.
    (TopK(0.4, value_dtype="int8"), EVEN, 0, "a0000000 98000000 41100000 00812aeb"),
    (TopK(0.4, value_dtype="int4"), EVEN, 0, "a0000000 98000000 41100000 000001a7"),
    # Mean -5/2, deviation 4.95: -9 is in the second bin, -3/2 and 3 in the third.
    (
        TopK(0.4, value_dtype="table2"),
        EVEN,
        0,
        "a0000000 98000000 00000000 c1100000 3f400000 00000000 0000001a",
    ),
]


def words_of(hexadecimal: str) -> np.ndarray:
    return np.array([int(word, 16) for word in hexadecimal.split()], np.uint32).view(np.int32)


@pytest.mark.every
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
    np.testing.assert_array_equal(decode(10), [0, 0, 0, 0, 0, -9, 0])
    np.testing.assert_array_equal(decode(11), [0, 0, 0, 0, 4.5, -9, 0])
    np.testing.assert_array_equal(decode(12), [0, 0, 0, 0, 3, -9, 0])
    np.testing.assert_array_equal(decode(13), [0.5, -0.5, 0, 0, 0.5, -0.5, 0])
    np.testing.assert_array_equal(decode(14), [0, -4.5, 0, 0, 4.5, -4.5, 0])
    np.testing.assert_allclose(decode(16), np.float32([63, -190.5, 0, 0, 378, -1143, 0]) / 127)
    np.testing.assert_array_equal(decode(17), EVEN)
    np.testing.assert_array_equal(decode(19), np.sign(EVEN))
    scales = np.float32([1.5, 1.5, 1.5, 1.5, 9, 9, 9])
    thirds = np.float32([1, 0, 0, 0, 1, 0, 0])
    largest = np.float32([0, -1, 0, 0, 0, -1, 0])
    np.testing.assert_allclose(decode(23), scales * (thirds * 144 / 448 + largest), rtol=1e-6)
    np.testing.assert_allclose(decode(24), scales * (thirds * 20480 / 57344 + largest), rtol=1e-6)
    np.testing.assert_array_equal(decode(25), [0.5, -1, 0, 0, 2, -65536, 2.0**-10])
    np.testing.assert_array_equal(decode(26), [0.875, -3.5, 0.875, -3.5, 0.875, -3.5, 0.875])
    np.testing.assert_array_equal(decode(28), RANK_ONE)
    np.testing.assert_array_equal(decode(27), [0.25, -0.75, 0.25, -0.75, 1.5, -9, 1.5])
    levels = np.float32([-21, 42, -127]) / 127 * 9
    np.testing.assert_allclose(decode(30)[[1, 4, 5]], levels, rtol=1e-6)
    np.testing.assert_allclose(decode(31)[[1, 4, 5]], np.float32([-9 / 7, 18 / 7, -9]), rtol=1e-6)
    np.testing.assert_array_equal(decode(32), [0, 0.75, 0, 0, 0.75, -9, 0])


def test_every_compressor_has_a_golden():
    assert {type(case.compressor) for case in COMPRESSORS} == {type(row[0]) for row in GOLDENS}
