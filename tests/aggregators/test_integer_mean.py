"""Levels of a shared scale, summed as integers: the whole exchange in NumPy, from the wire up."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tests.aggregators.runs import random_messages, run
from tests.catalogue import AggregatorCase
from tfqcomm.aggregators import IntegerMean
from tfqcomm.compressors import Ternary
from tfqcomm.kernels import rounding
from tfqcomm.state.ledger import Ledger
from tfqcomm.step import ExchangeOptions
from tfqcomm.step.exchange import GradientExchange
from tfqcomm.step.message import Message
from tfqcomm.transport.local import LocalTransport

SIZES = (31, 0, 1000, 1)


def case(clip=None):
    return AggregatorCase(IntegerMean, Ternary(clip=clip, shared_scale=True))


class WireTap(LocalTransport):
    """Keeps what would travel."""

    def __init__(self, world):
        super().__init__(["CPU:0"] * world)
        self.gathered, self.summed = [], []

    def all_gather(self, words):
        self.gathered.append([w.numpy() for w in words])
        return super().all_gather(words)

    def all_reduce(self, values):
        self.summed.append([v.numpy() for v in values])
        return super().all_reduce(values)


def clipped_scale(x, clip):
    """The largest magnitude after clipping; the deviation counts as at least |mean|."""
    if not len(x):
        return np.float32(0)
    x = x.astype(np.float64)
    limit = math.inf if clip is None else clip * max(x.std(), abs(x.mean()))
    return np.float32(min(np.abs(x).max(), limit))


def ternarize(x, scale, draws):
    """Levels of one replica: up where the fraction, in 2^-16, is above the draw."""
    if not len(x) or scale == 0:
        return np.zeros(len(x), np.int64)
    draws = draws.astype(np.float32)
    fraction = np.minimum(np.abs(x) / scale, np.float32(1))  # float32, as division is exact
    up = (fraction == 1) | (fraction * np.float32(65536) > draws + np.float32(0.5))
    return np.sign(x).astype(np.int64) * up


def fields_to_levels(words, world, n):
    """Undoes the packing with Python's integers: -W ... W of each entry."""
    bits = math.ceil(math.log2(2 * world + 1))
    fields, mask = 32 // bits, 2**bits - 1
    rows = [[(int(w) % 2**32 >> bits * i & mask) for w in words] for i in range(fields)]
    return np.array(sum(rows, [])[:n], np.int64)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("clip", [None, 2.5])
def test_the_whole_exchange_is_that_of_numpy(world, clip):
    """Scales, levels on the wire, their sum, means and residuals, over three steps."""
    messages = random_messages(SIZES, world)
    tap = WireTap(world)
    result = run(case(clip), messages, tap)
    layout, filled = result.aggregator.layout, [t for t, n in enumerate(SIZES) if n]
    owed = [[np.zeros(n, np.float32) for n in SIZES] for _ in range(world)]
    for step, of_replicas in enumerate(messages):
        targets = [
            [m + r for m, r in zip(*of_one, strict=True)]
            for of_one in zip(of_replicas, owed, strict=True)
        ]
        sent_scales = np.array(tap.gathered[step]).view(np.float32)  # [W, T]
        right = [[clipped_scale(of_one[t], clip) for t in filled] for of_one in targets]
        np.testing.assert_allclose(sent_scales, right, rtol=0 if clip is None else 1e-6)
        scales = dict(zip(filled, sent_scales.max(axis=0), strict=True)) | {1: np.float32(0)}
        levels = []
        for rank, of_one in enumerate(targets):
            draws = rounding.draw(result.aggregator.codec_seed(step, rank), layout.size).numpy()
            starts = dict(zip(filled, layout.starts, strict=True)) | {1: 0}
            levels.append(
                [
                    ternarize(x, scales[t], draws[starts[t] : starts[t] + len(x)])
                    for t, x in enumerate(of_one)
                ]
            )
        for rank, words in enumerate(tap.summed[step]):
            assert words[0] == 0  # health
            on_the_wire = fields_to_levels(words[1:], world, layout.size) - 1
            for t, start in zip(filled, layout.starts, strict=True):
                found = on_the_wire[start : start + SIZES[t]]
                np.testing.assert_array_equal(found, levels[rank][t])
        for t, mean in enumerate(result.means[step]):
            total = sum(of_one[t] for of_one in levels)
            assert np.abs(total).max(initial=0) <= world
            # One division and one product of float32, each rounded once or not at all.
            np.testing.assert_allclose(
                mean, scales[t].astype(np.float64) * total / world, rtol=2e-7
            )
        for rank, of_one in enumerate(targets):
            owed[rank] = [
                x - scales[t] * levels[rank][t].astype(np.float32) for t, x in enumerate(of_one)
            ]
            if step == len(messages) - 1:
                of_rank = result.aggregator.unpack(result.aggregator.owed()[rank])
                for found, right in zip(of_rank, owed[rank], strict=True):
                    np.testing.assert_array_equal(found, right)


def test_a_step_by_hand():
    """Two workers; zeros and entries of +-s leave nothing to chance.

    Levels plus one are 2 0 1 2 2, 1 1 and 2 2 1 1 0, 2 0: three bits each, ten to a word, where
    each tensor begins a row of 32 that is filled up with 1.
    """
    messages = [
        [
            [np.float32([4, -4, 0, 4, 4]), np.float32([0, 0])],
            [np.float32([4, 4, 0, 0, -4]), np.float32([8, -8])],
        ]
    ]
    tap = WireTap(2)
    result = run(case(), messages, tap)
    np.testing.assert_array_equal(result.means[0][0], [4, 0, 0, 2, 0])
    np.testing.assert_array_equal(result.means[0][1], [4, -4])
    for words, levels in zip(tap.summed[0], [(20122, 11), (22110, 20)], strict=True):
        assert words[0] == 0
        found = "".join(str(level) for level in fields_to_levels(words[1:], 2, 64))
        assert found == f"{levels[0]}{'1' * 27}{levels[1]}{'1' * 30}"
    assert result.aggregates[0].bytes_sent == 2 * 4 + 8 * 4  # two scales; 1 + 7 words, W = 2


@pytest.mark.slow
def test_unbiased_and_independent_among_replicas():
    """Mean and variance over seeds: E = mean x_i, Var = sum s |x_i| - x_i^2 over W^2."""
    world, steps = 4, 200
    (messages,) = random_messages((50,), world, steps=1)
    messages[1] = messages[0]  # equal messages must not round alike
    drawn = np.stack(
        [m[0] for m in run(case(), [messages] * steps, error_feedback=False).means],
        dtype=np.float64,
    )
    x = np.array([of_one[0] for of_one in messages], np.float64)
    scale = np.abs(x).max()
    variance = (scale * np.abs(x) - x**2).sum(axis=0) / world**2
    error = np.abs(drawn.mean(axis=0) - x.mean(axis=0))
    assert (error <= 5 * np.sqrt(variance / steps) + 2.0**-16 * scale).all()
    assert drawn.var(axis=0).sum() == pytest.approx(variance.sum(), rel=0.1)


def test_clipping_limits_what_the_largest_replica_may_impose():
    """Of the replicas' clipped scales the largest counts, not the clipped largest entry."""
    (messages,) = random_messages((1000,), 2, steps=1)
    messages[1][0][0] = 100  # far beyond 2.5 deviations, which are about 3.4 each
    (mean,) = run(case(2.5), [messages]).means[0]
    expected = max(clipped_scale(of_one[0], 2.5) for of_one in messages)
    assert expected < 10
    np.testing.assert_allclose(np.abs(mean).max(), expected, rtol=1e-6)


def test_conservation_over_many_steps():
    """Sum of the means, and what is owed, is the sum of the mean messages."""
    messages = random_messages((200,), 3, steps=40)
    result = run(case(2.5), messages)
    left = np.sum([m[0] for m in result.means], axis=0) + result.residuals.total()["tensor0"]
    right = np.sum([np.mean([of_one[0] for of_one in m], axis=0) for m in messages], axis=0)
    np.testing.assert_allclose(left, right, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "low", "high"), [(2.0, 1, 2), (2.5, 8, 30)])
def test_how_much_error_feedback_adds_up(clip, low, high):
    """As the docstring of `Ternary` says: norms of residuals in those of normal messages."""
    rng = np.random.default_rng(0)
    messages = rng.normal(size=[60, 4, 1, 1000]).astype(np.float32)
    result = run(case(clip), messages)
    residual = np.concatenate(result.aggregator.owed())
    assert low < np.linalg.norm(residual) / np.linalg.norm(messages[0]) < high


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_step_with_a_bad_number_is_skipped_by_all_processes(bad):
    """The next one is as if it had not been."""
    good = random_messages((40, 30), 4, steps=2)
    ill = [[v.copy() for v in of_one] for of_one in good[1]]
    ill[2][0][7] = bad

    def train(transport):
        codec = Ternary(shared_scale=True)
        options = ExchangeOptions(codec, error_feedback=True, min_size=0)
        exchange = GradientExchange(options, Ledger(transport))
        found = []
        for of_replicas in (good[0], ill, good[1]):
            sent = [
                Message(key, [tf.constant(of_replicas[rank][t]) for rank in transport.ranks])
                for t, key in enumerate("ab")
            ]
            reduction = exchange.reduce(sent, tf.constant(len(found)))
            reduction.record()
            if reduction.healthy:
                reduction.commit()
                found.append([mean.numpy() for mean in reduction.means])
        assert exchange.ledger.meter.read().skipped_steps == 1
        return found, exchange.ledger.residuals.total()

    first, second = run_processes(2, 2, train)
    np.testing.assert_equal(first, second)
    means, owed = first
    assert len(means) == 2
    for t, key in enumerate("ab"):
        inputs = sum(np.mean([of_one[t] for of_one in m], axis=0) for m in good)
        np.testing.assert_allclose(means[0][t] + means[1][t] + owed[key], inputs, atol=1e-4)


def test_the_largest_numbers_stay_finite():
    largest = np.finfo(np.float32).max
    messages = [[[np.float32([largest, -largest, 0, largest])]] * 3]
    result = run(case(), messages)
    np.testing.assert_array_equal(result.means[0][0], messages[0][0][0])


@pytest.mark.parametrize(
    ("world", "per_word"), [(1, 16), (2, 10), (3, 10), (4, 8), (7, 8), (8, 6), (16, 5), (64, 4)]
)
def test_bytes_follow_the_width_of_a_sum(world, per_word):
    result = run(case(), random_messages((999,), world, steps=1))
    words = 1 + -(-1024 // per_word)  # in whole rows of 32
    expected = (world - 1) * 4 + 2 * (world - 1) * 4 * words // world
    assert result.aggregates[0].bytes_sent == expected
    if world not in (1, 4):  # with four it is 6 bits either way
        gathered = (world - 1) * 4 * (1 + Ternary().num_words(999))
        assert (expected < gathered) == (world > 4)  # as the docstring of `Ternary` says


def test_a_graph_over_several_devices_gives_the_same():
    transport = LocalTransport([f"CPU:{i}" for i in range(3)])
    messages = random_messages((300, 7), 3)

    @tf.function
    def step(of_replicas, number):
        return aggregator.aggregate(of_replicas, [tf.constant(True)] * 3, number).means

    aggregator = IntegerMean(Ternary(shared_scale=True), transport, None, "ab", (300, 7))
    eager = run(case(2.5), messages, error_feedback=False)
    for number, of_replicas in enumerate(messages):
        found = step([[tf.constant(v) for v in m] for m in of_replicas], tf.constant(number))
        for mean, right in zip(found, eager.means[number], strict=True):
            np.testing.assert_allclose(mean, right, rtol=1e-6)
