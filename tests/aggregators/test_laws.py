"""The laws of every aggregator with every kind of codec that can follow it."""

import inspect
import math

import numpy as np
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tests.aggregators.runs import (
    Restatement,
    finished_run,
    local_transport,
    random_messages,
    run,
)
from tests.catalogue import AGGREGATORS, COMPRESSORS, over_aggregators
from tfqcomm import aggregators
from tfqcomm.aggregators.base import Aggregator
from tfqcomm.compressors import RandomK, Ternary
from tfqcomm.kernels.layout import Layout
from tfqcomm.state.residuals import Residuals

SMALL = (31, 70)
SIZES = (0, 1, 31, 65536, 65537)
SETTINGS = [  # sizes of the tensors, workers
    *((SIZES, world) for world in (1, 2, 3)),
    ((3,), 4),  # some replicas own nothing in a two-phase exchange
]


def close(actual, expected, tolerance, scale=None):
    """Equality relative to `scale`, by default the largest entry; to the bit at tolerance 0."""
    scale = np.abs(expected).max(initial=0) if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=float(tolerance * scale))


def test_catalogue_is_complete():
    exported = {
        value
        for value in vars(aggregators).values()
        if inspect.isclass(value) and issubclass(value, Aggregator)
    }
    # Of no codec but their own, and more than sizes; or no mean: tests/aggregators has a file each.
    own_laws = ("AdaptiveMean", "LowRankMean", "MajorityVoteMean")
    exported -= {getattr(aggregators, name) for name in own_laws}
    assert {case.aggregator for case in AGGREGATORS} == exported
    catalogued = {type(case.compressor) for case in AGGREGATORS}
    codecs = [case.compressor for case in COMPRESSORS]
    followed = {type(codec) for codec in codecs if not codec.adaptive and not codec.low_rank}
    assert catalogued == followed


@over_aggregators()
def test_mean_is_that_of_the_numpy_loop(case):
    for sizes, world in SETTINGS:
        result = finished_run(case, sizes, world)
        restatement = Restatement(result.aggregator, world)
        for step, of_replicas in enumerate(result.messages):
            expected = restatement.step(of_replicas, step)
            for mean, right in zip(result.means[step], expected, strict=True):
                close(mean, right, case.tolerance)


@over_aggregators()
def test_nothing_is_lost(case):
    """Sum of means + what the residuals owe = sum of mean messages."""
    for sizes, world in SETTINGS:
        result = finished_run(case, sizes, world)
        owed = result.residuals.total()
        for tensor, n in enumerate(sizes):
            left = sum(of_step[tensor].astype(np.float64) for of_step in result.means)
            left += owed.get(f"tensor{tensor}", np.zeros(n))  # nothing without loss
            inputs = np.array([[m[tensor] for m in r] for r in result.messages], np.float64)
            right = inputs.mean(axis=1).sum(axis=0)
            close(left, right, max(case.tolerance, 1e-6), np.abs(inputs).max(initial=0))


@over_aggregators(settings=False)
def test_without_error_feedback_nothing_is_kept(case):
    messages = random_messages(SMALL, world=3, steps=2)
    result = run(case, messages, error_feedback=False)
    assert result.residuals.total() == {}
    assert all(not aggregate.updates for aggregate in result.aggregates)
    restatement = Restatement(result.aggregator, 3, error_feedback=False)
    for step, of_replicas in enumerate(messages):
        for mean, right in zip(
            result.means[step], restatement.step(of_replicas, step), strict=True
        ):
            close(mean, right, case.tolerance)


@over_aggregators(settings=False)
def test_all_processes_hold_the_same_and_that_of_one_process(case):
    messages = random_messages(SMALL, world=4, steps=2)

    def one_process(transport):
        result = run(case, messages, transport)
        return result.means, result.residuals.total()

    runs = run_processes(2, 2, one_process)
    one = run(case, messages)
    for means, owed in runs:
        np.testing.assert_equal(means, runs[0][0])  # to the bit
        for mean, right in zip(means, one.means, strict=True):
            for a, b in zip(mean, right, strict=True):
                close(a, b, case.tolerance)
        for name, right in one.residuals.total().items():
            close(owed[name], right, 1e-6)


@over_aggregators(settings=False)
def test_one_sick_replica_is_known_and_assigns_nothing(case):
    (messages,) = random_messages(SMALL, world=3, steps=1)
    transport = local_transport(3)
    residuals = Residuals(transport)
    aggregator = case.aggregator(case.compressor, transport, residuals, ["a", "b"], SMALL)
    for sick in (None, 0, 1, 2):
        healthy = [tf.constant(replica != sick) for replica in range(3)]
        aggregate = aggregator.aggregate(messages, healthy, tf.constant(0))
        assert bool(aggregate.healthy) == (sick is None)
        assert all(not total.any() for total in residuals.total().values())


def test_owners_and_parts_round_with_draws_of_their_own():
    """Unless words are summed: then all draw the same, and an owner keeps what it received."""
    for compressor, differ in [(Ternary(), True), (RandomK(0.3), False)]:
        aggregator = aggregators.TwoPhaseMean(compressor, local_transport(2), None, ["a"], [70])
        step = tf.constant(3)
        seeds = [
            tuple(aggregator.codec_seed(step, replica, start=start, phase=phase).numpy())
            for start in (0, 35)
            for replica in range(2)
            for phase in ("worker", "owner")
        ]
        assert len(set(seeds)) == (8 if differ else 2)


@over_aggregators()
def test_bytes_are_those_of_the_schedule(case):
    """W = 3 workers, health words included."""
    row = case.compressor.row(sum(SMALL))
    rows = [math.ceil(n / row) for n in SMALL]
    elements = row * sum(rows)  # with each tensor padded to whole rows
    codec, layout = case.compressor, Layout(SMALL, row)
    payload = codec.bucket_words(layout)
    if case.aggregator is aggregators.AllGatherMean:
        expected = 2 * 4 * (1 + payload)
    elif case.aggregator is aggregators.PlainMean:
        expected = 2 * 2 * 4 * (sum(SMALL) + 1) // 3
    elif case.aggregator is aggregators.DenseMean:
        body = payload - codec.header_words
        half = codec.sum_dtype.size == 2
        expected = 2 * 2 * (2 * body + 1) * 2 // 3 if half else 2 * 2 * (body + 1) * 4 // 3
    elif case.aggregator is aggregators.SharedSupportMean:
        values, size = sum(map(codec.num_kept, SMALL)), codec.summand_dtype.size
        places = payload - math.ceil(values * size / 4)  # two thirds of each broadcast, on average
        expected = 2 * 4 * places // 3 + 2 * 2 * (values + 1) * size // 3
    elif case.aggregator is aggregators.IntegerMean:
        words = -(-elements // 10)  # a sum of three takes 3 bits: ten to a word
        expected = 2 * 4 * len(SMALL) + 2 * 2 * 4 * (1 + words) // 3
    else:
        chunks = [part.layout for part in layout.cut(3)]
        longest = 1 + max(map(codec.bucket_words, chunks))
        expected = 2 * 4 * longest + 2 * 4 * longest
    result = run(case, random_messages(SMALL, world=3, steps=1))
    assert result.aggregates[0].bytes_sent == expected
