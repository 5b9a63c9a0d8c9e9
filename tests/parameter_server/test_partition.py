"""Every row lives on one server, and the servers have about the same to hold."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.partition import partition

partitioners = tf.distribute.experimental.partitioners
SHAPES = [(3000, 500), (500,), (500, 300), (300,), (), (300, 10), (10,)]


def loads(pieces, servers):
    return [sum(p.size for p in pieces if p.server == server) for server in range(servers)]


def test_small_variables_stay_whole_and_are_spread_by_size():
    pieces = partition(SHAPES[1:], 2)
    assert [p.shape for p in pieces] == SHAPES[1:]
    # The largest alone outweighs the rest.
    assert sorted(loads(pieces, 2)) == [500 + 300 + 1 + 3000 + 10, 150_000]


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_pieces_make_up_the_variables(servers):
    pieces = partition(SHAPES, servers, partitioners.FixedShardsPartitioner(4))
    for i, shape in enumerate(SHAPES):
        value = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
        parts = [p.cut(value) for p in pieces if p.variable == i]
        assert [p.shape for p in pieces if p.variable == i] == [part.shape for part in parts]
        np.testing.assert_array_equal(np.concatenate(parts) if shape else parts[0], value)
    assert len({p.name for p in pieces}) == len(pieces)


@pytest.mark.parametrize("servers", [2, 3])
def test_large_variables_are_split_by_default(servers):
    pieces = partition([(6000, 1000), (100, 100)], servers)
    assert len([p for p in pieces if p.variable == 0]) == servers
    assert max(loads(pieces, servers)) < 1.1 * 6_010_000 / servers


def test_only_rows_are_split():
    with pytest.raises(ValueError, match=r"`variable_partitioner` must split the first axis only"):
        partition([(4, 4)], 2, lambda shape, dtype: [1, 2])


def test_what_must_be_whole_is_not_split_by_default():
    """Rows of a kernel were given to Lamb one server's at a time: the norms were those of parts."""
    pieces = partition([(6000, 1000), (6000, 1000)], 2, whole={0: "its norm counts"})
    assert [p.shape for p in pieces if p.variable == 0] == [(6000, 1000)]
    assert len([p for p in pieces if p.variable == 1]) == 2
