"""Where a worker keeps its slots: the vector, and the variables that hold it."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.messages.layout import MemoryLayout
from tfqcomm.parameter_server.partition import ALONE_FROM, Piece


def piece(variable, size):
    return Piece(variable, 0, size, (size,), server=0)


SHORT, LONG, ALSO_SHORT = piece(0, 5), piece(1, ALONE_FROM), piece(2, 7)
FIRST = {
    (SHORT, "m"): 0.0,
    (LONG, "m"): 1.0,
    (LONG, "residual"): 2.0,
    (ALSO_SHORT, "m"): 3.0,
}


def test_long_slots_have_variables_of_their_own():
    layout = MemoryLayout(FIRST)
    sizes = [part.size for part in layout.divide(layout.initial)]
    assert sizes == [5 + 7, ALONE_FROM, ALONE_FROM]
    for key, value in FIRST.items():
        np.testing.assert_array_equal(layout.initial[layout.slots[key]], value)


def test_slots_come_back_as_they_were_kept():
    layout = MemoryLayout(FIRST)
    random = np.random.RandomState(0)
    state = {key: random.randn(key[0].size).astype("float32") for key in FIRST}
    parts = layout.join({key: tf.constant(value) for key, value in state.items()})
    vector = layout.whole([part.numpy() for part in parts])
    for key, value in state.items():
        np.testing.assert_array_equal(layout.slot(parts, key), value)
        np.testing.assert_array_equal(vector[layout.slots[key]], value)
    assert layout.slot(parts, (SHORT, "residual")) is None
    for mine, part in zip(layout.divide(vector), parts, strict=True):
        np.testing.assert_array_equal(mine, part)


@pytest.mark.parametrize("keys", [[], [(SHORT, "m")], [(LONG, "m")]], ids=["none", "short", "long"])
def test_of_one_kind_or_none(keys):
    layout = MemoryLayout(dict.fromkeys(keys, 0.0))
    assert len(layout.divide(layout.initial)) == len(keys)
    assert layout.whole(layout.divide(layout.initial)).shape == layout.initial.shape
