"""Majority vote: signSGD's rule in NumPy, who abstains, ties, and what fits."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.aggregators.runs import local_transport, random_messages, run
from tests.catalogue import AggregatorCase
from tests.replicas import apply_gradients, assert_replicas_equal, build, compressing
from tfqcomm.aggregators import MajorityVoteMean
from tfqcomm.compressors import BlockSign
from tfqcomm.state.ledger import ledger_of
from tfqcomm.step import ExchangeOptions

BLOCK = 32  # a row of a layout: so blocks are whole wherever a chunk ends
RATE = 0.05


def signs_of_most(messages):
    """Algorithm 2 of arXiv 1802.04434, times the mean of mean magnitudes: [W, n] -> [n]."""
    padded = np.pad(np.float64(messages), [(0, 0), (0, -messages.shape[1] % BLOCK)])
    blocks = padded.reshape(len(messages), -1, BLOCK)
    entries = np.minimum(BLOCK, messages.shape[1] - BLOCK * np.arange(blocks.shape[1]))
    magnitude = (np.abs(blocks).sum(2) / entries).mean(0)
    votes = np.where(messages < 0, -1, 1).sum(0)
    return np.sign(votes) * np.repeat(magnitude, BLOCK)[: messages.shape[1]]


def vote(*messages, step=0):
    """The mean of one tensor, by as many replicas as there are messages."""
    case = AggregatorCase(MajorityVoteMean, BlockSign(block=BLOCK))
    return run(case, [[[np.float32(m)] for m in messages]] * (step + 1), error_feedback=False)


def test_hundred_steps_are_those_of_the_paper():
    shapes = [(20, 15), (70,), ()]
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=[100, 3, *shape]).astype(np.float32) for shape in shapes]
    strategy = compressing(3, BlockSign(block=BLOCK), schedule="majority_vote")
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(RATE), shapes)
    start = [v.numpy() for v in variables]
    history = apply_gradients(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables)
    for x, of_variable, found in zip(start, gradients, history, strict=True):
        steps = [signs_of_most(g.reshape(3, -1)).reshape(x.shape) for g in of_variable]
        expected = x - RATE * np.cumsum(steps, axis=0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert not ledger_of(optimizer).residuals.total()  # nobody owes anything


def test_a_step_by_hand():
    """Of three workers two outvote one that is louder than both."""
    found = vote([9.0, -9.0], [-1.0, 1.0], [-2.0, -2.0])
    np.testing.assert_array_equal(found.means[0][0], [-4, -4])
    words = 1 + 1 + 1  # health, magnitude, signs, of each chunk
    assert found.aggregates[0].bytes_sent == 2 * 2 * 4 * words


def test_who_has_nothing_to_say_abstains():
    found = vote([0.0, 0.0], [-3.0, 3.0], [0.0, 0.0])
    np.testing.assert_array_equal(found.means[0][0], [-1, 1])


def test_ties_are_tossed_anew_at_every_step_and_by_every_owner():
    g = np.ones(8192)
    found = vote(g, -g, step=2)
    tossed = [means[0] for means in found.means]
    for one in tossed:
        np.testing.assert_array_equal(np.abs(one), 1)
        assert abs(one.mean()) < 5 / np.sqrt(one.size)
        assert 0.45 < np.mean(one[:4096] == one[4096:]) < 0.55
    assert 0.45 < np.mean(tossed[0] == tossed[1]) < 0.55
    np.testing.assert_array_equal(vote(g, -g).means[0][0], tossed[0])


def test_a_number_that_is_not_finite_is_known():
    case = AggregatorCase(MajorityVoteMean, BlockSign())
    for bad in (np.nan, np.inf):
        messages = random_messages([40, 7], world=3, steps=1)
        messages[0][1][1][3] = bad
        assert not run(case, messages, error_feedback=False).aggregates[0].healthy


def test_it_sends_one_bit_each_way_whatever_the_number_of_workers():
    n = 1 << 18
    for world in (2, 5):
        transport = local_transport(world)
        aggregator = MajorityVoteMean(BlockSign(), transport, None, ["a"], [n])
        messages = [[tf.ones([n])]] * world
        found = aggregator.aggregate(messages, [tf.constant(True)] * world, tf.constant(0))
        assert found.bytes_sent == pytest.approx(2 * (world - 1) / world * n / 8, rel=0.01)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compressor": "top_k"}, "sends more than signs: take 'block_sign'.*compressor=TopK"),
        ({"compressor": "identity"}, "sends more than signs.*compressor=Identity"),
        (
            {"compressor": "block_sign", "error_feedback": True},
            "`error_feedback` must be 'auto' or False .*Received: error_feedback=True",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        ExchangeOptions(schedule="majority_vote", **options)


def test_no_feedback_is_what_auto_comes_to():
    assert not ExchangeOptions(BlockSign(), schedule="majority_vote").feedback
    assert ExchangeOptions(BlockSign(), schedule="two_phase").feedback
