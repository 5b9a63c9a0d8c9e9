"""Numbers at the ends of their range: a step is finite or skipped, and nothing is lost or stuck."""

import zlib

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.runs import local_transport
from tfqcomm.compressors import (
    QSGD,
    AdaptiveTopK,
    BFloat16,
    BlockSign,
    Float16,
    PowerSGD,
    RandomK,
    Ternary,
    TopK,
)
from tfqcomm.kernels import numerics
from tfqcomm.state.ledger import Ledger
from tfqcomm.step import ExchangeOptions, routing
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message

LARGEST = float(np.finfo(np.float32).max)
KINDS = {  # every aggregator, with error feedback
    "dense, half": (Float16(), {}),
    "dense, kept": (RandomK(0.5), {}),
    "all_gather": (TopK(0.5), {"schedule": "all_gather"}),
    "two_phase": (BlockSign(), {"schedule": "two_phase"}),
    "adaptive": ("adaptive_top_k", {}),
    "shared_support": (TopK(0.5, support="shared"), {}),
    "integer": (Ternary(shared_scale=True), {"error_feedback": True}),
    "low_rank, in full": (PowerSGD(), {}),
}


def exchange_of(world, compressor, **options):
    options = ExchangeOptions(compressor, min_size=0, **options)
    return GradientExchange(options, Ledger(local_transport(world)))


def reduce(exchange, *values, key="a", step=0):
    """One step of one tensor, committed if it is healthy."""
    message = Message(key, [tf.constant(v) for v in values])
    reduction = exchange.reduce([message], tf.constant(step))
    reduction.record()
    if reduction.healthy:
        reduction.commit()
    return reduction


@pytest.mark.parametrize("codec", [Float16(), BFloat16()])
@pytest.mark.parametrize("world", [1, 3])
def test_sums_in_half_precision_do_not_overflow(codec, world):
    """Two replicas with 60,000 each made NaN weights of finite messages; the rest is owed."""
    largest = 120_000.0 if codec == Float16() else 0.999 * LARGEST
    sent = np.float32([largest, -largest, 3.0, 0.0])
    exchange = exchange_of(world, codec)
    first = reduce(exchange, *[sent] * world)
    assert first.healthy
    mean = first.means[0].numpy().astype(np.float64)
    assert np.isfinite(mean).all()
    assert abs(mean[0]) > 0.45 * float(codec.sum_dtype.max)
    np.testing.assert_allclose(mean + exchange.ledger.residuals.total()["a"], sent, rtol=1e-3)
    second = reduce(exchange, *[np.zeros(4, np.float32)] * world).means[0].numpy()
    owed = exchange.ledger.residuals.total()["a"]
    np.testing.assert_allclose(mean + second + owed, sent, rtol=1e-3)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
@pytest.mark.parametrize("addends", [2, 3, 5, 7, 100, 700])
def test_the_largest_summand_is_one(dtype, addends):
    limit = tf.cast(numerics.largest_summand(dtype, addends), dtype)
    in_turn = tf.foldl(lambda a, b: a + b, tf.fill([addends], limit))
    pairs = tf.fill([addends], limit)
    while len(pairs) > 1:
        half = len(pairs) // 2
        pairs = tf.concat([pairs[:half] + pairs[half : 2 * half], pairs[2 * half :]], 0)
    assert np.isfinite(float(in_turn)), limit
    assert np.isfinite(float(pairs[0])), limit
    assert float(limit) * addends > 0.49 * float(dtype.max)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finite_message_on_a_finite_residual_is_skipped_if_the_sum_is_not(kind):
    """3e38 twice: the residual was NaN for ever, and no step counted as skipped."""
    codec, options = KINDS[kind]
    exchange = exchange_of(2, codec, **options)
    ones = np.ones(8, np.float32)
    reduce(exchange, ones, ones)
    residuals = exchange.ledger.residuals
    for (replica, slots), variable in residuals.variables().items():
        if slots[0].kind == "worker":
            variable.assign(tf.fill(variable.shape, 3e38 * replica))
    owed = exchange.ledger.residuals.total()
    reduction = reduce(exchange, ones, 3e38 * ones, step=1)
    assert not reduction.healthy
    np.testing.assert_equal(exchange.ledger.residuals.total(), owed)
    assert exchange.ledger.meter.read().skipped_steps == 1


def test_an_owners_infinite_mean_plus_residual_is_skipped():
    exchange = exchange_of(2, RandomK(0.5), schedule="two_phase")  # keeps every second entry
    ones = np.ones(8, np.float32)
    reduce(exchange, ones, ones)
    for (_, slots), variable in exchange.ledger.residuals.variables().items():
        if slots[0].kind == "owner":
            variable.assign(tf.fill(variable.shape, 3e38))
    assert not reduce(exchange, 3e38 * ones, 1e38 * ones, step=1).healthy


@pytest.mark.parametrize("schedule", ["all_gather", "two_phase"])
def test_a_mean_that_is_not_finite_skips_the_step(schedule):
    """All hold the same bits of it, so all skip it, without asking."""
    exchange = exchange_of(2, TopK(1.0), schedule=schedule)
    values = np.full(8, 3e38, np.float32)
    assert not reduce(exchange, values, values).healthy
    assert not exchange.ledger.residuals.total()["a"].any()
    assert reduce(exchange, values / 4, values / 4).healthy


@pytest.mark.parametrize("rule", ["norm", "norm_ef", "threshold", "fixed"])
def test_adaptive_top_k_of_large_gradients_does_not_crash(rule):
    """Squares of 1e20 overflow; the norm did, and then k."""
    exchange = exchange_of(2, AdaptiveTopK(0.25, rule=rule))
    generator = np.random.default_rng(0)
    for step, scale in enumerate([1e20, 1e-30, 1.0, 1e38, 1e20]):
        values = (scale * generator.uniform(-1, 1, size=[2, 64])).astype(np.float32)
        reduction = reduce(exchange, *values, step=step)
        assert reduction.healthy, step
        assert 1 <= exchange.ledger.kept["budget"].kept[-1] <= 64
    for value in exchange.ledger.kept["budget"].state().values():
        assert not np.isnan(value).any()
        assert not np.isposinf(value).any()


@pytest.mark.parametrize("scale", [1e-40, 1e-22, 1.0, 1e20, 3e38])
def test_norms_are_right_over_the_whole_range(scale):
    parts = [np.full(3, scale, np.float32), np.full([2, 2], -scale, np.float32)]
    norm = min(np.sqrt(7.0) * float(np.float32(scale)), LARGEST)
    assert float(numerics.global_norm([tf.constant(p) for p in parts])) == pytest.approx(norm, 1e-5)
    exchange = exchange_of(1, TopK(0.2))
    exchange.ledger.meter.watch()
    assert reduce(exchange, np.full(5, scale, np.float32)).healthy
    found = exchange.ledger.meter.read().gradient_norm
    assert found == pytest.approx(min(np.sqrt(5.0) * float(np.float32(scale)), LARGEST), 1e-5)
    assert exchange.ledger.residuals.norm() == pytest.approx(2 * float(np.float32(scale)), 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_norm_of_what_is_not_finite_is_not(bad):
    assert not np.isfinite(numerics.global_norm([tf.constant([1.0, bad]), tf.constant([2.0])]))


def test_without_feedback_a_step_of_random_k_has_the_length_of_the_gradient():
    """It lost 99% of every step: entries that are not sent count as sent later."""
    for schedule in ("auto", "all_gather", "two_phase"):
        exchange = exchange_of(2, RandomK(0.1), error_feedback=False, schedule=schedule)
        means = [
            reduce(exchange, *np.ones([2, 100], np.float32), step=step).means[0].numpy()
            for step in range(4)
        ]
        for mean in means:
            np.testing.assert_allclose(mean[mean != 0], 10, rtol=1e-6)
            assert np.count_nonzero(mean) == 10
        assert exchange.ledger.residuals.total() == {}


@pytest.mark.parametrize("codec", [QSGD(4), Ternary(shared_scale=True)])
def test_asked_for_feedback_is_damped_and_conserves(codec):
    exchange = exchange_of(3, codec, error_feedback=True)
    generator = np.random.default_rng(0)
    sent, received = 0.0, 0.0
    for step in range(8):
        values = generator.standard_t(2, size=[3, 600]).astype(np.float32)
        sent = sent + values.mean(axis=0)
        received = received + reduce(exchange, *values, step=step).means[0].numpy()
    np.testing.assert_allclose(received + exchange.ledger.residuals.total()["a"], sent, atol=1e-3)
    assert "Damped" in exchange.ledger.routes[0].codec


# ---------------------------------------------------------------------------------------- float64


@pytest.mark.parametrize("compressor", [None, "identity", TopK(1.0)])
def test_float64_travels_as_float64_where_nothing_compresses_it(compressor):
    """A third, and 1e300, do not survive float32. TopK(1.0) would send more than no compression."""
    exchange = exchange_of(4, compressor)
    values = np.array([1 / 3, 1e300, -1e-300, 1 + 1e-12])
    narrow = Message("b", [tf.constant(np.float32([1, 2, 3]))] * 4)
    wide = Message("a", [tf.constant((r + 1) * values) for r in range(4)])
    reduction = exchange.reduce([wide, narrow], tf.constant(0))
    assert reduction.healthy
    assert reduction.means[0].dtype == tf.float64
    np.testing.assert_allclose(reduction.means[0], 2.5 * values, rtol=1e-15)
    np.testing.assert_array_equal(reduction.means[1], [1, 2, 3])
    assert [route.codec.split()[0] for route in exchange.ledger.routes] == ["float64", "float32"]
    reduction.record()
    traffic = exchange.ledger.meter.read()
    assert traffic.dense_bytes == 2 * 3 * (4 * 8 + 3 * 4) // 4
    assert traffic.bytes_sent == 2 * 3 * 4 * 8 // 4 + 2 * 3 * 3 * 4 // 4


def test_float64_beyond_float32_is_skipped_by_a_codec():
    exchange = exchange_of(2, TopK(0.2))
    assert not reduce(exchange, *np.full([2, 10], 1e300)).healthy
    assert reduce(exchange, *np.full([2, 10], 1e30)).healthy


# ------------------------------------------------------------------------------- granularity model


@pytest.mark.parametrize("schedule", ["all_gather", "two_phase"])
def test_residuals_of_a_whole_model_survive_another_set_of_variables(schedule):
    """Freezing a layer left the residual of the others behind, for ever."""
    exchange = exchange_of(2, TopK(0.1), granularity="model", schedule=schedule)
    generator = np.random.default_rng(0)

    def message(key, n):
        values = generator.normal(size=[2, n]).astype(np.float32)
        sent[key] = sent.get(key, 0) + values.mean(axis=0)
        return Message(key, [tf.constant(v) for v in values])

    sent, received = {}, {}
    for step, names in enumerate(["ab", "ab", "b", "b", "ab"]):
        group = [message(name, {"a": 70, "b": 31}[name]) for name in names]
        reduction = exchange.reduce(group, tf.constant(step))
        reduction.commit()
        for name, mean in zip(names, reduction.means, strict=True):
            received[name] = received.get(name, 0) + mean.numpy()
    owed = exchange.ledger.residuals.total()
    for name in "ab":
        np.testing.assert_allclose(received[name] + owed[name], sent[name], atol=1e-5)


def test_a_backup_of_an_earlier_version_gives_each_tensor_its_part_of_the_models_residual():
    exchange = exchange_of(1, TopK(0.01), granularity="model")
    zeros = [Message(key, [tf.zeros([n])]) for key, n in (("0", 30), ("1", 40))]
    saved = np.arange(70, dtype=np.float32)
    exchange.ledger.load_state({"residual/model/c6a39ffd": saved})
    name = "residual/model/" + _old_name(["0", "1"])
    exchange.ledger.load_state({name: saved})
    reduction = exchange.reduce(zeros, tf.constant(0))
    assert float(reduction.means[1][-1]) == 69
    reduction.commit()
    state = exchange.ledger.state()
    assert set(state) == {"residual/0", "residual/1"}
    np.testing.assert_array_equal(state["residual/0"], saved[:30])
    exchange.ledger.load_state({name: saved})  # also where the tensors are known
    np.testing.assert_array_equal(exchange.ledger.state()["residual/1"], saved[30:])


def _old_name(keys):
    return f"{zlib.crc32('+'.join(keys).encode()):08x}"


def test_what_waits_for_its_variable_is_saved_again():
    exchange = exchange_of(2, TopK(0.1))
    exchange.ledger.load_state({"residual/b": np.ones(10, np.float32)})
    reduce(exchange, *np.zeros([2, 20], np.float32))
    np.testing.assert_array_equal(exchange.ledger.state()["residual/b"], np.ones(10))


# -------------------------------------------------------------------------------- more than 2 GiB


def test_a_tensor_beyond_int32_is_refused_by_codecs():
    n = 2**31
    for function, shape in [(TopK(0.01).encode, [n]), (RandomK(0.01).encode, [n])]:
        traced = tf.function(function, input_signature=[tf.TensorSpec(shape, tf.float32)])
        with pytest.raises(ValueError, match="must have at most 2147483647 elements.*2147483648"):
            traced.get_concrete_function()
    with pytest.raises(ValueError, match="must have at most 2147483647 elements"):
        BlockSign().decode(tf.zeros([1], tf.int32), n)


def test_a_model_beyond_int32_travels_in_several_payloads():
    class Sized:
        def __init__(self, size):
            self.size = size

    sizes = (2**29, 2**29, 1, 2**31 + 5, 7, 2**30 - 7, 1)
    groups = routing.cut([Sized(size) for size in sizes], 2**40)
    assert [[m.size for m in group] for group in groups] == [
        [2**29, 2**29], [1], [2**31 + 5], [7, 2**30 - 7], [1]
    ]  # fmt: skip
    assert routing.cut([], 1) == []


def test_bytes_beyond_int32_are_counted():
    exchange = exchange_of(4, None)
    exchange.ledger.meter.record(2**33 + 1, 2**34, tf.constant(True), lambda: tf.constant(1.0))
    assert exchange.ledger.meter.read().bytes_sent == 2**33 + 1
    sent = exchange.transport.bytes_all_gather(tf.constant(2**31, tf.int64))
    assert int(sent) == 3 * 4 * 2**31
