"""Which tensor travels how, and that everything together is still one mean, one count, one flag."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.rungs import slow_unless
from tfqcomm.compressors import BlockSign, Ternary, TopK
from tfqcomm.state.ledger import Ledger, ledger_for, ledger_of
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.transport.local import LocalTransport

STEP = tf.constant(0)
COMPRESSORS = [
    *("top_k", "block_sign", "float16", "random_k", "power_sgd", None),
    Ternary(shared_scale=True),
]


class SpyTransport(LocalTransport):
    """Counts what would be a collective between processes."""

    def __init__(self, world):
        super().__init__([f"CPU:{i}" for i in range(world)])
        self.calls = []

    def gather_processes(self, stacked):
        self.calls.append("gather")
        return super().gather_processes(stacked)

    def reduce_processes(self, value):
        self.calls.append("reduce")
        return super().reduce_processes(value)

    def exchange_processes(self, rows):
        self.calls.append("exchange")
        return super().exchange_processes(rows)


def exchange_of_replicas(world, compressor, **options):
    return GradientExchange(ExchangeOptions(compressor, **options), Ledger(SpyTransport(world)))


def message(key, shape, world, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    values = [tf.constant(rng.normal(size=shape), tf.float32) for _ in range(world)]
    return Message(key, values, **kwargs)


def rows(key, indices, shape=(10, 3)):
    """The gradient of an embedding on each replica, given the rows it looked up."""
    rng = np.random.default_rng(0)
    return Message(
        key,
        [
            tf.IndexedSlices(
                tf.constant(rng.normal(size=[len(i), shape[1]]), tf.float32),
                tf.constant(i, tf.int64),
                tf.constant(shape),
            )
            for i in indices
        ],
    )


def dense(value):
    return tf.convert_to_tensor(value).numpy()


def mean_of(message):
    return np.mean([dense(value) for value in message.values], axis=0)


def routes(exchange):
    return {route.path: (route.schedule, route.codec) for route in exchange.ledger.routes}


def mixed_messages(world):
    return [
        message("kernel", (40, 30), world),
        message("small", (20, 10), world),
        message("bias", (3000,), world),
        rows("embedding", [[1, 2, 2]] * world),
        message("statistics", (50, 50), world, compressible=False),
        message("scalar", (), world),
    ]


FLOAT32 = ("dense", "float32")
SIGNS = ("two_phase", "BlockSign(block=None)")


@pytest.mark.parametrize(
    ("min_size", "compressed"),
    [
        (0, {"kernel", "small", "bias", "scalar"}),
        (200, {"kernel", "small"}),
        (201, {"kernel"}),
        (1024, {"kernel"}),
        (1201, set()),
    ],
)
def test_routes_by_size_and_rank(min_size, compressed):
    exchange = exchange_of_replicas(3, "block_sign", min_size=min_size)
    messages = mixed_messages(3)
    reduction = exchange.reduce(messages, STEP)
    found = routes(exchange)
    assert found.pop("embedding") == ("all_gather", "rows as they are")
    assert found == {key: SIGNS if key in compressed else FLOAT32 for key in found}
    for sent, mean in zip(messages, reduction.means, strict=True):
        assert mean.shape == sent.shape
        if sent.key not in compressed:
            np.testing.assert_allclose(dense(mean), mean_of(sent), atol=1e-6)


def test_without_compression_everything_is_dense():
    exchange = exchange_of_replicas(2, None, min_size=0)
    messages = mixed_messages(2)
    reduction = exchange.reduce(messages, STEP)
    assert set(routes(exchange).values()) == {FLOAT32, ("all_gather", "rows as they are")}
    assert reduction.healthy
    for sent, mean in zip(messages, reduction.means, strict=True):
        np.testing.assert_allclose(dense(mean), mean_of(sent), atol=1e-6)


def test_what_would_send_more_than_float32_travels_dense():
    exchange = exchange_of_replicas(4, TopK(0.5), min_size=0)
    sent = message("kernel", (40, 30), 4)
    (mean,) = exchange.reduce([sent], STEP).means
    assert routes(exchange)["kernel"][0] == "dense"
    assert "float32 (less than TopK(ratio=0.5" in routes(exchange)["kernel"][1]
    np.testing.assert_allclose(mean, mean_of(sent), atol=1e-6)
    assert exchange.ledger.residuals.total() == {}


def test_granularity_model_compresses_one_vector():
    """Top-k then keeps nothing of a tensor whose entries are all small."""
    small, large = message("small", (30, 40), 1), message("large", (40, 30), 1, seed=1)
    large = Message("large", [1e3 * large.values[0]])
    exchange = exchange_of_replicas(1, TopK(0.1), granularity="model")
    means = exchange.reduce([small, large], STEP).means
    joined = np.concatenate([dense(small.values[0]).ravel(), dense(large.values[0]).ravel()])
    expected = TopK(0.1).decode(TopK(0.1).encode(joined), 2400)
    np.testing.assert_array_equal(np.concatenate([dense(m).ravel() for m in means]), expected)
    assert not dense(means[0]).any()
    by_tensor = exchange_of_replicas(1, TopK(0.1)).reduce([small, large], STEP).means
    assert np.count_nonzero(by_tensor[0]) == np.count_nonzero(by_tensor[1]) == 120


def test_one_optimizer_on_two_models_keeps_their_residuals_apart():
    """Also where the residual is one vector for a whole model, and models are of one size."""
    for granularity in ("tensor", "model"):
        exchange = exchange_of_replicas(1, TopK(0.1), granularity=granularity)
        exchange.reduce([message("a", (40, 30), 1)], STEP).commit()
        reduction = exchange.reduce([message("b", (40, 30), 1, seed=1)], STEP)
        fresh = exchange_of_replicas(1, TopK(0.1))
        expected = fresh.reduce([message("b", (40, 30), 1, seed=1)], STEP)
        np.testing.assert_array_equal(reduction.means[0], expected.means[0])
        assert len(exchange.ledger.residuals.total()) == 2


@pytest.mark.parametrize(
    "indices",
    [
        [[1, 2], [3, 4], [5, 6]],
        [[1], [1, 1, 9], []],
        [[0, 0, 0], [9, 0, 9], [0]],
        [[], [], []],
    ],
)
def test_rows_of_embeddings_add_up_to_the_dense_mean(indices):
    exchange = exchange_of_replicas(3, "top_k", min_size=0)
    sent = rows("embedding", indices)
    reduction = exchange.reduce([sent], STEP)
    assert isinstance(reduction.means[0], tf.IndexedSlices)
    assert reduction.healthy
    np.testing.assert_allclose(dense(reduction.means[0]), mean_of(sent), atol=1e-6)
    reduction.record()
    row = 3 * 4 + 8  # values and an int64 index
    padded = row * max(map(len, indices)) + 2 * 4  # all are as long as the longest; two lengths
    assert exchange.ledger.meter.read().bytes_sent == 2 * padded + 4 * 1 * 4 // 3


@pytest.mark.parametrize(
    ("schedule", "collectives"),
    [("all_gather", ["gather"]), ("two_phase", ["exchange", "gather"])],
)
@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_collectives_do_not_grow_with_the_layers(schedule, collectives, granularity):
    options = {"schedule": schedule, "granularity": granularity}
    for layers in (1, 5):
        exchange = exchange_of_replicas(2, "block_sign", min_size=64, **options)
        kernels = [message(f"kernel{i}", (8, 8 + i), 2) for i in range(layers)]
        biases = [message(f"bias{i}", (8,), 2) for i in range(layers)]
        exchange.reduce(kernels + biases, STEP)
        assert exchange.transport.calls == [*collectives, "reduce"]


def test_a_shared_scale_takes_three_collectives_however_many_layers():
    """Scales, levels, and what is not compressed."""
    for layers in (1, 5):
        exchange = exchange_of_replicas(2, Ternary(shared_scale=True), min_size=64)
        kernels = [message(f"kernel{i}", (8, 8 + i), 2) for i in range(layers)]
        biases = [message(f"bias{i}", (8,), 2) for i in range(layers)]
        exchange.reduce(kernels + biases, STEP)
        assert exchange.transport.calls == ["gather", "reduce", "reduce"]
        codec = "Ternary(clip=2.5, shared_scale=True)"
        assert routes(exchange)["kernel0"] == ("integer", codec)
        assert str(exchange.ledger.routes[0]) == f"kernel0 [8, 8]: {codec}, integer"


def test_meter_counts_the_formulas():
    """W = 3 workers: 1200 entries compressed, 3000 + 10 not, and a health word."""
    sent = [message("kernel", (40, 30), 3), message("bias", (3010,), 3)]
    gradient_norm = np.sqrt(sum(np.square(dense(m.values[0])).sum() for m in sent))
    dense_group = 2 * 2 * 4 * 3010 // 3
    for compressor, schedule, compressed in [
        (TopK(0.01), "all_gather", 2 * 4 * (1 + 3 + 1 + 12)),
        (BlockSign(), "all_gather", 2 * 4 * (1 + 1 + 38)),
        (BlockSign(), "two_phase", 2 * 2 * 4 * (1 + 1 + 13)),  # chunks of 400
        (Ternary(shared_scale=True), "auto", 2 * 4 + 2 * 2 * 4 * (1 + 122) // 3),  # ten of 1216
    ]:
        exchange = exchange_of_replicas(3, compressor, schedule=schedule)
        exchange.ledger.meter.watch()
        for step in (1, 2):
            exchange.reduce(sent, STEP).record()
            traffic = exchange.ledger.meter.read()
            assert (traffic.steps, traffic.skipped_steps) == (step, 0)
            assert traffic.bytes_sent == step * (compressed + dense_group)
            assert traffic.dense_bytes == step * (2 * 2 * 4 * 4210 // 3)
            assert traffic.gradient_norm == pytest.approx(gradient_norm, rel=1e-6)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("bad", slow_unless(np.isnan, [np.nan, np.inf, -np.inf]), ids=str)
def test_one_bad_number_on_one_replica_changes_nothing(compressor, bad):
    exchange = exchange_of_replicas(3, compressor)
    good = [message("kernel", (40, 30), 3), message("bias", (5,), 3), rows("rows", [[1], [2], []])]
    reduction = exchange.reduce(good, STEP)
    assert reduction.healthy
    reduction.commit()
    owed = exchange.ledger.residuals.total()
    for replica, key in [(1, "kernel"), (2, "bias"), (0, "rows")]:
        messages = [poisoned(m, replica, bad) if m.key == key else m for m in good]
        reduction = exchange.reduce(messages, STEP)
        assert not reduction.healthy
        reduction.record()
    np.testing.assert_equal(exchange.ledger.residuals.total(), owed)
    assert exchange.ledger.meter.read().skipped_steps == 3


def poisoned(message, replica, bad):
    """The same message with one bad number on one replica."""
    values = list(message.values)
    value = values[replica]
    array = message.floats(replica).numpy()
    array.flat[0] = bad
    if message.sparse:
        values[replica] = tf.IndexedSlices(tf.constant(array), value.indices, value.dense_shape)
    else:
        values[replica] = tf.constant(array)
    return Message(message.key, values)


def test_nothing_changes_before_commit():
    exchange = exchange_of_replicas(2, "top_k")
    reduction = exchange.reduce([message("kernel", (40, 30), 2)], STEP)
    assert not exchange.ledger.residuals.total()["kernel"].any()
    reduction.commit()
    assert exchange.ledger.residuals.total()["kernel"].any()


def test_without_error_feedback_there_are_no_residuals():
    exchange = exchange_of_replicas(2, "top_k", error_feedback=False)
    exchange.reduce([message("kernel", (40, 30), 2)], STEP).commit()
    assert exchange.ledger.residuals.total() == {}


def test_every_optimizer_has_its_own_exchange():
    first, second = (keras.optimizers.Adam(name="twin") for _ in range(2))
    transport = LocalTransport()
    assert ledger_of(first) is None
    ledger = ledger_for(first, transport)
    assert ledger_for(first, transport) is ledger
    assert ledger_of(first) is ledger
    assert ledger_for(second, transport) is not ledger
