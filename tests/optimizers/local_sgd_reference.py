"""Leader SGD, EASGD and periodic averaging in NumPy, from the papers. Knows nothing of our code.

All of a worker's parameters are one vector; `x` is [workers, d] in float64.
"""

from __future__ import annotations

import numpy as np


class LocalReference:
    """Every worker's own SGD with momentum, as Keras defines it; then what a subclass pulls.

    Args:
        x: where the workers start, [workers, d].
    """

    def __init__(self, x, *, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.x = np.array(x, np.float64)
        self.v = np.zeros_like(self.x)
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.t = 0

    def step(self, gradients, losses, learning_rate):
        """One step of all workers, given gradients [workers, d] and losses [workers]."""
        self.t += 1
        g = gradients.astype(np.float64)
        self.x = self.x - learning_rate * self.weight_decay * self.x
        self.v = self.momentum * self.v - learning_rate * g
        self.x = self.x + (self.momentum * self.v - learning_rate * g if self.nesterov else self.v)
        self.pull(losses)
        return self.x


class LeaderReference(LocalReference):
    """arXiv 1905.10395, Algorithm 1 with its mixing weights; `n` groups of `l` workers."""

    def __init__(self, x, *, lam, lam_g, tau, tau_g, groups=1, window=10, **kwargs):
        super().__init__(x, **kwargs)
        self.lam, self.lam_g, self.tau, self.tau_g = lam, lam_g, tau, tau_g
        self.groups, self.window = groups, window
        self.seen = []
        self.leaders = []  # of all workers, one for each global pull

    def pull(self, losses):
        self.seen = [*self.seen, losses][-self.window :]
        mean = np.mean(self.seen, axis=0)
        workers = len(self.x)
        before = self.x.copy()
        if self.groups > 1 and self.t % self.tau == 0:
            members = workers // self.groups
            for start in range(0, workers, members):
                z = before[start + np.argmin(mean[start : start + members])]
                group = slice(start, start + members)
                self.x[group] -= self.lam * (before[group] - z)
        if self.t % self.tau_g == 0:
            leader = np.argmin(mean)
            self.leaders.append(leader)
            self.x -= self.lam_g * (before - before[leader])


class ElasticReference(LocalReference):
    """EASGD, arXiv 1412.6651, equations 5 and 6: x -= a (x - c), c += sum a (x - c)."""

    def __init__(self, x, *, alpha, tau, **kwargs):
        super().__init__(x, **kwargs)
        self.c = np.mean(self.x, axis=0)
        self.alpha, self.tau = alpha, tau

    def pull(self, losses):
        if self.t % self.tau == 0:
            difference = self.alpha * (self.x - self.c)
            self.x = self.x - difference
            self.c = self.c + difference.sum(axis=0)


class AverageReference(LocalReference):
    """Local SGD, arXiv 1805.09767, Algorithm 1."""

    def __init__(self, x, *, tau, **kwargs):
        super().__init__(x, **kwargs)
        self.tau = tau

    def pull(self, losses):
        if self.t % self.tau == 0:
            self.x[:] = self.x.mean(axis=0)
