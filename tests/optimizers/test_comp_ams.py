"""CompAMS against a NumPy reference written from the paper, and against three steps by hand."""

import keras
import numpy as np
import pytest

from tests.optimizers import reference
from tests.optimizers.reference import CompAMSReference
from tests.replicas import apply_gradients, build, plain, random_gradients
from tests.rungs import slow_unless
from tfqcomm.compressors import TopK
from tfqcomm.optimizers import CompAMS

SHAPES = [(12, 10), (7,), ()]
CODECS = {
    "identity": ("identity", reference.identity),
    "top_k": (TopK(0.1), reference.top_k),
    "block_sign": ("block_sign", reference.block_sign),
}


def run(world, gradients, codec="top_k", learning_rate=1e-2, **kwargs):
    """What the variables were at the start, and after each step."""

    def optimizer():
        return CompAMS(
            learning_rate,
            compressor=CODECS[codec][0],
            min_size=0,  # as the paper: biases and all
            schedule="auto" if codec == "identity" else "all_gather",  # the paper's server
            **kwargs,
        )

    strategy = plain(world)
    optimizer, variables = build(strategy, optimizer, SHAPES)
    start = [v.numpy() for v in variables]
    return start, apply_gradients(strategy, optimizer, variables, gradients)


def assert_follows(start, actual, gradients, codec="top_k", rate=lambda step: 1e-2, **kwargs):
    """Compares with the reference, step by step."""
    world = gradients[0].shape[1]
    for theta, history, of_variable in zip(start, actual, gradients, strict=True):
        expected = CompAMSReference(theta, world, CODECS[codec][1], **kwargs)
        for step, of_workers in enumerate(of_variable):
            np.testing.assert_allclose(
                history[step],
                expected.step(of_workers, rate(step)),
                rtol=0,
                atol=1e-5,
                err_msg=f"shape {theta.shape} diverged from the reference at step {step}",
            )


@pytest.mark.parametrize("world", slow_unless(lambda world: world == 3, [1, 2, 3]))
@pytest.mark.parametrize("codec", ["top_k", "block_sign"])
@pytest.mark.parametrize("epsilon_inside", [True, False])
def test_hundred_steps_are_those_of_the_paper(world, codec, epsilon_inside):
    gradients = random_gradients(100, world, SHAPES)
    options = {"epsilon": 1e-4, "beta_1": 0.8, "beta_2": 0.99, "epsilon_inside": epsilon_inside}
    start, actual = run(world, gradients, codec, **options)
    assert_follows(start, actual, gradients, codec, **options)


def test_defaults_are_those_of_the_paper():
    gradients = [1e-4 * g for g in random_gradients(5, 1, SHAPES)]  # small enough for epsilon
    start, actual = run(1, gradients)
    assert_follows(start, actual, gradients)


def test_three_steps_by_hand():
    """Of four entries two are sent; learning rate 1, beta_1 = 1/2, beta_2 = 3/4.

    step  g              g + e          sent          m                    vhat
    1     4  1 -2 0.5    4  1 -2 0.5    4  0 -2 0     2    0  -1    0       4     0  1  0
    2     0  1 -1 1      0  2 -1 1.5    0  2  0 1.5   1    1  -0.5  0.75    4     1  1  0.5625
    3    -6  0  0 0     -6  0 -1 0     -6  0 -1 0    -2.5  .5 -0.75 0.375  11.25  1  1  0.5625
    """
    optimizer, (variable,) = build(
        plain(),
        lambda: CompAMS(1.0, 0.5, 0.75, 1e-12, compressor=TopK(0.5), min_size=0),
        [(4,)],
    )
    variable.assign([10.0, 10.0, 10.0, 10.0])
    gradients = np.array([[[4, 1, -2, 0.5]], [[0, 1, -1, 1]], [[-6, 0, 0, 0]]], "float32")
    (history,) = apply_gradients(plain(), optimizer, [variable], [gradients])
    expected = [
        [9.0, 10.0, 11.0, 10.0],  # m / sqrt(vhat) = 1, 0, -1, 0
        [8.5, 9.0, 11.5, 9.0],  # 0.5, 1, -0.5, 1
        [9.2453560, 8.5, 12.25, 8.5],  # -0.7453560, 0.5, -0.75, 0.5
    ]
    np.testing.assert_allclose(history, expected, atol=2e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_learning_rate_schedule(world):
    gradients = random_gradients(6, world, SHAPES)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [1e-1, 1e-2, 1e-3])
    start, actual = run(world, gradients, learning_rate=schedule)
    rates = [1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3]
    assert_follows(start, actual, gradients, rate=lambda step: rates[step])


@pytest.mark.parametrize("world", [1, 2])
def test_weight_decay_is_decoupled(world):
    """Before the step the variable shrinks by learning rate times decay."""
    gradients = random_gradients(5, world, SHAPES)
    start, actual = run(world, gradients, weight_decay=0.3)
    for theta, history, of_variable in zip(start, actual, gradients, strict=True):
        expected = CompAMSReference(theta, world, reference.top_k)
        for step, of_workers in enumerate(of_variable):
            expected.theta = expected.theta * (1 - 0.3 * 1e-2)
            right = expected.step(of_workers, 1e-2)
            np.testing.assert_allclose(history[step], right, atol=1e-5, err_msg=f"step {step}")


def clip_by_norm(gradients, limit):
    norms = [np.sqrt(np.square(g).sum()) for g in gradients]
    return [g * min(1, limit / norm) for g, norm in zip(gradients, norms, strict=True)]


def clip_by_value(gradients, limit):
    return [np.clip(g, -limit, limit) for g in gradients]


def clip_by_global_norm(gradients, limit):
    norm = np.sqrt(sum(np.square(g).sum() for g in gradients))
    return [g * min(1, limit / norm) for g in gradients]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("argument", "clip"),
    [
        ("clipnorm", clip_by_norm),
        ("clipvalue", clip_by_value),
        ("global_clipnorm", clip_by_global_norm),
    ],
)
def test_clipping_acts_on_the_local_gradients(world, argument, clip):
    """Each replica clips what Keras gives it, which is its gradient over the number of replicas."""
    gradients = random_gradients(5, world, SHAPES)
    start, actual = run(world, gradients, **{argument: 0.5})
    clipped = [g.copy() for g in gradients]
    for step in range(5):
        for rank in range(world):
            local = clip([g[step, rank] / world for g in gradients], 0.5)
            for of_variable, value in zip(clipped, local, strict=True):
                of_variable[step, rank] = value * world
    assert not np.allclose(clipped[0], gradients[0])
    assert_follows(start, actual, clipped)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_identity_equals_one_worker_on_all_the_data(world):
    gradients = random_gradients(50, world, SHAPES)
    _, actual = run(world, gradients, "identity")
    together = [g.mean(axis=1, keepdims=True) for g in gradients]
    _, expected = run(1, together, "identity")
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_accumulated_gradients_without_a_strategy():
    """Two batches make one step with their mean, and one that is skipped takes both along."""
    gradients = random_gradients(6, 1, SHAPES)
    halves = [g.reshape([3, 2, 1, *g.shape[2:]]) for g in gradients]
    start, actual = run(1, gradients, gradient_accumulation_steps=2)
    each_second = [history[1::2] for history in actual]
    assert_follows(start, each_second, [h.mean(axis=1) for h in halves])

    gradients[0][3] = np.nan
    _, skipping = run(1, gradients, gradient_accumulation_steps=2)
    np.testing.assert_array_equal(skipping[0][1], skipping[0][3])
    kept = [h[[0, 2]].mean(axis=1) for h in halves]
    assert_follows(start, [history[[1, 5]] for history in skipping], kept)
