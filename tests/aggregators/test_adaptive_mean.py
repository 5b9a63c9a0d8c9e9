"""Adaptive top-k among replicas: one k for all, over all tensors together, under the budget."""

import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.processes import run_processes
from tests.aggregators.runs import local_transport, random_messages
from tests.catalogue import elias_fano
from tfqcomm.aggregators import AdaptiveMean
from tfqcomm.aggregators.budget import Budget
from tfqcomm.compressors import AdaptiveTopK
from tfqcomm.state.residuals import Residuals

SIZES = (31, 0, 70, 1)
TOTAL = sum(SIZES)
STEPS = 6


def run(compressor, messages, transport=None, *, error_feedback=True, sick=None):
    """Means of all steps, k of all steps, residuals, bytes of all steps."""
    transport = transport or local_transport(len(messages[0]))
    residuals = Residuals(transport)
    sizes = [len(vector) for vector in messages[0][0]]
    budget = Budget(compressor, sum(sizes))
    aggregator = AdaptiveMean(
        compressor,
        transport,
        residuals if error_feedback else None,
        [f"tensor{t}" for t in range(len(sizes))],
        sizes,
        budget=budget,
    )
    means, sent = [], []
    for step, of_replicas in enumerate(messages):
        local = [of_replicas[rank] for rank in transport.ranks]
        healthy = [tf.constant((step, rank) != sick) for rank in transport.ranks]
        aggregate = aggregator.aggregate(local, healthy, tf.constant(step))
        assert bool(aggregate.healthy) == (sick is None or sick[0] != step)
        if aggregate.healthy:
            for variable, value in aggregate.updates:
                variable.assign(value)
            means.append(np.concatenate([mean.numpy() for mean in aggregate.means]))
        sent.append(int(aggregate.bytes_sent))
    return means, budget.kept, residuals, sent


def largest(x, k):
    kept = np.argsort(-np.abs(x), kind="stable")[:k]
    return np.where(np.isin(np.arange(len(x)), kept), x, np.float32(0))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rule", ["fixed", "norm", "norm_ef", "threshold"])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_mean_is_that_of_a_numpy_loop(world, rule, error_feedback):
    messages = random_messages(SIZES, world, STEPS)
    compressor = AdaptiveTopK(0.2, rule=rule, steps=STEPS)
    means, kept, residuals, _ = run(compressor, messages, error_feedback=error_feedback)
    owed = np.zeros([world, TOTAL], np.float32)
    for step, of_replicas in enumerate(messages):
        decoded = []
        for rank, vectors in enumerate(of_replicas):
            target = np.concatenate(vectors) + owed[rank]
            decoded.append(largest(target, kept[step]))
            if error_feedback:
                owed[rank] = target - decoded[-1]
        np.testing.assert_allclose(means[step], np.mean(decoded, axis=0), rtol=1e-6)
    total = residuals.total()
    if error_feedback:
        found = np.concatenate([total[f"tensor{t}"] for t in range(len(SIZES))])
        np.testing.assert_allclose(found, owed.mean(axis=0), rtol=1e-5)
    else:
        assert total == {}
    assert kept.sum() == round(0.2 * TOTAL * STEPS)


@pytest.mark.parametrize("rule", ["norm", "threshold"])
def test_all_processes_choose_the_same_and_that_of_one_process(rule):
    messages = random_messages(SIZES, 4, STEPS)
    compressor = AdaptiveTopK(0.2, rule=rule, steps=STEPS)

    def one_process(transport):
        means, kept, *_ = run(compressor, messages, transport)
        return means, kept

    (first, second), one = run_processes(2, 2, one_process), run(compressor, messages)
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], one[1])
    np.testing.assert_allclose(first[0], one[0], rtol=1e-6)


def test_the_payload_follows_k():
    """Counted from the wire's definition: positions in Elias-Fano form, four bytes of value."""
    messages = [
        [[np.float32(scale) * v for v in vectors] for vectors in of_replicas]
        for scale, of_replicas in zip([1, 1, 3, 0.3, 1], random_messages((200,), 2, 5), strict=True)
    ]
    _, kept, _, sent = run(AdaptiveTopK(0.1, rule="norm"), messages, error_feedback=False)
    assert kept[2] > 1.5 * kept[1] > 3 * kept[3]
    facts = 2 * 4 * 3 // 2  # the all-reduce of three floats
    assert sent == [4 * (elias_fano(k, 200) + k) + facts for k in kept.tolist()]


def test_keeping_everything_is_the_dense_mean_to_the_bit():
    messages = random_messages((31, 70), 2, 3)
    means, kept, *_ = run(AdaptiveTopK(1.0, rule="fixed", steps=3), messages)
    assert (kept == 101).all()
    for mean, (one, two) in zip(means, messages, strict=True):
        expected = (np.concatenate(one) + np.concatenate(two)) * np.float32(0.5)
        np.testing.assert_array_equal(mean, expected)


def test_a_sick_step_spends_nothing():
    messages = random_messages(SIZES, 2, STEPS)
    messages[2][1][0][3] = np.nan
    compressor = AdaptiveTopK(0.2, rule="norm", steps=STEPS - 1)
    means, kept, *_ = run(compressor, messages, sick=(2, 1))
    well = messages[:2] + messages[3:]
    expected, right, *_ = run(compressor, well)
    np.testing.assert_array_equal(kept, right)
    np.testing.assert_array_equal(means, expected)


def test_all_zeros_are_sent_without_complaint():
    zeros = [[[np.zeros(n, np.float32) for n in SIZES]] * 2] * 3
    for rule in ("norm", "threshold"):
        means, kept, *_ = run(AdaptiveTopK(0.2, rule=rule, steps=3), zeros)
        assert not np.any(means)
        assert kept.sum() == round(0.2 * TOTAL * 3)
