"""The merge of Decoupled DiLoCo and its outer step, against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from tfqcomm.optimizers.local.global_weights import outer_step
from tfqcomm.parameter_server.diloco.merge import merged


class Reference:
    """From the paper's equations, in float64; knows nothing of our code."""

    def __init__(self, theta, rate, momentum):
        self.theta, self.buffer = np.array(theta, np.float64), np.zeros(np.shape(theta))
        self.rate, self.momentum = rate, momentum

    @staticmethod
    def phi(x):
        length = np.sqrt((x**2).sum())
        return x / length if length else x

    def merge(self, deltas, weights, embedding=False):
        total = sum(weights)
        if embedding:
            return sum(w * v for w, v in zip(weights, deltas, strict=True)) / total
        length = sum(w * np.sqrt((v**2).sum()) for w, v in zip(weights, deltas, strict=True))
        mean = sum(w * self.phi(v) for w, v in zip(weights, deltas, strict=True)) / total
        return length / total * self.phi(mean)

    def round(self, deltas, weights, embedding):
        delta = self.merge(deltas, weights, embedding)
        self.buffer = self.momentum * self.buffer + delta
        self.theta = self.theta - self.rate * (delta + self.momentum * self.buffer)
        return self.theta


@pytest.mark.parametrize("embedding", [False, True])
def test_a_hundred_rounds_equal_the_reference(embedding):
    rng = np.random.default_rng(0)
    theta = rng.normal(size=[6, 5]).astype(np.float32)
    reference = Reference(theta, rate=0.7, momentum=0.9)
    buffer = np.zeros_like(theta)
    merge = tf.function(lambda d, w: merged(tf.unstack(d), w, keep_norm=not embedding))
    for number in range(100):
        learners = theta + rng.normal(size=[4, 6, 5], scale=0.1).astype(np.float32)
        deltas = theta - learners
        examples, steps = rng.integers(16, 128, size=4), rng.integers(1, 9, size=4)
        weights = (examples**2 / steps).astype(np.float32)
        here = rng.random(4) > 0.3
        here[rng.integers(4)] = True
        if number % 10 == 0:
            deltas[0] = 0
        expected = reference.round(deltas[here].astype(np.float64), weights[here], embedding)
        deltas[~here] = np.nan  # what lies in an inbox that does not count
        delta = merge(deltas, np.where(here, weights, 0))
        theta, buffer = (x.numpy() for x in outer_step(theta, buffer, delta, 0.7, 0.9))
        np.testing.assert_allclose(theta, expected, atol=1e-4, err_msg=f"round {number}")


def test_by_hand():
    v = [tf.constant([3.0, 0.0]), tf.constant([0.0, 4.0])]
    weights = tf.constant([1.0, 3.0])
    # Lengths 3 and 4: 15 / 4 on average; directions (1, 0) and (0, 1): (1, 3) / sqrt 10.
    expected = 3.75 * np.array([1, 3]) / np.sqrt(10)
    np.testing.assert_allclose(merged(v, weights, keep_norm=True), expected, rtol=1e-6)
    np.testing.assert_allclose(merged(v, weights, keep_norm=False), [0.75, 3.0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_one_learner_is_what_it_is_whatever_its_size(scale):
    v = (np.random.default_rng(0).uniform(-1, 1, size=[40, 3]) * scale).astype(np.float32)
    found = merged([tf.constant(v)], tf.constant([7.0]), keep_norm=True)
    # At 1e-38 the smaller ones are denormal, which TensorFlow takes for zero.
    np.testing.assert_allclose(found, v, rtol=1e-5, atol=1.2e-38)


def test_orthogonal_differences_keep_their_length():
    v = np.linalg.qr(np.random.default_rng(0).normal(size=[64, 64]))[0][:16].astype(np.float32)
    weights = tf.ones([16])
    assert np.linalg.norm(merged(list(v), weights, keep_norm=True)) == pytest.approx(1, rel=1e-5)
    plain = np.linalg.norm(merged(list(v), weights, keep_norm=False))
    assert plain == pytest.approx(1 / 4, rel=1e-5)  # 1 / sqrt(16)


def test_nothing_and_opposites_are_zero():
    zeros, one = tf.zeros([3]), tf.constant([1.0, 2.0, 3.0])
    for deltas in ([zeros, zeros], [one, -one]):
        found = merged(deltas, tf.constant([1.0, 1.0]), keep_norm=True)
        np.testing.assert_array_equal(found, [0, 0, 0])
