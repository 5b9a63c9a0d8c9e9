"""Shares of entries by a Keras schedule: what is kept, saved, and refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import schedules

from tests.aggregators.runs import random_messages
from tests.aggregators.test_adaptive_mean import SIZES, TOTAL, run
from tests.catalogue import elias_fano
from tests.replicas import apply_gradients, build, compressing, random_gradients
from tfqcomm import compressors
from tfqcomm.aggregators.budget import Budget
from tfqcomm.compressors import AdaptiveTopK, TopK
from tfqcomm.optimizers import AdaptiveTopKSGD
from tfqcomm.state.ledger import ledger_of

DECAY = schedules.ExponentialDecay(0.5, decay_steps=10, decay_rate=0.25)


def test_it_keeps_what_the_schedule_says_and_sends_no_more():
    steps = 30
    messages = random_messages(SIZES, 2, steps)
    means, kept, _, sent = run(AdaptiveTopK(DECAY, rule="fixed"), messages)
    expected = [round(0.5 * 0.25 ** (t / 10) * TOTAL) for t in range(steps)]
    np.testing.assert_array_equal(kept, expected)
    facts = 2 * 4 * 3 // 2  # the all-reduce of three floats
    assert sent == [4 * (elias_fano(k, TOTAL) + k) + facts for k in expected]
    owed = np.zeros([2, TOTAL])
    for step, of_replicas in enumerate(messages):
        target = owed + [np.concatenate(vectors) for vectors in of_replicas]
        least = -np.sort(-np.abs(target), axis=1)[:, expected[step] - 1, None]
        decoded = np.where(np.abs(target) >= least, target, 0)
        owed = target - decoded
        np.testing.assert_allclose(means[step], decoded.mean(0), rtol=1e-4, atol=1e-5)


def test_it_follows_the_exchanges_within_one_graph_and_a_backup():
    strategy = compressing(2, AdaptiveTopK(DECAY, rule="fixed"))
    optimizer, variables = build(strategy, lambda: keras.optimizers.SGD(0.1), [(30, 20)])
    apply_gradients(strategy, optimizer, variables, random_gradients(12, 2, [(30, 20)]))
    budget = ledger_of(optimizer).kept["budget"]
    np.testing.assert_array_equal(budget.kept, np.round(300 * 0.25 ** (np.arange(12) / 10)))
    again = Budget(AdaptiveTopK(DECAY, rule="fixed"), 600)
    again.load_state(budget.state())
    assert int(again.choose(tf.constant(1.0), tf.constant(0.0))) == round(300 * 0.25**1.2)


def test_at_least_one_entry_is_kept_and_at_most_all():
    beyond = schedules.PolynomialDecay(1.0, decay_steps=2, end_learning_rate=-1.0)
    _, kept, *_ = run(AdaptiveTopK(beyond, rule="fixed"), random_messages((10,), 2, 4))
    np.testing.assert_array_equal(kept, [10, 1, 1, 1])


@pytest.mark.parametrize(
    "again",
    [
        lambda codec: compressors.deserialize(compressors.serialize(codec)),
        lambda codec: compressors.AdaptiveTopK.from_config(codec.get_config()),
        lambda codec: (
            AdaptiveTopKSGD.from_config(
                AdaptiveTopKSGD(budget=DECAY, rule="fixed").get_config()
            ).options.compressor
        ),
    ],
    ids=["serialized", "config", "optimizer"],
)
def test_it_is_saved_and_equal_to_another_of_the_same_schedule(again):
    codec = AdaptiveTopK(DECAY, rule="fixed")
    assert again(codec) == codec
    assert hash(again(codec)) == hash(codec)
    other = schedules.ExponentialDecay(0.5, decay_steps=11, decay_rate=0.25)
    assert AdaptiveTopK(other, rule="fixed") != codec
    assert "ExponentialDecay(decay_rate=0.25, decay_steps=10" in str(codec)


class Unsaved(schedules.LearningRateSchedule):
    """Without a configuration."""

    def __call__(self, step):
        return 0.1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AdaptiveTopK(DECAY), "`rule` must be 'fixed' .*Received: rule='norm'"),
        (
            lambda: AdaptiveTopK(DECAY, rule="fixed", steps=10),
            "`steps` must be None where the budget is a schedule. Received: steps=10",
        ),
        (
            lambda: AdaptiveTopK(DECAY, rule="fixed", warm_up=10),
            "`warm_up` must be 0 where the budget is a schedule. Received: warm_up=10",
        ),
        (
            lambda: Budget(AdaptiveTopK(schedules.ExponentialDecay(5.0, 10, 0.5), rule="fixed"), 9),
            r"`budget\(0\)` must be a number in \(0, 1\]. Received: budget\(0\)=5.0",
        ),
        (lambda: AdaptiveTopK(Unsaved(), rule="fixed"), "`budget` must be .* can save and load"),
        (lambda: TopK(DECAY), r"`ratio` must be .* take `AdaptiveTopK\(schedule, rule='fixed'\)`"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
