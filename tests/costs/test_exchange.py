"""Measured exchanges: their buckets send what a real exchange sends, in its order."""

import pytest
import tensorflow as tf

from tfqcomm import compressors
from tfqcomm.costs import exchange
from tfqcomm.costs.simulated import SimulatedTransport
from tfqcomm.state.ledger import Ledger
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.step.options import ExchangeOptions

SHAPES = [(30, 100), (100,), (100, 1000), (1000,), (1000, 11), (11,)]
SIZES = [3000, 100, 100000, 1000, 11000, 11]
WAYS = [
    (None, "auto"),
    ("float16", "auto"),
    ("random_k", "auto"),
    ("power_sgd", "auto"),
    ("block_sign", "all_gather"),
    ("block_sign", "two_phase"),
    ("block_int8", "two_phase"),
    ("top_k", "all_gather"),
    (compressors.TopK(0.01, support="shared"), "auto"),
]


@pytest.fixture
def untimed(monkeypatch):
    """Exchanges are traced, and not run."""
    monkeypatch.setattr(exchange, "best_seconds", lambda function, seconds: 1.0)


def gradients():
    return [tf.random.stateless_normal(shape, [1, index]) for index, shape in enumerate(SHAPES)]


def options_of(compressor, schedule, **more):
    return ExchangeOptions(compressors.get(compressor), schedule=schedule, **more)


def bytes_of_an_exchange(options, world):
    """As the exchange itself counts them."""
    found = GradientExchange(options, Ledger(SimulatedTransport(world)))
    messages = [Message(str(i), [g], factor=world) for i, g in enumerate(gradients())]
    return int(found.reduce(messages, tf.constant(0)).bytes_sent)


@pytest.mark.parametrize(("compressor", "schedule"), WAYS)
def test_buckets_send_what_an_exchange_sends(compressor, schedule, untimed):
    options = options_of(compressor, schedule)
    buckets = exchange.measure(options, gradients(), 0.0)
    for world in (2, 3, 8):
        sent = sum(bucket.bytes_sent(world) for bucket in buckets)
        # Chunks of two phases are padded to one length, and integer divisions round.
        expected = bytes_of_an_exchange(options, world)
        assert sent == pytest.approx(expected, rel=0.03 if schedule == "two_phase" else 1e-3)


def test_between_processes_an_exchange_is_that_of_one_replica_each(untimed):
    found = [
        exchange.measure(options_of("block_sign", "two_phase", hierarchical=h), gradients(), 0.0)
        for h in (True, False)
    ]
    assert found[0] == found[1]


def test_buckets_come_last_layer_first_and_are_ready_with_their_first_gradient(untimed):
    options = options_of("block_sign", "all_gather", bucket_mb=0.05)
    buckets = exchange.measure(options, gradients(), 0.0)
    total = sum(SIZES)
    # The kernel of the last layer; of the second, which is larger than a bucket; of the first;
    # what is small, of which the first bias is the last to come.
    assert [b.schedule for b in buckets] == ["all_gather"] * 3 + ["dense"]
    assert [b.ready for b in buckets] == pytest.approx(
        [11011 / total, (11011 + 101000) / total, 1.0, 1 - 3000 / total]
    )


def test_exchanges_are_run():
    (compressed, dense) = exchange.measure(options_of("top_k", "all_gather"), gradients(), 0.0)
    assert 0 <= compressed.before < 1 and 0 <= compressed.after_each < 1
    taken = compressed.before + exchange.FEW * compressed.after_each
    assert 0 < dense.before == dense.after < taken < 1


def test_time_is_shared_out_by_elements_and_what_grows_with_the_workers_is_told(monkeypatch):
    times = iter([2.0, 3.0])  # with 2 and 4 payloads to decode
    monkeypatch.setattr(exchange, "best_seconds", lambda function, seconds: next(times))
    buckets = exchange.measure(options_of("top_k", "all_gather"), gradients(), 0.0)
    compressed, dense = buckets
    share = 114000 / sum(SIZES)
    assert compressed.after_each == pytest.approx(0.5 * share)
    assert compressed.before == pytest.approx((2.0 - 2 * 0.5) * share)
    assert compressed.after == 0
    assert dense.before == dense.after == pytest.approx(2.0 * (1 - share) / 2)


def test_rows_of_embeddings_travel_as_they_are_behind_all_others():
    rows = tf.IndexedSlices(tf.ones([6, 8]), tf.range(6), tf.constant([50, 8]))
    buckets = exchange.measure(options_of("block_sign", "two_phase"), [rows, *gradients()], 0.0)
    assert buckets[-1].schedule == "all_gather"
    assert buckets[-1].payload == 4 * 6 * 8 + 4 * 6
    assert buckets[-1].ready == 1.0


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (None, ("auto",)),
        ("bfloat16", ("auto",)),
        ("power_sgd", ("auto",)),
        ("top_k", ("all_gather",)),
        ("block_sign", ("all_gather", "two_phase")),
    ],
)
def test_schedules(compressor, expected):
    codec = compressors.get(compressor)
    assert exchange.schedules_for(codec) == expected
    for schedule in expected:
        ExchangeOptions(codec, schedule=schedule)  # is not refused


@pytest.mark.parametrize(
    "codec", [compressors.AdaptiveTopK(), compressors.Ternary(shared_scale=True)]
)
def test_compressors_whose_payload_is_not_of_one_length_are_refused(codec):
    with pytest.raises(ValueError, match="of one length.*Received: compressor="):
        exchange.schedules_for(codec)
