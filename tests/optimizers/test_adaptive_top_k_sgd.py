"""AdaptiveTopKSGD against a NumPy reference of all of it, dense SGD, and three steps by hand."""

import keras
import numpy as np
import pytest

from tests.catalogue import elias_fano
from tests.optimizers.reference import AdaptiveTopKReference
from tests.replicas import apply_gradients, assert_replicas_equal, build, plain, random_gradients
from tfqcomm.optimizers import AdaptiveTopKSGD
from tfqcomm.state.ledger import ledger_of

SHAPES = [(12, 10), (7,), ()]
N = 128  # elements in all
RATE = 0.05
EXPONENTS = {"fixed": 0.0, "norm": 1.0, "norm_ef": 2 / 3}


def gradients_of(steps, world, seed=1):
    """Their norms change from step to step."""
    scale = np.random.default_rng(seed + 1).lognormal(sigma=0.5, size=steps).astype("float32")
    gradients = random_gradients(steps, world, SHAPES, seed)
    return [g * scale.reshape([-1] + [1] * (g.ndim - 1)) for g in gradients]


def joined(tensors, axes=0):
    """All tensors in one vector, behind the first `axes` axes: [..., n]."""
    return np.concatenate([np.reshape(t, [*np.shape(t)[:axes], -1]) for t in tensors], axis=axes)


def run(world, gradients, **kwargs):
    """Start, the variables after each step [steps, n], and the optimizer."""

    def optimizer():
        return AdaptiveTopKSGD(**{"learning_rate": RATE, "min_size": 0, **kwargs})

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    start = joined([v.numpy() for v in variables])
    history = apply_gradients(strategy, optimizer, variables, gradients)
    return start, joined(history, 1), optimizer


def assert_follows(start, history, optimizer, gradients, **kwargs):
    """Compares with the reference, step by step, and the numbers of entries kept."""
    _, world, _ = (of_steps := joined(gradients, 2)).shape
    expected = AdaptiveTopKReference(start, world, **kwargs)
    for step, of_workers in enumerate(of_steps.astype(np.float64)):
        np.testing.assert_allclose(
            history[step],
            expected.step(of_workers, RATE),
            rtol=0,
            atol=2e-5,
            err_msg=f"diverged from the reference at step {step}",
        )
    np.testing.assert_array_equal(optimizer.history, expected.kept)


MOMENTUM = {
    "none": {},
    "heavy ball": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    ("rule", "momentum"),
    [("fixed", "heavy ball"), ("norm", "heavy ball"), ("norm", "nesterov"), ("norm_ef", "none")],
)
def test_hundred_steps_are_those_of_the_reference(world, rule, momentum):
    gradients, options = gradients_of(100, world), MOMENTUM[momentum]
    result = run(world, gradients, budget=0.1, rule=rule, total_steps=100, **options)
    budget = {"budget": 1280, "steps": 100, "exponent": EXPONENTS[rule]}
    assert_follows(*result, gradients, **budget, **options)
    assert len(set(result[-1].history)) > (1 if rule == "fixed" else 10)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rule"), [(1, "norm"), (2, "fixed"), (3, "norm")])
def test_momentum_correction_forgets_what_was_sent(world, rule):
    gradients = gradients_of(100, world)
    options = {"rule": rule, "total_steps": 100, "momentum_correction": True}
    result = run(world, gradients, budget=0.1, momentum=0.9, **options)
    budget = {"budget": 1280, "steps": 100, "exponent": EXPONENTS[rule]}
    assert_follows(*result, gradients, local_momentum=0.9, **budget)
    state = ledger_of(result[-1]).worker_state
    momenta = joined([state.variable(0, "momentum", str(i), s, 0.0) for i, s in enumerate(SHAPES)])
    assert (momenta == 0).sum() == result[-1].history[-1]


@pytest.mark.slow
def test_without_error_feedback_the_rest_is_lost():
    gradients = gradients_of(50, 2)
    result = run(2, gradients, budget=0.1, total_steps=50, error_feedback=False)
    options = {"budget": 640, "steps": 50, "exponent": 1.0}
    assert_follows(*result, gradients, **options, error_feedback=False)
    assert ledger_of(result[-1]).residuals.total() == {}


BY_HAND = np.array([[[4, -1, 0]], [[2, 2, 1]], [[0, -1, 2]]], "float32")


def by_hand(**kwargs):
    optimizer, (variable,) = build(
        plain(), lambda: AdaptiveTopKSGD(1.0, min_size=0, rule="fixed", **kwargs), [(3,)]
    )
    variable.assign([10.0, 10.0, 10.0])
    (history,) = apply_gradients(plain(), optimizer, [variable], [BY_HAND])
    return history, optimizer


def test_three_steps_by_hand():
    """Rate 1; 4 entries for 3 steps: one, one (1.5 is rounded to even: two), and the last.

    step  g           g + e       k   sent        e           velocity        x
    1     4 -1  0     4 -1  0     1   4  0  0     0 -1  0     -4   0   0      6  10  10
    2     2  2  1     2  1  1     2   2  1  0     0  0  1     -4  -1   0      2   9  10
    3     0 -1  2     0 -1  3     1   0  0  3     0 -1  0     -2  -.5 -3      0  8.5  7
    """
    history, optimizer = by_hand(momentum=0.5, budget="4 entries", total_steps=3)
    np.testing.assert_array_equal(history, [[6, 10, 10], [2, 9, 10], [0, 8.5, 7]])
    assert optimizer.history.tolist() == [1, 2, 1]
    np.testing.assert_array_equal(ledger_of(optimizer).residuals.total()["0"], [0, -1, 0])


def test_three_steps_of_momentum_correction_by_hand():
    """Rate 1, momentum 1/2, one entry at every step.

    step  g           u             u + e          sent        e            u kept      x
    1     4 -1  0     4  -1    0    4  -1     0    4  0  0     0 -1   0     0 -1  0      6   10  10
    2     2  2  1     2   1.5  1    2   0.5   1    2  0  0     0 .5   1     0 1.5 1      4   10  10
    3     0 -1  2     0 -.25 2.5    0   .25 3.5    0  0 3.5    0 .25  0     0 -.25 0     4   10  6.5
    """
    history, optimizer = by_hand(
        momentum=0.5, momentum_correction=True, budget="3 entries", total_steps=3
    )
    np.testing.assert_array_equal(history, [[6, 10, 10], [4, 10, 10], [4, 10, 6.5]])
    np.testing.assert_array_equal(ledger_of(optimizer).residuals.total()["0"], [0, 0.25, 0])
    state = ledger_of(optimizer).worker_state
    np.testing.assert_array_equal(state.mean()["momentum/0"], [0, -0.25, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "momentum"),
    [("fixed", "none"), ("norm", "heavy ball"), ("norm_ef", "nesterov"), ("threshold", "none")],
)
def test_with_all_entries_it_is_dense_sgd_to_the_bit(rule, momentum):
    gradients, options = gradients_of(30, 2), MOMENTUM[momentum]
    _, history, optimizer = run(2, gradients, budget=1.0, rule=rule, **options)
    assert set(optimizer.history) == {N}

    strategy = plain(2)
    dense, variables = build(strategy, lambda: keras.optimizers.SGD(RATE, **options), SHAPES)
    expected = apply_gradients(strategy, dense, variables, gradients)
    np.testing.assert_array_equal(history, joined(expected, 1))


def test_replicas_stay_equal():
    world, gradients = 3, gradients_of(20, 3)

    def optimizer():
        return AdaptiveTopKSGD(RATE, 0.9, budget=0.1, rule="threshold", min_size=0)

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    apply_gradients(strategy, optimizer, variables, gradients)
    assert_replicas_equal(strategy, variables)


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_follow_k(world):
    """Each message goes to all others: positions in Elias-Fano form, and a float for each."""
    *_, optimizer = run(world, gradients_of(40, world), budget=0.1, rule="norm", total_steps=40)
    payload = np.array([4 * (elias_fano(k, N) + k) for k in optimizer.history.tolist()])
    facts = 2 * (world - 1) * 3 * 4 // world  # a ring all-reduce of three floats
    sent = ledger_of(optimizer).meter.read().bytes_sent
    assert sent == ((world - 1) * payload + facts).sum()


def test_history_is_empty_before_the_first_step_and_ends_with_the_last():
    optimizer = AdaptiveTopKSGD(budget=0.1)
    assert optimizer.history.shape == (0,)
    *_, optimizer = run(1, gradients_of(7, 1), budget=0.1, rule="fixed")
    assert optimizer.history.tolist() == [13] * 7


def test_small_tensors_are_no_part_of_the_budget():
    *_, optimizer = run(1, gradients_of(5, 1), budget=1.0, min_size=100)
    assert set(optimizer.history) == {120}


def test_a_step_that_is_not_finite_spends_nothing():
    gradients = gradients_of(10, 2)
    gradients[0][4, 1, 3, 3] = np.nan
    _, history, optimizer = run(2, gradients, budget=0.1, rule="norm", total_steps=9)
    np.testing.assert_array_equal(history[4], history[3])
    assert len(optimizer.history) == 9
    assert optimizer.history.sum() == round(0.1 * N * 9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"momentum": 1.0}, r"`momentum` must be a float in \[0, 1\). Received: momentum=1.0"),
        ({"budget": 0}, r"`budget` must be a share .* Received: budget=0"),
        ({"budget": "5 bananas"}, r"`budget` must be .*entries/step.* Received: budget='5 ban"),
        ({"budget": "1e6 entries"}, r"`steps` must be given with a budget in total. Received: "),
        ({"rule": "best"}, r"`rule` must be one of .*norm_ef.* Received: rule='best'"),
        ({"total_steps": 0}, r"`steps` must be .* Received: steps=0"),
        ({"contraction": 0.9}, r"`steps` must be given with `contraction`. Received: contract"),
        (
            {"norm_decay": 1.1, "total_steps": 5},
            r"`norm_decay` must be a number in \(0, 1\]. Received: norm_decay=1.1",
        ),
        (
            {"momentum_correction": True, "nesterov": True},
            r"`momentum_correction` needs `error_feedback=True` and `nesterov=False`. Received: ",
        ),
        ({"momentum_correction": True, "error_feedback": False}, "error_feedback=False"),
    ],
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        AdaptiveTopKSGD(**arguments)


def test_configuration_round_trips():
    optimizer = AdaptiveTopKSGD(
        0.1, 0.9, budget="1e6 entries", rule="norm_ef", total_steps=10, contraction=0.99
    )
    again = AdaptiveTopKSGD.from_config(optimizer.get_config())
    assert again.options == optimizer.options
    assert again.get_config() == optimizer.get_config()
