"""`CompressedAllReduce`: any Keras optimizer under MirroredStrategy, on logical devices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.replicas import (
    assert_replicas_equal,
    assert_weights_close,
    compressing,
    copies,
    plain,
    train,
)
from tests.rungs import slow_unless
from tfqcomm import compressors
from tfqcomm.callbacks import TrafficLogger
from tfqcomm.optimizers import CompAMS
from tfqcomm.state.ledger import ledger_of

CODECS = [
    compressors.Identity(),
    compressors.Float16(),
    compressors.BFloat16(),
    compressors.TopK(0.1),
    compressors.TopK(0.1, value_dtype="bfloat16"),
    compressors.RandomK(0.1),
    compressors.BlockSign(),
    compressors.BlockSign(block=32),
]
OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01),
    "AdamW": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}


def model_and_optimizer(strategy, optimizer, layers=None):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        dense = [keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input([8]), *dense] if layers is None else layers())
        optimizer = optimizer()
        optimizer.build(model.trainable_variables)
    return model, optimizer


def regression(steps, world, batch=4):
    """Inputs [steps, world, batch, 8] and targets [..., 3]."""
    x = np.random.default_rng(0).normal(size=[steps, world, batch, 8]).astype("float32")
    return [x, np.sin(x[..., :3])]


def mean_squared_error(index, model, x, y):
    return tf.reduce_mean(tf.square(model(x, training=True) - y))


def joined(data):
    """The batches of all replicas as one."""
    return [np.reshape(part, [len(part), 1, -1, *part.shape[3:]]) for part in data]


@pytest.mark.parametrize(
    ("compressor", "world"),
    slow_unless(
        lambda _, world: world == 3,
        [
            *((codec, world) for codec in CODECS for world in (2, 3)),
            *((codec, world) for codec in (CODECS[3], CODECS[6]) for world in (1, 4)),
        ],
    ),
    ids=str,
)
def test_replicas_are_identical_after_a_hundred_steps(compressor, world):
    strategy = compressing(world, compressor)
    model, optimizer = model_and_optimizer(strategy, OPTIMIZERS["Adam"])
    before = model.get_weights()
    train(strategy, [(model, optimizer)], mean_squared_error, regression(100, world))
    assert_replicas_equal(strategy, model.weights + optimizer.variables)
    assert optimizer.iterations.numpy() == 100
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_identity_is_plain_keras(optimizer):
    data = regression(30, 3)
    trained = []
    for strategy, batches in [(compressing(3, "identity"), data), (plain(), joined(data))]:
        pair = model_and_optimizer(strategy, OPTIMIZERS[optimizer])
        train(strategy, [pair], mean_squared_error, batches)
        trained.append(pair[0])
    assert_weights_close(*trained)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_embeddings_are_not_compressed_and_equal_plain_training(optimizer):
    """Rows that occur twice, on one replica or on several, add up."""

    def layers():
        return [
            keras.Input([4], dtype="int32"),
            keras.layers.Embedding(12, 3),
            keras.layers.GlobalAveragePooling1D(),
        ]

    rng = np.random.default_rng(0)
    data = [rng.integers(0, 6, [20, 2, 4, 4]), rng.normal(size=[20, 2, 4, 3]).astype("float32")]
    trained = []
    for strategy, batches in [(compressing(2, "block_sign"), data), (plain(), joined(data))]:
        pair = model_and_optimizer(strategy, OPTIMIZERS[optimizer], layers)
        train(strategy, [pair], mean_squared_error, batches)
        trained.append(pair[0])
    assert_weights_close(*trained)


def test_it_has_no_collectives_and_takes_their_options():
    """One process copies from device to device: NCCL's options have nothing to act on."""
    strategy = compressing(2, "block_sign")
    nccl = tf.distribute.experimental.CommunicationImplementation.NCCL
    options = tf.distribute.experimental.CommunicationOptions(implementation=nccl)

    def replica_step(value):
        context = tf.distribute.get_replica_context()
        return context.all_reduce("sum", value + 1, options=options)

    @tf.function
    def step(value):
        return strategy.experimental_local_results(strategy.run(replica_step, args=(value,)))

    concrete = step.get_concrete_function(tf.zeros([3]))
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    assert not [node.op for node in nodes if node.op.startswith(("Collective", "Nccl"))]
    np.testing.assert_array_equal(step(tf.zeros([3])), np.full([2, 3], 2))


def test_only_an_optimizers_gradients_are_compressed():
    """A user's own `all_reduce` and metrics would not survive losing all but a hundredth."""
    strategy = compressing(2, compressors.TopK(0.01))
    model, optimizer = model_and_optimizer(strategy, OPTIMIZERS["Adam"])
    with strategy.scope():
        metric = keras.metrics.Mean()
    values = np.random.default_rng(0).normal(size=[2, 64, 32]).astype("float32")
    x, y = (part[0] for part in regression(1, 2))

    def replica_step():
        context = tf.distribute.get_replica_context()
        rank = context.replica_id_in_sync_group
        with tf.GradientTape() as tape:
            loss = mean_squared_error(0, model, tf.gather(x, rank), tf.gather(y, rank)) / 2
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        metric.update_state(tf.gather(values, rank))
        with tf.name_scope(optimizer.name):  # not even under its name
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.gather(values, rank))

    for total in strategy.experimental_local_results(tf.function(strategy.run)(replica_step)):
        np.testing.assert_allclose(total, values.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(metric.result(), values.mean(), rtol=1e-4)
    traffic = ledger_of(optimizer).meter.read()
    assert (traffic.steps, traffic.dense_bytes) == (1, 4 * (8 * 16 + 16 + 16 * 3 + 3))
    assert {route.schedule for route in ledger_of(optimizer).routes} == {"all_gather"}


def test_our_optimizers_bring_their_own_compression():
    strategy = compressing(2, "top_k")
    model, optimizer = model_and_optimizer(
        strategy, lambda: CompAMS(compressor="block_sign", min_size=0)
    )
    train(strategy, [(model, optimizer)], mean_squared_error, regression(1, 2))
    codecs = {route.codec for route in ledger_of(optimizer).routes}
    assert codecs == {str(compressors.BlockSign())}


def test_other_strategies_are_left_alone():
    compressing(2, "top_k")  # connects itself to Keras
    strategy = plain(2)
    model, optimizer = model_and_optimizer(strategy, OPTIMIZERS["Adam"])
    train(strategy, [(model, optimizer)], mean_squared_error, regression(2, 2))
    assert ledger_of(optimizer) is None
    assert_replicas_equal(strategy, model.weights)


@pytest.mark.parametrize("verify", [True, False])
def test_replicas_that_differ_from_the_start_are_found(verify):
    strategy = compressing(2, "top_k", verify=verify)
    model, optimizer = model_and_optimizer(strategy, OPTIMIZERS["SGD"])
    bias = model.layers[0].bias
    strategy.experimental_local_results(bias.value)[1].assign(tf.fill([16], 1e-7))
    if not verify:
        train(strategy, [(model, optimizer)], mean_squared_error, regression(2, 2))
        first, second = copies(strategy, [bias])
        assert not np.array_equal(first, second)
        return
    with pytest.raises(tf.errors.InvalidArgumentError, match="weights differ after the first"):
        train(strategy, [(model, optimizer)], mean_squared_error, regression(2, 2))


def compiled(strategy, layers=None, **kwargs):
    model, optimizer = model_and_optimizer(strategy, OPTIMIZERS["Adam"], layers)
    with strategy.scope():
        model.compile(optimizer, loss="mse", **kwargs)
    return model


@pytest.mark.parametrize("rows", [32, 2])
def test_a_batch_that_does_not_split_trains(rows):
    """Keras wants the shapes of the first batch alone; a replica without rows sends zeros."""
    model = compiled(compressing(3, "top_k"))
    history = model.fit(np.ones([rows, 8], "float32"), np.ones([rows, 3], "float32"), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)


def test_traffic_logger_counts_by_hand():
    """W = 3. The kernels have 128 and 48 elements, the biases 16 and 3.

    Top-k keeps 13 of 128: 39 low bits and a bitmap of 28 for the positions, in 3 words, 13 words of
    values, 1 for the health: 17 words go to two others. The rest, 67 floats, go round the ring:
    4/3 of them are sent.
    """
    model = compiled(compressing(3, compressors.TopK(0.1), min_size=100))
    x = np.random.default_rng(0).normal(size=[48, 8]).astype("float32")
    x[40] = np.nan  # in the fourth batch of the second epoch only
    logger = TrafficLogger(verbose=0)
    y = np.zeros([48, 3], "float32")
    model.fit(x[:36], y[:36], batch_size=12, verbose=0, callbacks=[logger])
    model.fit(
        x, y, batch_size=12, verbose=0, callbacks=[logger], epochs=2, initial_epoch=1, shuffle=False
    )
    sent, dense = 2 * 4 * 17 + 4 * 4 * 67 // 3, 4 * 4 * 195 // 3
    expected = [
        {"epoch": 0, "steps": 3, "skipped_steps": 0, "bytes_sent": 3 * sent},
        {"epoch": 1, "steps": 4, "skipped_steps": 1, "bytes_sent": 4 * sent},
    ]
    for record, right in zip(logger.history, expected, strict=True):
        assert {key: record[key] for key in right} == right
        assert record["dense_bytes"] == record["steps"] * dense
        assert record["ratio"] == pytest.approx(dense / sent)
        assert set(record) == {*right, "dense_bytes", "ratio", "residual_norm_ratio"}
    assert logger.history[0]["residual_norm_ratio"] > 0
