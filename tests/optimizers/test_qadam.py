"""QAdam against a NumPy reference written from the paper, and against three steps by hand."""

import functools

import keras
import numpy as np
import pytest

from tests.optimizers import reference
from tests.optimizers.reference import QAdamReference
from tests.replicas import apply_gradients, build, copies, plain, random_gradients
from tests.rungs import slow_unless
from tfqcomm.compressors import LogGrid, TopK, UniformGrid
from tfqcomm.optimizers import QAdam
from tfqcomm.state.ledger import ledger_of

SHAPES = [(12, 10), (7,), ()]
CODECS = {
    "identity": ("identity", reference.identity),
    "top_k": (TopK(0.1), reference.top_k),
    "log_grid": (LogGrid(2), functools.partial(reference.log_grid, k=2)),
}
WEIGHTS = {
    "float32": (None, reference.identity),
    "8 bits": (UniformGrid(8), functools.partial(reference.uniform_grid, bits=8)),
}


def run(world, gradients, codec="log_grid", weights="float32", learning_rate=1e-2, **kwargs):
    """Start, what the variables held after each step, the optimizer and the variables."""

    def optimizer():
        return QAdam(
            learning_rate,
            compressor=CODECS[codec][0],
            weight_compressor=WEIGHTS[weights][0],
            min_size=0,  # as the paper: biases and all
            schedule="auto" if codec == "identity" else "all_gather",  # the paper's server
            **kwargs,
        )

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    start = [v.numpy() for v in variables]
    history = apply_gradients(strategy, optimizer, variables, gradients)
    return start, history, optimizer, variables


def assert_follows(start, actual, gradients, codec="log_grid", weights="float32", **kwargs):
    """Compares with the reference, step by step."""
    rate = kwargs.pop("rate", lambda step: 1e-2)
    references = []
    for x, history, of_variable in zip(start, actual, gradients, strict=True):
        world = of_variable.shape[1]
        expected = QAdamReference(x, world, CODECS[codec][1], WEIGHTS[weights][1], **kwargs)
        for step, of_workers in enumerate(of_variable):
            np.testing.assert_allclose(
                history[step],
                expected.step(of_workers, rate(step)),
                rtol=0,
                atol=2e-5,
                err_msg=f"shape {x.shape} diverged from the reference at step {step}",
            )
        references.append(expected)
    return references


@pytest.mark.parametrize("world", slow_unless(lambda world: world == 3, [1, 2, 3]))
@pytest.mark.parametrize(
    ("codec", "beta_2"),
    # With "1-1/t" all messages of the first step have one magnitude: no top-k is the right one.
    [("top_k", 0.99), ("log_grid", 0.99), ("log_grid", "1-1/t")],
)
def test_hundred_steps_are_those_of_the_paper(world, codec, beta_2):
    # With this seed no entry comes so close to the middle between two levels that rounding to
    # float32 decides.
    gradients = random_gradients(100, world, SHAPES, seed=11)
    options = {"epsilon": 1e-4, "beta_1": 0.8, "beta_2": beta_2}
    start, actual, *_ = run(world, gradients, codec, **options)
    assert_follows(start, actual, gradients, codec, **options)


@pytest.mark.parametrize("world", [1, 2])
def test_weights_are_quantized_and_the_server_keeps_the_rest(world):
    gradients = random_gradients(60, world, SHAPES)
    start, actual, optimizer, variables = run(world, gradients, weights="8 bits")
    references = assert_follows(start, actual, gradients, weights="8 bits")
    for value, expected in zip(optimizer.float_weights(variables), references, strict=True):
        np.testing.assert_allclose(value, expected.x, rtol=0, atol=2e-5)
    assert len(np.unique(actual[0][-1])) < 120 == actual[0][-1].size


def test_weights_that_are_small_or_vectors_stay_float32():
    optimizer, variables = build(
        plain(), lambda: QAdam(weight_compressor="uniform_grid", min_size=100), SHAPES
    )
    apply_gradients(plain(), optimizer, variables, random_gradients(3, 1, SHAPES))
    kernel, *others = zip(optimizer.float_weights(variables), variables, strict=True)
    assert not np.array_equal(kernel[0], kernel[1].numpy())
    for exact, variable in others:
        np.testing.assert_array_equal(exact, variable.numpy())


def test_defaults_are_those_of_the_paper():
    gradients = [1e-4 * g for g in random_gradients(5, 1, SHAPES)]  # small enough for epsilon
    start, actual, *_ = run(1, gradients)
    assert_follows(start, actual, gradients)


def test_three_steps_by_hand():
    """Levels 0 and ±1, rate 1, beta_1 = 0, beta_2 = 0: a message is the sign of the gradient.

    step  g         sign + e      s    sent        e            x
    1     4  -1     1    -1       1    1 -1        0    0       9    11
    2     2   0     1     0       1    1  0        0    0       8    11
    3    -5   3    -1     1       1   -1  1        0    0       9    10
    """
    optimizer, (variable,) = build(
        plain(), lambda: QAdam(1.0, 0.0, 0.0, 1e-8, compressor=LogGrid(0), min_size=0), [(2,)]
    )
    variable.assign([10.0, 10.0])
    gradients = np.array([[[4, -1]], [[2, 0]], [[-5, 3]]], "float32")
    (history,) = apply_gradients(plain(), optimizer, [variable], [gradients])
    np.testing.assert_allclose(history, [[9, 11], [8, 11], [9, 10]], atol=1e-6)


def test_residual_by_hand():
    """Levels 0 and ±1, beta_1 = 1/2, beta_2 = 0: m / |g|, and what rounding leaves out of it.

    step  g       m           m / |g|       + e          sent         e           x
    1     2  2    1    1      0.5   0.5     0.5   0.5    0.5   0.5    0    0      -0.5   -0.5
    2     1 -9    1   -4      1    -4/9     1    -4/9    1     0      0   -4/9    -1.5   -0.5
    3     4  4    2.5  0      5/8   0       5/8  -4/9    5/8  -5/8    0   13/72   -2.125  0.125
    """
    optimizer, (variable,) = build(
        plain(), lambda: QAdam(1.0, 0.5, 0.0, compressor=LogGrid(0), min_size=0), [(2,)]
    )
    variable.assign([0.0, 0.0])
    gradients = np.array([[[2, 2]], [[1, -9]], [[4, 4]]], "float32")
    (history,) = apply_gradients(plain(), optimizer, [variable], [gradients])
    expected = [[-0.5, -0.5], [-1.5, -0.5], [-2.125, 0.125]]
    np.testing.assert_allclose(history, expected, atol=1e-6)
    np.testing.assert_allclose(
        ledger_of(optimizer).residuals.total()["0"], [0.0, 13 / 72], atol=1e-6
    )


@pytest.mark.parametrize("world", [1, 2])
def test_learning_rate_schedule_rescales_the_residual(world):
    gradients = random_gradients(6, world, SHAPES)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [1e-1, 1e-2, 1e-3])
    start, actual, *_ = run(world, gradients, learning_rate=schedule)
    rates = [1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3]
    assert_follows(start, actual, gradients, rate=lambda step: rates[step])


@pytest.mark.parametrize("world", [2, 3])
def test_nothing_is_lost(world):
    """x_1 - x_{t+1} + mean e = sum of mean alpha m / sqrt v: every update arrives or is owed."""
    gradients = random_gradients(40, world, SHAPES)
    start, actual, optimizer, _ = run(world, gradients)
    owed = ledger_of(optimizer).residuals.total()
    references = assert_follows(start, actual, gradients)
    for index, (x, history, expected) in enumerate(zip(start, actual, references, strict=True)):
        arrived = x - history[-1] + 1e-2 * owed[str(index)].reshape(x.shape)
        np.testing.assert_allclose(arrived, expected.sent, atol=2e-5)


@pytest.mark.slow
def test_identity_is_the_mean_of_local_adams():
    """And not Adam of the mean gradient."""
    world = 3
    gradients = random_gradients(20, world, SHAPES)
    start, actual, *_ = run(world, gradients, "identity")
    alone = [run(1, [g[:, [i]] for g in gradients], "identity") for i in range(world)]
    for variable, x in enumerate(start):
        moved = np.mean([a[1][variable][-1] - x for a in alone], axis=0)
        np.testing.assert_allclose(actual[variable][-1] - x, moved, atol=1e-5)
    together = run(1, [g.mean(axis=1, keepdims=True) for g in gradients], "identity")
    assert not np.allclose(together[1][0][-1], actual[0][-1], atol=1e-3)


def test_two_phase_quantizes_the_mean_with_feedback_of_its_own():
    """Efficient-Adam: both residuals together make up for all that is missing."""
    world, gradients = 2, random_gradients(40, 2, SHAPES)

    def optimizer():
        return QAdam(1e-2, compressor=LogGrid(1), min_size=0, schedule="two_phase")

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    start = [v.numpy() for v in variables]
    history = apply_gradients(strategy, optimizer, variables, gradients)
    owed = ledger_of(optimizer).residuals.total()
    for index, x in enumerate(start):
        expected = QAdamReference(x, world, reference.identity)
        for of_workers in gradients[index]:
            right = expected.step(of_workers, 1e-2)
        arrived = history[index][-1] - 1e-2 * owed[str(index)].reshape(x.shape)
        np.testing.assert_allclose(arrived, right, atol=2e-5)


def test_moments_stay_with_their_worker():
    world, gradients = 2, random_gradients(5, 2, SHAPES)
    _, _, optimizer, variables = run(world, gradients, beta_1=0.0)
    state = ledger_of(optimizer).worker_state
    for replica in range(world):
        moment = state.variable(replica, "m", "0", SHAPES[0], 0.0)
        np.testing.assert_allclose(moment, gradients[0][-1, replica], rtol=1e-5)
    assert len(copies(plain(world), optimizer.variables)[0]) == 2  # iterations, learning rate
    np.testing.assert_allclose(state.mean()["m/0"], gradients[0][-1].mean(axis=0), rtol=1e-5)


def test_first_step_is_one_step_also_where_batches_are_gathered():
    """Its "1-1/t" counted batches: of four, the first second moment was a fourth, the step 2."""
    optimizer, (variable,) = build(
        plain(),
        lambda: QAdam(
            1.0, 0.0, "1-1/t", compressor="identity", gradient_accumulation_steps=4, min_size=0
        ),
        [(2,)],
    )
    variable.assign([0.0, 0.0])
    for _ in range(4):
        optimizer.apply([np.float32([3, -5])], [variable])
    np.testing.assert_allclose(variable, [-1, 1], atol=1e-6)


def test_first_step_of_a_variable_whose_first_gradient_comes_late_is_one_step():
    """Its "1-1/t" counted the optimizer's steps: at the hundredth, the step was 10."""
    optimizer, (early, late) = build(
        plain(), lambda: QAdam(1.0, 0.0, "1-1/t", compressor="identity", min_size=0), [(2,), (2,)]
    )
    late.assign([0.0, 0.0])
    for _ in range(9):
        optimizer.apply([np.float32([1, 1])], [early])
    optimizer.apply([np.float32([3, -5])], [late])
    np.testing.assert_allclose(late, [-1, 1], atol=1e-6)


def quantizing(**options):
    grid = UniformGrid(2, range="absmax")

    def optimizer():
        exact = {"compressor": "identity", "min_size": 0}  # of messages nothing is owed
        return QAdam(0.01, 0.0, weight_compressor=grid, **exact, **options)

    return build(plain(), optimizer, [(6, 4), (5,), ()])


def test_weights_that_were_loaded_are_not_those_before_plus_a_stale_residual():
    """With 2 bits, weights that were set to 1 came out as up to 190."""
    optimizer, variables = quantizing()
    for variable in variables:
        variable.assign(variable * 100)
    gradients = random_gradients(3, 1, [(6, 4), (5,), ()])
    apply_gradients(plain(), optimizer, variables, gradients)
    left_out = optimizer.float_weights(variables)[0] - variables[0]
    assert np.abs(left_out).max() > 10
    untouched = optimizer.float_weights(variables)[0][0]
    value = np.ones([6, 4], "float32")
    value[0] = variables[0].numpy()[0]
    variables[0].assign(value)
    np.testing.assert_array_equal(optimizer.float_weights(variables)[0][1:], value[1:])
    np.testing.assert_array_equal(optimizer.float_weights(variables)[0][0], untouched)
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    apply_gradients(plain(), optimizer, variables, [np.zeros_like(g) for g in gradients])
    for variable in variables:
        np.testing.assert_allclose(variable, np.ones(variable.shape), atol=1e-6)


def test_weight_decay_acts_on_the_float_weights_not_on_the_quantized_alone():
    optimizer, variables = quantizing(weight_decay=10.0)
    apply_gradients(plain(), optimizer, variables, random_gradients(1, 1, [(6, 4), (5,), ()]))
    before = [x.numpy() for x in optimizer.float_weights(variables)]
    zeros = [np.zeros([1, 1, *v.shape], "float32") for v in variables]
    apply_gradients(plain(), optimizer, variables, zeros)
    for x, old in zip(optimizer.float_weights(variables), before, strict=True):
        np.testing.assert_allclose(x, old * (1 - 0.01 * 10.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"beta_1": 1.0}, r"`beta_1` must be a float in \[0, 1\). Received: beta_1=1.0"),
        (
            {"beta_2": "t"},
            r"`beta_2` must be a float in \[0, 1\) or \"1-1/t\". Received: beta_2='t'",
        ),
        ({"epsilon": 0.0}, r"`epsilon` must be a positive float. Received: epsilon=0.0"),
        ({"weight_compressor": "int9"}, r"`compressor` must be .* Received: compressor='int9'"),
    ],
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        QAdam(**arguments)
