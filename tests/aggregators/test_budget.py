"""How adaptive top-k spends its budget, against the formulas in NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.aggregators.budget import SWING, WINDOW, Budget
from tfqcomm.compressors import AdaptiveTopK
from tfqcomm.compressors.adaptive_top_k import RULES

N = 10_000
LEVEL = 1 / np.tan(np.pi / 2 * 0.01)  # 1% of a Cauchy distribution are beyond


def norms_of_a_training(steps: int, seed: int = 0) -> np.ndarray:
    """They fall, and scatter from batch to batch."""
    noise = np.random.default_rng(seed).lognormal(sigma=0.3, size=steps)
    return (noise / np.sqrt(1 + np.arange(steps) / 10)).astype(np.float32)


def spend(budget: Budget, norms, reached=lambda budget, step: 0.0, magnitude=1.0) -> np.ndarray:
    """K of each step; what updates it is assigned after each, as in a step that is taken."""

    @tf.function
    def step(norm, reached):
        k = budget.choose(norm, reached)
        for variable, value in budget.updates(norm, k, tf.constant(magnitude)):
            variable.assign(value)
        return k

    kept = []
    for t, norm in enumerate(norms):
        count = tf.constant(reached(budget, t), tf.float32)
        kept.append(int(step(tf.constant(norm, tf.float32), count)))
    return np.array(kept)


def by_norm(norms, n, total, p, *, contraction=1.0, norm_decay=1.0):
    """Minimises sum w_t err(k_t) under sum k_t <= K, the norms to come being predicted.

    w_t = a^(T-1-t) n_t^2 and k_t ~ w_t^p. What is left is shared out among this step and those to
    come, whose norms are the mean of the last ones, falling by rho at every step.
    """
    steps, kept = len(norms), []
    for t, norm in enumerate(norms.astype(np.float64)):
        remaining, left = total - sum(kept), steps - t
        even = remaining / left
        nbar = norms[max(0, t - WINDOW) : t].astype(np.float64).mean() if t else norm
        a, ahead = contraction, np.arange(left)
        weights = a ** (left - 1 - ahead) * (nbar * norm_decay**ahead) ** 2
        k = remaining * weights[0] ** p / (weights**p).sum() * (norm / nbar) ** (2 * p)
        k = np.clip(np.round(k), np.round(even / SWING), np.round(even * SWING))
        k = remaining if left == 1 else min(k, remaining - (left - 1))
        kept.append(int(np.clip(k, 1, n)))
    return kept


@pytest.mark.parametrize(("rule", "p"), [("norm", 1 / 2), ("norm_ef", 1 / 3)])
@pytest.mark.parametrize(
    "prediction",
    [
        {},
        {"contraction": 0.99},
        {"norm_decay": 0.99},
        {"contraction": 0.98**2, "norm_decay": 0.98},  # they cancel out
        {"contraction": 0.99, "norm_decay": 0.95},
    ],
    ids=str,
)
def test_k_is_that_of_the_formula(rule, p, prediction):
    norms = norms_of_a_training(120)
    budget = Budget(AdaptiveTopK(0.01, rule=rule, steps=120, **prediction), N)
    kept = spend(budget, norms)
    np.testing.assert_array_equal(kept, by_norm(norms, N, 12_000, p, **prediction))
    assert kept.sum() == 12_000


def test_first_steps_by_hand():
    """100 entries in 4 steps: R / left times the norm over the mean of those before.

    step  n_t   mean  R    left  k
    1     2           100  4     25
    2     4     2     75   3     25 * 2 = 50
    3     1     3     25   2     12.5 / 3 = 4.17
    4     9           21   1     all of it
    """
    budget = Budget(AdaptiveTopK("100 entries", steps=4), N)
    assert spend(budget, [2.0, 4.0, 1.0, 9.0]).tolist() == [25, 50, 4, 21]


def test_contraction_moves_the_budget_to_the_end():
    """k_t ~ a^(-t/2), here (1/2)^(-t/8)."""
    rule = AdaptiveTopK("8000 entries", steps=16, contraction=0.5**0.25)
    kept = spend(Budget(rule, N), np.ones(16))
    np.testing.assert_allclose(kept[8:] / kept[:8], 2.0, rtol=0.01)
    assert kept[0] == pytest.approx(8000 * (2 ** (1 / 8) - 1) / 3, abs=1)


def counts(scale=1.0):
    """Entries of a Cauchy distribution's half at or above the budget's threshold, once it is."""

    def reached(budget, step):
        return 0 if budget.first else N * 2 / np.pi * np.arctan(scale / float(budget.threshold))

    return reached


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("share", ["500 entries", 0.0007, 0.01, 0.6, 1.0])
def test_a_budget_for_all_steps_is_spent_to_the_last_entry(rule, share):
    for seed in range(2):
        budget = Budget(AdaptiveTopK(share, rule=rule, steps=150), N)
        norms = norms_of_a_training(150, seed)
        kept = spend(budget, norms, lambda b, t, norms=norms: counts(norms[t])(b, t))
        total = 500 if share == "500 entries" else round(share * N * 150)
        assert kept.sum() == total
        assert kept.min() >= 1 and kept.max() <= N


@pytest.mark.parametrize("rule", RULES)
def test_all_entries_are_kept_where_the_budget_allows_it(rule):
    for steps in (None, 20):
        kept = spend(Budget(AdaptiveTopK(1.0, rule=rule, steps=steps), N), norms_of_a_training(20))
        assert (kept == N).all()


@pytest.mark.parametrize("rule", RULES)
def test_without_an_end_the_budget_is_spent_on_average(rule):
    budget = Budget(AdaptiveTopK(0.01, rule=rule), N)
    norms = norms_of_a_training(3000)
    kept = spend(budget, norms, lambda b, t: counts(norms[t])(b, t), magnitude=LEVEL * norms[0])
    for thousand in np.split(kept, 3):
        assert thousand.mean() == pytest.approx(100, rel=0.05)
    assert kept.mean() == pytest.approx(100, rel=0.02)


def test_fixed_keeps_fractions_for_later():
    kept = spend(Budget(AdaptiveTopK("2.5 entries/step", rule="fixed", steps=100), N), np.ones(100))
    assert set(kept) == {2, 3} and kept.sum() == 250
    assert np.abs(np.cumsum(kept) - 2.5 * np.arange(1, 101)).max() <= 0.5


@pytest.mark.parametrize("steps", [None, 2000])
def test_threshold_finds_the_level_that_spends_the_budget(steps):
    """Starting from a level that is wrong by a factor of 3."""
    budget = Budget(AdaptiveTopK(0.01, rule="threshold", steps=steps), N)
    kept = spend(budget, np.ones(1500), counts(), magnitude=LEVEL / 3)
    assert kept[1] == pytest.approx(300 if steps is None else 600, rel=0.02)
    np.testing.assert_allclose(kept[1000:], kept[1000:].mean(), atol=5)
    assert 80 < kept[1000:].mean() < 100  # the rest of the budget
    assert float(budget.threshold) == pytest.approx(LEVEL, rel=0.25)


def test_threshold_starts_low_where_the_end_is_known():
    """At half the level; but a step keeps no more than 16 even shares, or 1% of the rest."""
    for steps, cap in [(3000, 16), (1000, 9.99), (300, 4)]:
        budget = Budget(AdaptiveTopK(0.01, rule="threshold", steps=steps), N)
        kept = spend(budget, np.ones(2), counts(), magnitude=LEVEL)
        assert kept[0] == 100 and kept[1] == pytest.approx(200, rel=0.01)
        assert spend(budget, np.ones(1), lambda b, t: N)[0] == pytest.approx(100 * cap, rel=0.01)
    endless = Budget(AdaptiveTopK(0.01, rule="threshold"), N)
    np.testing.assert_allclose(spend(endless, np.ones(2), counts(), magnitude=LEVEL), 100, atol=1)


def test_threshold_waits_for_a_gradient():
    """Zeros alone say nothing about the threshold: even shares."""
    budget = Budget(AdaptiveTopK(0.01, rule="threshold", steps=500), N)
    assert (spend(budget, np.zeros(3), magnitude=0.0) == 100).all() and bool(budget.first)
    assert spend(budget, np.ones(2), counts(), magnitude=LEVEL)[1] == pytest.approx(200, rel=0.02)
    assert not bool(budget.first)


def test_threshold_keeps_more_where_there_is_more():
    budget = Budget(AdaptiveTopK(0.01, rule="threshold", steps=400), N)
    scale = np.where(np.arange(400) % 100 < 5, 3.0, 1.0)
    kept = spend(budget, np.ones(400), lambda b, t: counts(scale[t])(b, t), magnitude=LEVEL)
    assert kept[scale == 3].mean() > 1.8 * kept[scale == 1].mean()


def test_k_stays_near_an_even_share():
    norms = np.array([1.0] * 10 + [1e6, 1e-6] + [1.0] * 88)
    kept = spend(Budget(AdaptiveTopK("100 entries/step", steps=100), N), norms)
    assert kept[10] == 400 and kept[11] == round(8600 / 89 / 4)


def test_zero_norms_are_an_even_share():
    assert (spend(Budget(AdaptiveTopK(0.01, steps=10), N), np.zeros(10)) == 100).all()


def test_state_goes_on_where_it_was():
    def budget():
        return Budget(AdaptiveTopK(0.01, steps=60, contraction=0.99), N)

    norms = norms_of_a_training(60)
    one, first, second = budget(), budget(), budget()
    expected = spend(one, norms)
    np.testing.assert_array_equal(one.kept, expected)
    spend(first, norms[:30])
    second.load_state(first.state())
    np.testing.assert_array_equal(spend(second, norms[30:]), expected[30:])
    np.testing.assert_array_equal(second.kept, expected)


def test_an_endless_history_ends(monkeypatch):
    monkeypatch.setattr("tfqcomm.aggregators.budget.HISTORY", 7)
    budget = Budget(AdaptiveTopK("50 entries/step"), N)
    kept = spend(budget, norms_of_a_training(10))
    np.testing.assert_array_equal(budget.kept, kept[-7:])


@pytest.mark.parametrize("rule", RULES)
def test_a_warm_up_keeps_more_on_top_of_the_budget(rule):
    """A quarter of its steps each: 25%, 6.25%, 1.56%, 0.39%."""
    steps, warm_up = 60, 20
    budget = Budget(AdaptiveTopK(0.001, rule=rule, steps=steps, warm_up=warm_up), N)
    kept = spend(budget, norms_of_a_training(steps), counts())
    least = np.repeat([2500, 625, 156, 39], 5)
    assert (kept[:warm_up] >= least).all()
    assert (kept[:warm_up] <= least + 1).all()  # "threshold" would have 40 anyway
    assert kept[warm_up:].sum() == 0.001 * N * (steps - warm_up)


@pytest.mark.parametrize("warm_up", [-1, 2.5, True])
def test_warm_up_must_be_a_number_of_steps(warm_up):
    with pytest.raises(ValueError, match="`warm_up` must be a non-negative integer. Received"):
        AdaptiveTopK(0.001, warm_up=warm_up)
