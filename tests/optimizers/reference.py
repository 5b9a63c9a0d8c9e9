"""The papers' algorithms in NumPy, float64, for one tensor. Knows nothing of our code."""

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


def log_grid(x: np.ndarray, k: int) -> np.ndarray:
    """Q_g of arXiv 2004.14180: the nearest of 0, ±2^-k, ..., ±1/2, ±1 to x / max|x|, times it."""
    scale = np.abs(x).max()
    levels = np.array([0.0, *(2.0**-j for j in range(k, -1, -1))])
    ratio = np.abs(x) / scale if scale else np.zeros_like(x)
    nearest = levels[np.abs(ratio[..., None] - levels).argmin(-1)]
    return np.sign(x) * nearest * scale


def uniform_grid(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the 2^bits - 1 equidistant levels in ±max|x|."""
    scale = np.abs(x).max()
    steps = 2 ** (bits - 1) - 1
    return np.round(x / scale * steps) / steps * scale if scale else x


def scaled_threshold(x: np.ndarray) -> np.ndarray:
    """Zero up to 0.7 mean|x|; beyond it the sign times the mean of what is kept."""
    kept = np.abs(x) > 0.7 * np.abs(x).mean()
    return np.sign(x) * kept * (np.abs(x)[kept].mean() if kept.any() else 0.0)


class CompAMSReference:
    """All workers and the server of COMP-AMS: arXiv 2205.05632, Algorithm 2.

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


class QAdamReference:
    """All workers and the server of Quantized Adam: arXiv 2004.14180, Algorithm 1.

    As in the paper the step size is inside the message, and the residual is rescaled when it
    changes. The first gradient is taken at `x`, unquantized.

    Args:
        x: where to start.
        workers: how many.
        compress: Q_g.
        quantize: Q_x.
    """

    def __init__(
        self,
        x: np.ndarray,
        workers: int,
        compress: Callable[[np.ndarray], np.ndarray],
        quantize: Callable[[np.ndarray], np.ndarray] = identity,
        *,
        beta_1: float = 0.9,
        beta_2: float | str = 0.999,
        epsilon: float = 1e-8,
    ):
        self.x = x.astype(np.float64)
        self.compress, self.quantize = compress, quantize
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.m, self.e = np.zeros([2, workers, *x.shape])
        self.v = np.full([workers, *x.shape], epsilon)
        self.t, self.alpha = 0, None
        self.sent = np.zeros(x.shape)  # sum of mean alpha m / sqrt v

    def step(self, gradients: np.ndarray, alpha: float) -> np.ndarray:
        """One iteration, given each worker's gradient [workers, ...]; returns Q_x(x)."""
        self.t += 1
        theta = 1 - 1 / self.t if self.beta_2 == "1-1/t" else self.beta_2
        self.e *= alpha / self.alpha if self.alpha else 1.0
        self.alpha = alpha
        deltas = []
        for i, g in enumerate(gradients.astype(np.float64)):
            self.v[i] = theta * self.v[i] + (1 - theta) * g**2
            self.m[i] = self.beta_1 * self.m[i] + (1 - self.beta_1) * g
            update = alpha * self.m[i] / np.sqrt(self.v[i])
            u = update + self.e[i]
            deltas.append(self.compress(u))
            self.e[i] = u - deltas[-1]
            self.sent += update / len(gradients)
        self.x = self.x - np.mean(deltas, axis=0)
        return self.quantize(self.x)


class OneBitAdamReference:
    """All workers and the server of 1-bit Adam: arXiv 2102.02888, Algorithm 1.

    Without the second compression. Moments are Adam's, and lose their bias where they are used:
    in each step of the warm-up, and once and for all at its end.

    Args:
        x: where to start.
        workers: how many, n.
        compress: C.
        warm_up: steps of it, T_w; or "auto".
    """

    def __init__(self, x, workers, compress, *, warm_up, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
        self.x, self.compress, self.warm_up = x.astype(np.float64), compress, warm_up
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.m, self.v = np.zeros([2, *x.shape])
        self.delta = np.zeros([workers, *x.shape])
        self.t, self.norms = 0, {}

    def step(self, gradients, gamma):
        """One iteration, given each worker's gradient [workers, ...]; returns the new x."""
        if self.warm_up == "auto" and self.has_settled():
            self.warm_up = self.t
        self.t += 1
        compressing = self.warm_up != "auto" and self.t > self.warm_up
        m, v = (self.compressed if compressing else self.adam)(gradients.astype(np.float64))
        self.x = self.x - gamma * m / np.sqrt(v + self.epsilon)
        return self.x

    def adam(self, gradients):
        g = gradients.mean(axis=0)
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * g
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * g**2
        m, v = self.m / (1 - self.beta_1**self.t), self.v / (1 - self.beta_2**self.t)
        self.norms[self.t] = np.abs(v).sum()
        if self.t == self.warm_up or self.warm_up == "auto":
            self.at_switch = m, v
        return m, v

    def compressed(self, gradients):
        if self.t == self.warm_up + 1:
            self.m, self.v = self.at_switch
        sent = []
        for i, g in enumerate(gradients):
            m = self.beta_1 * self.m + (1 - self.beta_1) * g
            sent.append(self.compress(m + self.delta[i]))
            self.delta[i] = m + self.delta[i] - sent[i]
        self.m = np.mean(sent, axis=0)
        return self.m, self.v

    def has_settled(self):
        """Section 7.1, of this tensor alone, looked at every 1 / (1 - beta_2) steps."""
        period = round(1 / (1 - self.beta_2))
        before = self.norms.get(self.t - period)
        return self.t % period == 0 and before and self.norms[self.t] / before >= 0.96


class QAdagradReference:
    """All workers and the server of QCMD and QRDA Adagrad: arXiv 2208.05631.

    Args:
        x: where to start, x_1.
        compress: Q.
        l1: lambda.
        center: of QRDA; None for QCMD.
    """

    def __init__(self, x, compress, *, l1, delta=1e-2, center=None):
        self.x = x.astype(np.float64)
        self.compress, self.l1, self.delta = compress, l1, delta
        self.center = center
        self.s, self.g = np.zeros([2, *x.shape])
        self.t = 0

    def step(self, gradients: np.ndarray, eta: float) -> np.ndarray:
        """One iteration, given each worker's gradient [workers, ...]; returns the new x."""
        self.t += 1
        q = np.mean([self.compress(g) for g in gradients.astype(np.float64)], axis=0)
        self.s += q * q
        self.g += q
        h = self.delta + np.sqrt(self.s)
        if self.center is None:
            moved, threshold = self.x - eta * q / h, eta * self.l1 / h
        else:
            moved, threshold = self.center - eta * self.g / h, eta * self.t * self.l1 / h
        self.x = np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
        return self.x


class AdaptiveTopKReference:
    """All workers and the server of adaptive top-k SGD, the tensors joined: arXiv 2210.13532.

    With a momentum of the workers, that of Deep Gradient Compression: arXiv 1712.01887.

    Args:
        x: where to start, all tensors in one vector.
        workers: how many.
        budget: entries in all, K.
        steps: T.
        exponent: of the norm in k_t; 0 keeps K / T entries at every step.
        local_momentum: of the workers.
    """

    def __init__(
        self,
        x: np.ndarray,
        workers: int,
        *,
        budget: int,
        steps: int,
        exponent: float = 0.0,
        error_feedback: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        local_momentum: float = 0.0,
    ):
        self.x = x.astype(np.float64)
        self.e, self.u = np.zeros([2, workers, x.size])
        self.velocity = np.zeros(x.size)
        self.left, self.steps_left = budget, steps
        self.exponent, self.error_feedback = exponent, error_feedback
        self.momentum, self.nesterov = momentum, nesterov
        self.local_momentum = local_momentum
        self.norms, self.kept = [], []

    def step(self, gradients: np.ndarray, learning_rate: float) -> np.ndarray:
        """One iteration, given each worker's gradient [workers, n]; returns the new x."""
        self.u = self.local_momentum * self.u + gradients
        targets = self.u + self.e
        k = self.choose(np.linalg.norm(targets, axis=1).mean())
        messages = np.zeros_like(targets)
        for i, p in enumerate(targets):
            largest = np.argsort(-np.abs(p), kind="stable")[:k]
            messages[i, largest] = p[largest]
            self.u[i, largest] = 0
        if self.error_feedback:
            self.e = targets - messages
        moved = -learning_rate * messages.mean(axis=0)
        self.velocity = self.momentum * self.velocity + moved
        self.x += self.momentum * self.velocity + moved if self.nesterov else self.velocity
        return self.x

    def choose(self, norm: float) -> int:
        """k_t = R (n_t / nbar)^exponent / (T - t), within a factor of 4 of an even share."""
        nbar = np.mean(self.norms[-50:]) if self.norms else norm
        even = self.left / self.steps_left
        k = np.round(even * (norm / nbar) ** self.exponent)
        k = int(np.clip(k, np.round(even / 4), np.round(even * 4)))
        k = max(1, min(k, self.left - (self.steps_left - 1), self.x.size))
        if self.steps_left == 1:
            k = self.left
        self.norms.append(norm)
        self.kept.append(k)
        self.left, self.steps_left = self.left - k, self.steps_left - 1
        return k
