"""DiLoCo in NumPy, from the papers. Knows nothing of our code.

All of a worker's parameters are one vector; `x` is [workers, d] in float64.
"""

from __future__ import annotations

import numpy as np


class DiLoCoReference:
    """arXiv 2311.08105, Algorithm 1, with Adam inside and Nesterov SGD (PyTorch's) outside.

    Args:
        x: where the workers start, [workers, d]; all alike.
        sizes: of what is exchanged by itself, a variable or a part of one, in order.
        turns: for each of these the step modulo H at which it is exchanged.
        codec: one worker's message of one of them -> what the others decode; None sends it as it
            is. What it leaves out is part of the next message (error feedback).
    """

    def __init__(self, x, *, every, sizes, turns, rate=0.7, momentum=0.9, codec=None):
        self.x = np.array(x, np.float64)
        self.m, self.v = np.zeros_like(self.x), np.zeros_like(self.x)
        self.theta = self.x[0].copy()
        self.buffer = np.zeros_like(self.theta)
        self.residual = np.zeros_like(self.x)
        self.every, self.turns, self.rate, self.momentum = every, turns, rate, momentum
        self.codec = codec or (lambda message: message)
        ends = np.cumsum(sizes)
        self.parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.t = 0

    def step(self, gradients, losses, learning_rate):
        """One step of all workers, given gradients [workers, d]."""
        self.t += 1
        self.adam(gradients.astype(np.float64), learning_rate)
        for part, turn in zip(self.parts, self.turns, strict=True):
            if self.t % self.every == turn:
                self.exchange(part)
        return self.x

    def adam(self, g, rate, beta_1=0.875, beta_2=0.9375, epsilon=1e-7):
        """As Keras has it: epsilon beside the root of the second moment that is still biased."""
        self.m = beta_1 * self.m + (1 - beta_1) * g
        self.v = beta_2 * self.v + (1 - beta_2) * g * g
        corrected = rate * np.sqrt(1 - beta_2**self.t) / (1 - beta_1**self.t)
        self.x = self.x - corrected * self.m / (np.sqrt(self.v) + epsilon)

    def exchange(self, part):
        message = self.theta[part] - self.x[:, part] + self.residual[:, part]
        decoded = np.array([self.codec(one) for one in message])
        self.residual[:, part] = message - decoded
        delta = decoded.mean(axis=0)
        self.buffer[part] = self.momentum * self.buffer[part] + delta
        self.theta[part] -= self.rate * (delta + self.momentum * self.buffer[part])
        self.x[:, part] = self.theta[part]


def keep_largest(ratio):
    """Top-k of a vector, at least one entry."""

    def codec(message):
        kept = np.argsort(-np.abs(message))[: max(1, round(ratio * len(message)))]
        decoded = np.zeros_like(message)
        decoded[kept] = message[kept]
        return decoded

    return codec
