"""COMP-AMS in NumPy, from the paper: arXiv 2205.05632, Algorithm 2. Knows nothing of our code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def identity(x: np.ndarray) -> np.ndarray:
    return x


def top_k(x: np.ndarray) -> np.ndarray:
    """Definition 2, keeping a tenth."""
    k = max(1, round(0.1 * x.size))
    kept = np.argsort(-np.abs(x.ravel()), kind="stable")[:k]
    result = np.zeros(x.size)
    result[kept] = x.ravel()[kept]
    return result.reshape(x.shape)


def block_sign(x: np.ndarray) -> np.ndarray:
    """Definition 3, the tensor being the block."""
    return np.sign(x) * np.abs(x).mean()


class CompAMSReference:
    """All workers and the server, for one tensor, in float64.

    Args:
        theta: where to start.
        workers: how many, n in the paper.
        compress: C in the paper.
    """

    def __init__(
        self,
        theta: np.ndarray,
        workers: int,
        compress: Callable[[np.ndarray], np.ndarray],
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        epsilon_inside: bool = True,
    ):
        self.theta = theta.astype(np.float64)
        self.compress = compress
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.epsilon, self.epsilon_inside = epsilon, epsilon_inside
        self.e = np.zeros([workers, *theta.shape])
        self.m, self.v, self.vhat = (np.zeros(theta.shape) for _ in range(3))

    def step(self, gradients: np.ndarray, learning_rate: float) -> np.ndarray:
        """One iteration, given each worker's gradient [workers, ...]; returns the new theta."""
        messages = []
        for i, g in enumerate(gradients.astype(np.float64)):
            messages.append(self.compress(g + self.e[i]))
            self.e[i] = self.e[i] + g - messages[i]
        g = np.mean(messages, axis=0)
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * g
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * g**2
        self.vhat = np.maximum(self.vhat, self.v)
        if self.epsilon_inside:
            root = np.sqrt(self.vhat + self.epsilon)
        else:
            root = np.sqrt(self.vhat) + self.epsilon
        self.theta = self.theta - learning_rate * self.m / root
        return self.theta
