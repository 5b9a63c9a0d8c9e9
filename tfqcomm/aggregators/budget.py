"""How many entries adaptive top-k keeps at a step, so that the budget lasts to the end.

Minimising sum_t w_t err(k_t) under sum_t k_t <= K, with w_t = a^(T-1-t) n_t^2 and n_t the mean
norm of the workers' targets, gives k_t ~ w_t^p: p = 1/2 for err = (d/k - 1), p = 1/3 for
err = 4 (1 - k/d) / (k/d)^2. Future norms are unknown, so the budget is kept by feedback: with R
entries left, mean norm nbar of the last 50 steps and q = (rho^2 / a)^p,

    k_t = R (n_t / nbar)^2p (1 - q) / (1 - q^(T-t))          q = 1:  R (n_t / nbar)^2p / (T - t)

With the measured error instead of a bound, all entries |p| >= sqrt(c / w_t) are kept (arXiv
2108.00951): there feedback moves c. Gradients are largest when training begins, and what they then
pass on is worth most. So where the end is known, c starts low and moves slowly: a constant c would
be optimal, and it is found while it spends more than an even share, but never more than 1% of what
is left at one step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.compressors.adaptive_top_k import AdaptiveTopK

WARM_UP = (0.25, 0.0625, 0.015625, 0.00390625)  # shares of a warm-up's quarters
WINDOW = 50  # steps over which norms are averaged
HORIZON = 1000  # steps over which an endless budget is balanced
HISTORY = 10_000  # steps of an endless training that `kept` remembers
SWING = 4.0  # k stays within this factor of an even share
WIDE_SWING = 16.0  # that of "threshold", in a training that is long enough for it
HEAD_START = 0.5  # of the threshold: its first value by that of an even share of the first gradient
SETTLING = 10.0  # steps to the end times the threshold's gain
_EXPONENTS = {"norm": 0.5, "norm_ef": 1 / 3}


class Budget:
    """The state behind an `AdaptiveTopK`, equal on all replicas: it follows from reduced numbers.

    Args:
        compressor: the rule and the budget.
        n: entries to choose from, d.
    """

    def __init__(self, compressor: AdaptiveTopK, n: int):
        self.compressor = compressor
        self.n = n
        self.share = compressor.entries_per_step(n)

        def variable(name, value):
            return _tf_private.local_variable(value, name=name, device="CPU:0")

        self._variables = {
            "step": variable("budget/step", np.int64(0)),
            "spent": variable("budget/spent", np.int64(0)),
            "norms": variable("budget/norms", np.zeros([WINDOW])),
            "log_threshold": variable("budget/log_threshold", np.float64(-np.inf)),
            # Whole numbers: int32 that goes through a step's branches lives in a host's memory.
            "kept": variable("budget/kept", np.zeros([compressor.steps or HISTORY])),
        }

    @property
    def kept(self) -> np.ndarray:
        """K of the steps so far (eager); of the last `HISTORY` in a training without end."""
        kept, step = self.state()["kept"], int(self._variables["step"])
        if step <= len(kept):
            return kept[:step]
        return np.roll(kept, -(step % len(kept)))

    def state(self) -> dict[str, np.ndarray]:
        """What a backup keeps."""
        state = {name: variable.numpy() for name, variable in self._variables.items()}
        return state | {"kept": state["kept"].astype(np.int32)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`; now, not in every step of a graph that is being traced."""
        with tf.init_scope():
            for name, value in state.items():
                self._variables[name].assign(tf.cast(value, self._variables[name].dtype))

    @property
    def first(self) -> tf.Tensor:
        """Whether there is no threshold yet: no step was taken, or all they kept were zeros."""
        return tf.math.is_inf(self._variables["log_threshold"])

    @property
    def threshold(self) -> tf.Tensor:
        """At or above it, entries are kept; meaningless at `first`."""
        return tf.cast(tf.exp(self._variables["log_threshold"]), tf.float32)

    def choose(self, norm: tf.Tensor, reached: tf.Tensor) -> tf.Tensor:
        """K of this step, int32 in [1, n].

        Args:
            norm: n_t, mean over the workers.
            reached: entries at or above `threshold`, mean over the workers; "threshold" only.
        """
        if self.compressor.schedule is not None:
            share = tf.cast(self.compressor.schedule.at(self._variables["step"]), tf.float64)
            return tf.cast(tf.clip_by_value(tf.round(share * self.n), 1, self.n), tf.int32)
        k = self._within_budget(norm, reached)
        return tf.where(self._warming_up, tf.maximum(k, self._of_warm_up()), k)

    @property
    def _warming_up(self):
        return self._variables["step"] < self.compressor.warm_up

    def _of_warm_up(self):
        """Entries that a step of the warm-up keeps at least."""
        stage = len(WARM_UP) * self._variables["step"] // max(self.compressor.warm_up, 1)
        kept = tf.constant([max(1, round(share * self.n)) for share in WARM_UP], tf.int32)
        return tf.gather(kept, tf.minimum(stage, len(WARM_UP) - 1))

    def _within_budget(self, norm, reached):
        remaining, left = self._remaining()
        even = remaining / left
        k = {
            "fixed": lambda: even,
            "threshold": lambda: tf.where(self.first, even, tf.cast(reached, tf.float64)),
        }.get(self.compressor.rule, lambda: self._by_norm(norm, remaining, left))()
        swing = self._swing(left)
        k = tf.clip_by_value(tf.round(k), tf.round(even / swing), tf.round(even * swing))
        k = tf.maximum(k, remaining - (left - 1) * self.n)  # more than later steps could spend
        if self.compressor.steps is not None:
            k = tf.where(left <= 1, remaining, tf.minimum(k, remaining - (left - 1)))
        return tf.cast(tf.clip_by_value(k, 1, self.n), tf.int32)

    def _swing(self, left):
        """The factor within which k stays of an even share."""
        if self.compressor.rule != "threshold" or self.compressor.steps is None:
            return SWING
        return tf.clip_by_value(left / 100, SWING, WIDE_SWING)

    def _remaining(self):
        """Entries and steps left, float64."""
        step = tf.cast(self._variables["step"], tf.float64)
        spent = tf.cast(self._variables["spent"], tf.float64)
        if self.compressor.steps is None:
            return self.share * (step + HORIZON) - spent, tf.constant(HORIZON, tf.float64)
        steps = self.compressor.steps
        return np.floor(self.share * steps + 0.5) - spent, tf.maximum(steps - step, 1)

    def _by_norm(self, norm, remaining, left):
        p = _EXPONENTS[self.compressor.rule]
        norms = self._variables["norms"]
        seen = tf.minimum(self._variables["step"], WINDOW)
        norm = tf.cast(norm, tf.float64)
        mean = tf.reduce_sum(norms) / tf.cast(tf.maximum(seen, 1), tf.float64)
        relative = tf.where((seen > 0) & (mean > 0), norm / mean, 1.0)
        q = (self.compressor.norm_decay**2 / self.compressor.contraction) ** p
        share = 1 / left if q == 1 else (1 - q) / (1 - q**left)
        return remaining * relative ** (2 * p) * share

    def updates(self, norm, k, magnitude) -> list[tuple[tf.Variable, tf.Tensor]]:
        """(variable, new value) pairs of a step that was taken.

        Args:
            norm: as in `choose`.
            k: the entries kept.
            magnitude: of the last entry kept, mean over the workers; at `first` only.
        """
        v = self._variables
        step = v["step"]
        remaining, left = self._remaining()
        even = tf.maximum(remaining / left, 1)
        counted = tf.cast(k, tf.float64)
        counted = tf.where(self._warming_up, tf.minimum(counted, tf.round(even)), counted)
        surplus = tf.math.log(counted / even)
        drift = np.log(self.compressor.contraction) / 2  # of 1 / sqrt(w_t)
        moved = v["log_threshold"] + drift + self._gain(left) * tf.clip_by_value(surplus, -2.0, 2.0)
        begun = tf.math.log(tf.cast(magnitude, tf.float64))
        if self.compressor.steps is not None:
            begun += np.log(HEAD_START)
        index = tf.cast(step % v["kept"].shape[0], tf.int32)
        kept = tf.cast([k], tf.float64)
        return [
            (v["kept"], tf.tensor_scatter_nd_update(v["kept"], [[index]], kept)),
            (v["norms"], self._with_norm(tf.cast(norm, tf.float64))),
            (v["log_threshold"], tf.where(self.first, begun, moved)),
            (v["spent"], v["spent"] + tf.cast(counted, tf.int64)),
            (v["step"], step + 1),
        ]

    def _gain(self, left):
        """Of the threshold's feedback: slow, but it has to have its effect before the end."""
        if self.compressor.steps is None:
            return 0.05
        return tf.clip_by_value(SETTLING / left, 0.01, 0.2)

    def _with_norm(self, norm):
        index = tf.cast(self._variables["step"] % WINDOW, tf.int32)
        return tf.tensor_scatter_nd_update(self._variables["norms"], [[index]], [norm])
