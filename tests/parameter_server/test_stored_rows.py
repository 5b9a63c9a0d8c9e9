"""Matrices whose rows live on several servers: here all of them are this process."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.parameter_server.embeddings import initial, stored
from tfqcomm.parameter_server.embeddings.shard import SavedRows

SHAPE = (23, 4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 5 rows of 4 entries."""
    monkeypatch.setattr(stored, "BLOCK_ELEMENTS", 20)


def made(initializer, servers, shape=SHAPE):
    initializer = keras.initializers.get(initializer)
    return initial.make(shape, initializer, ["CPU:0"] * servers, "float32")


@pytest.mark.parametrize(
    "initializer",
    [
        keras.initializers.RandomUniform(seed=1),
        keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(2)),
        keras.initializers.HeNormal(seed=-3),
        keras.initializers.Orthogonal(seed=4),
        keras.initializers.Constant(0.5),
        lambda shape, dtype: tf.reshape(tf.range(92, dtype=dtype), shape),
    ],
    ids=["uniform", "generator", "variance scaling", "orthogonal", "constant", "function"],
)
def test_initial_values_do_not_depend_on_the_number_of_servers(initializer):
    generator = getattr(initializer, "seed", None)
    tables = []
    for servers in (1, 2, 3, 40):
        if isinstance(generator, keras.random.SeedGenerator):
            generator.state.assign([2, 0])  # it gives other seeds each time
        tables.append(made(initializer, servers).numpy())
    for table in tables[1:]:
        np.testing.assert_array_equal(table, tables[0])


def test_blocks_are_drawn_apart_from_one_another():
    rows = made(keras.initializers.RandomUniform(seed=1), 2).numpy()
    assert len(np.unique(rows)) == rows.size
    assert len(np.unique(made(keras.initializers.RandomUniform(seed=2), 2).numpy()[0])) == 4
    other = made(keras.initializers.RandomUniform(seed=2), 2).numpy()
    assert (other != rows).all()


@pytest.mark.parametrize("name", ["glorot_uniform", "he_normal", "lecun_uniform"])
def test_variances_go_by_the_fans_of_the_whole_table(name):
    """The last block is smaller than the others, and its variance is the same."""
    shape = (4998, 4)  # 999 blocks of 5 rows and one of 3
    variance = {"glorot_uniform": 2 / sum(shape), "he_normal": 2 / 4998, "lecun_uniform": 1 / 4998}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "BLOCK_ELEMENTS", 4 * 2500)
        rows = made(name, 2, shape).numpy()
    for part in (rows[:2500], rows[2500:]):
        assert part.var() == pytest.approx(variance[name], rel=0.05)  # of 10,000 draws: 1.4%


def test_a_matrix_is_written_read_and_looked_up_block_by_block():
    matrix = np.arange(92, dtype="float32").reshape(SHAPE)
    table = made("zeros", 3)
    table.write(matrix)
    np.testing.assert_array_equal(table.numpy(), matrix)
    blocks = list(table.fetched())
    assert [start for start, _, _ in blocks] == [0, 5, 7, 10, 15, 20]
    assert max(len(block) for _, _, block in blocks) == 5
    ids = np.array([22, 0, 7, 6, 14, 15, 7])
    np.testing.assert_array_equal(table.lookup(tf.constant(ids)), matrix[ids])
    in_graph = tf.function(table.lookup)(tf.constant(ids[:0]))
    assert in_graph.shape == (0, 4)
    np.testing.assert_array_equal(tf.function(table.tensor)(), matrix)


def test_slices_are_written_by_some_servers_and_read_by_others(tmp_path):
    """Of two copies the mean is saved, and both get it."""
    matrix = np.arange(92, dtype="float32").reshape(SHAPE)
    prefixes = []
    for first, stop in ((0, 9), (9, 23)):
        own = matrix[first:stop]
        rows = SavedRows("m", first, 23, tf.Variable(np.concatenate([own - 1, own + 1])), 2)
        for start, end in rows.blocks():
            prefixes.append(str(tmp_path / f"{start:02d}"))
            tf.raw_ops.SaveV2(
                prefix=prefixes[-1],
                tensor_names=["m"],
                shape_and_slices=[rows.slice(start, end)],
                tensors=[rows.read(start, end)],
            )
    prefix = str(tmp_path / "all")
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=prefix)
    np.testing.assert_array_equal(tf.train.load_variable(prefix, "m"), matrix)
    for first, stop in ((0, 7), (7, 15), (15, 23)):
        empty = tf.Variable(tf.zeros([2 * (stop - first), 4]))
        rows = SavedRows("m", first, 23, empty, 2)
        for start, end in rows.blocks():
            (value,) = tf.raw_ops.RestoreV2(
                prefix=prefix,
                tensor_names=["m"],
                shape_and_slices=[rows.slice(start, end)],
                dtypes=[tf.float32],
            )
            rows.write(start, value)
        np.testing.assert_array_equal(empty, np.tile(matrix[first:stop], [2, 1]))
