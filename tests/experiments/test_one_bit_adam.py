"""1-bit Adam against a NumPy reference written from the paper, and by hand."""

import keras
import numpy as np
import pytest

from experiments.one_bit_adam import OneBitAdam, adam_moments
from tests.optimizers import reference
from tests.replicas import (
    apply_gradients,
    assert_replicas_equal,
    build,
    compressing,
    plain,
    random_gradients,
)

SHAPES = [(12, 10), (7,), ()]


class Reference:
    """All workers and the server in the second stage of 1-bit Adam: arXiv 2102.02888.

    Algorithm 1, lines 6 to 12, without the second compression.
    """

    def __init__(self, x, m, v, workers, compress, *, beta_1=0.9, epsilon=1e-8):
        self.x, self.m, self.v = (a.astype(np.float64) for a in (x, m, v))
        self.compress, self.beta_1, self.epsilon = compress, beta_1, epsilon
        self.delta = np.zeros([workers, *x.shape])

    def step(self, gradients, learning_rate):
        """One iteration, given each worker's gradient [workers, ...]; returns the new x."""
        sent = []
        for i, g in enumerate(gradients.astype(np.float64)):
            m = self.beta_1 * self.m + (1 - self.beta_1) * g
            sent.append(self.compress(m + self.delta[i]))
            self.delta[i] = m + self.delta[i] - sent[i]
        self.m = np.mean(sent, axis=0)
        self.x = self.x - learning_rate * self.m / np.sqrt(self.v + self.epsilon)
        return self.x


def moments(shapes=SHAPES):
    rng = np.random.default_rng(5)
    m = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return m, [np.square(rng.normal(size=shape)).astype(np.float32) + 0.1 for shape in shapes]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_fifty_steps_are_those_of_the_paper(world, error_feedback):
    m, v = moments()
    strategy, gradients = plain(world), random_gradients(50, world, SHAPES)
    optimizer, variables = build(
        strategy,
        lambda: OneBitAdam(1e-2, m, v, beta_1=0.8, error_feedback=error_feedback),
        SHAPES,
    )
    start = [variable.numpy() for variable in variables]
    actual = apply_gradients(strategy, optimizer, variables, gradients)
    for i, history in enumerate(actual):
        expected = Reference(start[i], m[i], v[i], world, reference.block_sign, beta_1=0.8)
        for step, of_workers in enumerate(gradients[i]):
            if not error_feedback:
                expected.delta[:] = 0
            np.testing.assert_allclose(
                history[step],
                expected.step(of_workers, 1e-2),
                atol=2e-5,
                err_msg=f"shape {start[i].shape} diverged from the reference at step {step}",
            )
        np.testing.assert_allclose(optimizer.m[i], expected.m, atol=1e-5)
        np.testing.assert_array_equal(optimizer.v[i], v[i])  # frozen
    assert_replicas_equal(strategy, variables + optimizer.variables)


def test_two_steps_by_hand():
    """Two workers, beta_1 = 1/2, learning rate 1, v = (4, 1), m = (4, 0) at first.

    step  g_1    g_2     m/2 + g/2      with residuals  sent           m       x
    1     4  2   0  -4   4 1 | 2 -2     4 1 | 2 -2      2.5 2.5|2 -2   2.25 .25   -1.125 -.25
    2     0  0   0   0   1.125 .125, both; with residuals 1.5 -1.5 and 0 0:
                         2.625 -1.375 -> 2 -2  |  1.125 .125 -> .625 .625
                         m = 1.3125 -.6875;  x = -1.78125  .4375
    """
    strategy = plain(2)
    optimizer, (variable,) = build(
        strategy,
        lambda: OneBitAdam(1.0, [np.float32([4, 0])], [np.float32([4, 1])], beta_1=0.5),
        [(2,)],
    )
    variable.assign([0.0, 0.0])
    gradients = np.array([[[4, 2], [0, -4]], [[0, 0], [0, 0]]], "float32")
    (history,) = apply_gradients(strategy, optimizer, [variable], [gradients])
    np.testing.assert_allclose(history, [[-1.125, -0.25], [-1.78125, 0.4375]], rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_moments_are_those_of_adam_without_bias(world):
    gradients = random_gradients(7, world, SHAPES)
    strategy = compressing(world, "identity")
    adam, variables = build(strategy, lambda: keras.optimizers.Adam(beta_2=0.99), SHAPES)
    apply_gradients(strategy, adam, variables, gradients)
    found = adam_moments(adam)
    for i, of_variable in enumerate(gradients):
        m = v = np.zeros(SHAPES[i])
        for g in of_variable.astype(np.float64).mean(axis=1):
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        np.testing.assert_allclose(found[0][i], m / (1 - 0.9**7), atol=1e-6)
        np.testing.assert_allclose(found[1][i], v / (1 - 0.99**7), atol=1e-6)


def test_a_bad_gradient_changes_nothing():
    m, v = moments()
    strategy, gradients = plain(2), random_gradients(3, 2, SHAPES)
    gradients[1][1, 1, 0] = np.nan
    optimizer, variables = build(strategy, lambda: OneBitAdam(1e-2, m, v), SHAPES)
    actual = apply_gradients(strategy, optimizer, variables, gradients)
    for history in actual:
        np.testing.assert_array_equal(history[0], history[1])
        assert (history[2] != history[1]).any()
    assert all(np.isfinite(slot).all() for slot in optimizer.m)
