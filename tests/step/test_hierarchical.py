"""Hierarchical exchange: to the bit that between processes, of messages averaged by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tests.replicas import apply_gradients, build, compressing, random_gradients
from tests.step.error_feedback_reference import means_of_messages
from tfqcomm.compressors import AdaptiveTopK, PowerSGD, Ternary, TopK
from tfqcomm.optimizers import AdaptiveTopKSGD
from tfqcomm.parameter_server.optimizers import options_of
from tfqcomm.state.ledger import Ledger, ledger_of
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.transport.local import LocalTransport

PROCESSES, LOCAL, STEPS = 2, 2, 3
SHAPES = {"kernel": (40, 30), "other": (25, 20), "bias": (7,)}
TABLE = (50, 6)
CASES = {
    "top_k": {"compressor": TopK(0.1)},
    "all_gather": {"compressor": "block_sign", "schedule": "all_gather"},
    "two_phase": {"compressor": "block_sign", "schedule": "two_phase"},
    "dense": {"compressor": "bfloat16"},
    "linear": {"compressor": "random_k"},
    "integer": {"compressor": Ternary(shared_scale=True), "error_feedback": True},
    "low_rank": {"compressor": PowerSGD(2)},
    "adaptive": {"compressor": AdaptiveTopK(0.1)},
    "model": {"compressor": TopK(0.1), "granularity": "model"},
    "policy": {"compressor": {"kernel": TopK(0.1), "other": "block_sign", "*": None}},
    "rows": {"compressor": None, "embedding_rows": "int8"},
}


def gradients_of(replicas, steps=STEPS):
    """[steps, replicas, ...] of each tensor, of few bits, so that sums are exact."""
    rng = np.random.default_rng(0)
    return {
        key: rng.integers(-99, 100, [steps, replicas, *shape]).astype("float32") / 64
        for key, shape in SHAPES.items()
    }


def rows_of(replicas, steps=STEPS):
    """[steps, replicas, looked up] places, some of them twice, and [..., 6] values."""
    rng = np.random.default_rng(1)
    places = rng.integers(0, TABLE[0] // 4, [steps, replicas, 9])
    return places, rng.integers(-99, 100, [*places.shape, TABLE[1]]).astype("float32") / 64


def embedding(places, values):
    """The gradient of one participant."""
    return tf.IndexedSlices(tf.constant(values), tf.constant(places), tf.constant(TABLE, tf.int64))


def by_hand(array):
    """What two processes of two replicas each send to one another: sums of pairs."""
    return array.reshape(len(array), PROCESSES, LOCAL, *array.shape[2:]).sum(axis=2)


def side_by_side(array):
    return array.reshape(len(array), PROCESSES, LOCAL * array.shape[2], *array.shape[3:])


def run(transport, gradients, rows, factor, **options):
    """Means by step, what is owed in the end, the traffic, routes and what was left out."""
    exchange = GradientExchange(ExchangeOptions(min_size=0, **options), Ledger(transport))
    means, left_out = [], {}
    for step in range(STEPS):
        messages = [
            Message(key, [tf.constant(g[step, r]) for r in transport.ranks], factor=factor)
            for key, g in gradients.items()
        ]
        places, values = rows
        found = [embedding(places[step, r], values[step, r]) for r in transport.ranks]
        messages.append(Message("embedding", found, factor=factor))
        reduction = exchange.reduce(messages, tf.constant(step))
        reduction.record()
        assert reduction.healthy
        left_out = {place: rest.numpy() for place, rest in reduction.left_out().items()}
        reduction.commit()
        means.append([tf.convert_to_tensor(m).numpy() for m in reduction.means])
    ledger = exchange.ledger
    return means, ledger.residuals.total(), ledger.meter.read(), ledger.routes, left_out


@pytest.mark.parametrize("name", CASES)
def test_processes_exchange_the_means_of_their_replicas(name):
    gradients, rows = gradients_of(PROCESSES * LOCAL), rows_of(PROCESSES * LOCAL)
    sums = {key: by_hand(g) for key, g in gradients.items()}
    whole = tuple(map(side_by_side, rows))
    found = run_processes(
        PROCESSES,
        LOCAL,
        lambda t: run(t, gradients, rows, PROCESSES * LOCAL, hierarchical=True, **CASES[name]),
    )
    (expected, *_) = run_processes(
        PROCESSES, 1, lambda t: run(t, sums, whole, PROCESSES, **CASES[name])
    )
    for means, owed, traffic, routes, left_out in found:
        np.testing.assert_equal(means, expected[0])
        np.testing.assert_equal(owed, expected[1])
        assert traffic == expected[2]
        texts = [(r.schedule, r.codec.removesuffix(" between processes")) for r in routes]
        assert texts == [(r.schedule, r.codec) for r in expected[3]]
        # Each replica hears what its process has left out.
        assert {place for place, _ in left_out} == (set(range(LOCAL)) if left_out else set())
    for replica in range(LOCAL):
        ours = {key: v for (of, key), v in found[0][4].items() if of == replica}
        np.testing.assert_equal(ours, {key: v for (_, key), v in expected[4].items()})


def test_messages_are_those_of_a_reference():
    """Error feedback in NumPy, of one worker for each process; what is owed counts by process."""
    gradients = gradients_of(PROCESSES * LOCAL)
    options = {"compressor": TopK(0.1), "hierarchical": True}
    rows = rows_of(PROCESSES * LOCAL)
    found = run_processes(
        PROCESSES, LOCAL, lambda t: run(t, gradients, rows, PROCESSES * LOCAL, **options)
    )
    for index, (key, values) in enumerate(gradients.items()):
        messages = PROCESSES * by_hand(values)
        (expected,) = means_of_messages([TopK(0.1)], [messages])
        sent = np.stack([means[index] for means in found[0][0]])
        np.testing.assert_allclose(sent, expected, rtol=0, atol=1e-6)
        owed = messages.mean(axis=1).sum(axis=0) - expected.sum(axis=0)
        np.testing.assert_allclose(found[0][1][key], owed.ravel(), rtol=0, atol=1e-5)


def test_bytes_fall_by_the_number_of_devices():
    kernel = gradients_of(6)["kernel"][0]
    options = {"compressor": "block_sign", "schedule": "all_gather", "min_size": 1200}

    def sent(transport, hierarchical):
        exchange = GradientExchange(
            ExchangeOptions(**options, hierarchical=hierarchical), Ledger(transport)
        )
        values = [tf.constant(kernel[r]) for r in transport.ranks]
        exchange.reduce([Message("kernel", values, factor=6)], tf.constant(0)).record()
        return exchange.ledger.meter.read()

    by_devices = run_processes(2, 3, lambda t: sent(t, False))[0]
    by_processes = run_processes(2, 3, lambda t: sent(t, True))[0]
    # To one other process: a health word, a scale, 38 words of signs.
    assert by_processes.bytes_sent == 4 * 40
    assert by_devices.bytes_sent == 3 * by_processes.bytes_sent
    assert by_devices.dense_bytes == by_processes.dense_bytes == 4 * 1200


def test_what_is_owed_goes_on_with_other_replicas():
    """The sum of what is owed is the same for whoever takes it over, hierarchical or not."""
    gradients, rows = gradients_of(PROCESSES * LOCAL), rows_of(PROCESSES * LOCAL)
    options = {"compressor": "block_sign", "schedule": "two_phase"}

    def leave(transport):
        return run(transport, gradients, rows, 4, hierarchical=True, **options)[1]

    def take_over(transport, owed, hierarchical):
        ledger = Ledger(transport)
        ledger.residuals.load_total(owed)
        exchange = GradientExchange(
            ExchangeOptions(min_size=0, hierarchical=hierarchical, **options), ledger
        )
        messages = [
            Message(key, [tf.zeros(shape)] * transport.local) for key, shape in SHAPES.items()
        ]
        reduction = exchange.reduce(messages, tf.constant(0))
        reduction.commit()
        left = ledger.residuals.total()
        return {
            m.key: np.ravel(mean) + left[m.key]
            for m, mean in zip(messages, reduction.means, strict=True)
        }

    owed = run_processes(PROCESSES, LOCAL, leave)[0]
    for processes, local, hierarchical in [(2, 2, True), (2, 3, True), (2, 1, False), (1, 3, True)]:
        found = run_processes(processes, local, lambda t, h=hierarchical: take_over(t, owed, h))
        for of in found:
            assert of.keys() == owed.keys()
            for key, value in owed.items():
                np.testing.assert_allclose(of[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_one_bad_number_of_one_replica_changes_nothing(bad):
    gradients, rows = gradients_of(4), rows_of(4)
    options = ExchangeOptions(TopK(0.1), min_size=0, hierarchical=True)

    def step(transport, key, rank):
        exchange = GradientExchange(options, Ledger(transport))
        values = {name: g[0].copy() for name, g in gradients.items()}
        places, of_rows = rows[0][0], rows[1][0].copy()
        (of_rows if key == "embedding" else values[key])[rank].flat[0] = bad
        if np.isinf(bad):  # the other replica of the process cancels it, if anything can
            (of_rows if key == "embedding" else values[key])[rank ^ 1].flat[0] = -bad
        messages = [
            Message(name, [tf.constant(v[r]) for r in transport.ranks])
            for name, v in values.items()
        ]
        found = [embedding(places[r], of_rows[r]) for r in transport.ranks]
        reduction = exchange.reduce([*messages, Message("embedding", found)], tf.constant(0))
        return bool(reduction.healthy)

    for key, rank in [("kernel", 1), ("bias", 2), ("embedding", 3)]:
        healthy = run_processes(2, 2, lambda t, k=key, r=rank: step(t, k, r))
        assert healthy == [False, False]


def test_warm_up_is_dense_and_keeps_what_is_owed():
    gradients = gradients_of(4)

    def steps(transport):
        exchange = GradientExchange(
            ExchangeOptions(TopK(0.1), min_size=0, hierarchical=True, warm_up=1), Ledger(transport)
        )
        means = []
        for step in range(2):
            message = Message(
                "kernel", [tf.constant(gradients["kernel"][step, r]) for r in transport.ranks]
            )
            compresses = exchange.options.after_warm_up(tf.constant(step))
            reduction = exchange.reduce([message], tf.constant(step), compresses)
            reduction.commit()
            means.append(reduction.means[0].numpy())
        return means

    for dense, sparse in run_processes(2, 2, steps):
        np.testing.assert_allclose(dense, gradients["kernel"][0].mean(axis=0), atol=1e-6)
        assert np.count_nonzero(sparse) <= 2 * 120


def test_within_one_process_nothing_is_compressed(caplog):
    """To the bit what "identity" does, and it is said; what a restored run owes is paid."""
    shapes = [(40, 30), (7,)]
    gradients = random_gradients(3, 2, shapes)
    found = []
    for options in ({"compressor": TopK(0.1), "hierarchical": True}, {"compressor": "identity"}):
        strategy = compressing(2, **options)
        optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), shapes)
        found.append(apply_gradients(strategy, optimizer, variables, gradients))
        ledger = ledger_of(optimizer)
        assert {(r.schedule, r.codec) for r in ledger.routes} == {("dense", "float32")}
        assert ledger.residuals.total() == {}
        traffic = ledger.meter.read()
        assert traffic.bytes_sent <= traffic.dense_bytes + 3 * 4  # a flag
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    text = "hierarchical=True: all replicas are in one process, so nothing is compressed."
    assert len([r for r in caplog.records if r.message == text]) <= 1


def test_it_is_said_that_one_process_sends_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(
        "absl.logging.log_first_n", lambda level, text, n, *args: said.append((text, n))
    )
    GradientExchange(ExchangeOptions("top_k", hierarchical=True), Ledger(LocalTransport(["CPU:0"])))
    ((text, times),) = said
    assert "all replicas are in one process" in text and times == 1
    GradientExchange(ExchangeOptions("top_k"), Ledger(LocalTransport(["CPU:0"])))
    assert len(said) == 1


@pytest.mark.parametrize("value", [None, 1, "yes", 2.0])
def test_values_that_do_not_fit_are_refused(value):
    text = f"Argument `hierarchical` must be a bool. Received: hierarchical={value!r}"
    with pytest.raises(ValueError, match=text):
        ExchangeOptions("top_k", hierarchical=value)


def test_parameter_servers_refuse_it():
    with pytest.raises(ValueError, match="`hierarchical` of the optimizer is not supported with p"):
        options_of(AdaptiveTopKSGD(0.1, hierarchical=True), 100)
