"""PowerSGD in NumPy, written from the paper (arXiv 1905.13727), and ACP-SGD (arXiv 2306.08881).

Letters are the papers': M an update as a matrix, P and Q its factors, e a worker's memory. Float64.
"""

from __future__ import annotations

import numpy as np


def orthogonalize(columns):
    """Gram-Schmidt."""
    found = []
    for column in columns.T:
        for earlier in found:
            column = column - (earlier @ column) * earlier
        found.append(column / np.linalg.norm(column))
    return np.stack(found, axis=1)


class PowerSGD:
    """Algorithm 1 with the memory of Algorithm 2, of one matrix.

    Args:
        q: of the first step, [m, r].
        world: workers, W.
    """

    def __init__(self, q, world):
        self.q = np.float64(q)
        self.e = [0.0] * world

    def step(self, gradients):
        """The update of all workers, from the gradient of each: [n, m]."""
        deltas = [np.float64(g) + e for g, e in zip(gradients, self.e, strict=True)]
        update = self.compress_and_aggregate(deltas)
        self.e = [delta - update for delta in deltas]
        return update

    def compress_and_aggregate(self, matrices):
        """P = mean of M Q, orthogonalized; Q = mean of M^T P; P Q^T."""
        p = orthogonalize(np.mean([m @ self.q for m in matrices], axis=0))
        self.q = np.mean([m.T @ p for m in matrices], axis=0)
        return p @ self.q.T


class AlternatePowerSGD(PowerSGD):
    """P in one step and Q in the next; what is kept is orthogonalized before it is used."""

    def __init__(self, q, world):
        super().__init__(q, world)
        self.p = None
        self.sends_p = True

    def compress_and_aggregate(self, matrices):
        if self.sends_p:
            self.q = orthogonalize(self.q)
            self.p = np.mean([m @ self.q for m in matrices], axis=0)
        else:
            self.p = orthogonalize(self.p)
            self.q = np.mean([m.T @ self.p for m in matrices], axis=0)
        self.sends_p = not self.sends_p
        return self.p @ self.q.T
