"""SGD that keeps more gradient entries in steps that matter more, under a budget."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import checks
from tfqcomm.aggregators.budget import Budget
from tfqcomm.compressors import AdaptiveTopK
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.optimizers.shared_arguments import register
from tfqcomm.state.ledger import ledger_of


def corrected_message(gradient, state, *, momentum):
    """The worker's half with momentum correction (arXiv 1712.01887, equation 5).

    Args:
        gradient: the worker's own, `g_i`.
        state: "momentum", `u_i`, of the gradient's shape.

    Returns:
        The message before compression, and the new state.
    """
    u = momentum * state["momentum"] + gradient
    return u, {"momentum": u}


def masked_momentum(state, left_out):
    """Factor masking (arXiv 1712.01887, equation 7): what was sent is forgotten.

    Args:
        state: of `corrected_message`.
        left_out: the residual, zero where the entry was sent.

    Returns:
        The state to keep.
    """
    u = state["momentum"]
    return {"momentum": tf.where(tf.equal(left_out, 0), tf.zeros_like(u), u)}


def adaptive_top_k_sgd_update(gradient, velocity, learning_rate, *, momentum, nesterov):
    """The server's half: heavy-ball or Nesterov momentum, as `keras.optimizers.SGD` has it.

    Args:
        gradient: mean message, `g`.
        velocity: of the gradient's shape.

    Returns:
        What to add to the variable, and the new velocity.
    """
    v = momentum * velocity - learning_rate * gradient
    return (momentum * v - learning_rate * gradient if nesterov else v), v


@register
class AdaptiveTopKSGD(CompressedOptimizer):
    """SGD on top-k gradients, k chosen at every step under a communication budget.

    Use it where the total to be sent is limited, or to see how much a smaller k would cost. On
    worker i, and then everywhere:

        p_i = g_i + e_i;  k_t = rule(mean |p_i|, what is left of the budget)
        message_i = the k_t largest entries of p_i;  e_i = p_i - message_i
        g = mean message_i
        velocity = momentum velocity - learning_rate g;  variable += velocity

    With `momentum_correction` the momentum is that of Deep Gradient Compression: each worker has
    its own, u_i = momentum u_i + g_i, sends u_i instead of g_i, and forgets it where it was sent
    (factor masking), so that the direction is not a stale one by the time an entry is sent.

    Args:
        learning_rate: float or learning-rate schedule.
        momentum: in [0, 1).
        nesterov: look ahead, as Keras' SGD does; not with `momentum_correction`.
        budget: share of entries kept on average, in (0, 1]; or "500 entries/step",
            "20000 bytes/step", "1e6 entries", "100 Mbit"; or a Keras schedule of the share: see
            `AdaptiveTopK`.
        rule: "norm", "norm_ef", "threshold" or "fixed": see `AdaptiveTopK`.
        total_steps: of the whole training; with it the budget is spent exactly, and steps beyond
            it keep one entry each. Needed for budgets in total.
        contraction, norm_decay: see `AdaptiveTopK`.
        warm_up_steps: at the beginning, in which more is kept, as in Deep Gradient Compression:
            see `AdaptiveTopK`.
        momentum_correction: as above; needs error feedback.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: it minimises an upper bound whose constants are known; here the
    budget is kept by feedback, and three more rules are offered. Small and rank <= 1 tensors are no
    part of the budget unless `min_size=0`.

    Example:
    >>> AdaptiveTopKSGD(0.1, budget="500 entries/step", rule="threshold").options.compressor.rule
    'threshold'

    References:
        Ruan et al.: Adaptive Top-K in SGD for Communication-Efficient Distributed Learning,
        GLOBECOM 2023, https://arxiv.org/abs/2210.13532
        Lin et al.: Deep Gradient Compression, ICLR 2018, https://arxiv.org/abs/1712.01887
    """

    decides = frozenset({"compressor", "schedule", "granularity", "warm_up", "seed"})

    def __init__(
        self,
        learning_rate=0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        *,
        budget: float | str | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        rule: str = "norm",
        total_steps: int | None = None,
        contraction: float = 1.0,
        norm_decay: float = 1.0,
        warm_up_steps: int = 0,
        momentum_correction: bool = False,
        name: str = "adaptive_top_k_sgd",
        **options,
    ):
        self._refuse_unknown(options)
        checks.fraction("momentum", momentum)
        compressor = AdaptiveTopK(
            budget,
            rule=rule,
            steps=total_steps,
            contraction=contraction,
            norm_decay=norm_decay,
            warm_up=warm_up_steps,
        )
        super().__init__(
            learning_rate,
            compressor=compressor,
            name=name,
            **options,
        )
        if momentum_correction and (nesterov or not self.options.feedback):
            raise ValueError(
                "Argument `momentum_correction` needs `error_feedback=True` and `nesterov=False`. "
                f"Received: error_feedback={self.options.error_feedback}, nesterov={nesterov}"
            )
        self.momentum = momentum
        self.nesterov = nesterov
        self.momentum_correction = momentum_correction
        if momentum_correction:
            self.worker_slots = {"momentum": 0.0}

    @property
    def history(self) -> np.ndarray:
        """Entries kept at each step so far, k_t; the last 10,000 without `total_steps`."""
        ledger = ledger_of(self)
        budget = ledger.kept.get("budget") if ledger else None
        return budget.kept if isinstance(budget, Budget) else np.zeros([0], np.int32)

    def worker_step(self, gradient, state, iteration):
        """Momentum correction: the worker's momentum is sent."""
        return corrected_message(gradient, state, momentum=self.momentum)

    def worker_sent(self, state, left_out):
        """Factor masking: what was sent is forgotten."""
        return masked_momentum(state, left_out)

    def build(self, variables):
        """Creates the velocity of each variable."""
        if self.built:
            return
        super().build(variables)
        self._velocities = None
        if self.momentum and not self.momentum_correction:
            self._velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        """The server's half, for one variable: `gradient` is the mean message."""
        gradient = tf.convert_to_tensor(gradient)
        rate = tf.cast(learning_rate, variable.dtype)
        if self._velocities is None:
            self.assign_sub(variable, rate * gradient)
            return
        slot = self._velocities[self.index_of(variable)]
        step, velocity = adaptive_top_k_sgd_update(
            gradient,
            tf.convert_to_tensor(slot),
            rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )
        self.assign(slot, velocity)
        self.assign_add(variable, step)

    def get_config(self):
        """Serializable arguments."""
        compressor = self.options.compressor
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "budget": compressor.get_config()["budget"],
            "rule": compressor.rule,
            "total_steps": compressor.steps,
            "contraction": compressor.contraction,
            "norm_decay": compressor.norm_decay,
            "warm_up_steps": compressor.warm_up,
            "momentum_correction": self.momentum_correction,
        }
