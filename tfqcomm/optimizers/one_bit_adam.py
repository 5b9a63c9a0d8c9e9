"""1-bit Adam: Adam until its second moment has settled, then a momentum that travels in bits."""

from __future__ import annotations

import math

import tensorflow as tf
from absl import logging

from tfqcomm import _tf_private, checks
from tfqcomm.kernels import numerics
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.optimizers.shared_arguments import register

_SETTLED = 0.96  # |v_t| / |v_{t - delta}| from which on v is settled: the authors' threshold


def unbiased_share(beta: float, t: tf.Tensor) -> tf.Tensor:
    """Share of the t-th gradient, t from 1 on, in a mean with decay `beta` that has no bias.

    m_t / (1 - beta^t), Adam's moment without the bias of its first steps, is itself a moving mean:
    the newest gradient's share in it is (1 - beta) / (1 - beta^t), from 1 at first to 1 - beta.
    """
    t = tf.cast(t, tf.float32)
    return (1 - beta) / -tf.math.expm1(t * (math.log(beta) if beta else -math.inf))


def warm_up_moments(gradient, state, *, beta_1, beta_2):
    """Adam's moments in the warm-up (arXiv 2102.02888, equation 1), without bias at any step.

    Args:
        gradient: mean of all workers', `g`.
        state: (`m`, `v`) of the gradient's shape, and `t`, the steps of this variable so far.

    Returns:
        The new state.
    """
    g, (m, v, t) = numerics.squarable(gradient), state
    t = t + 1
    share_1, share_2 = (tf.cast(unbiased_share(beta, t), g.dtype) for beta in (beta_1, beta_2))
    m = (1 - share_1) * m + share_1 * g  # first moment
    v = (1 - share_2) * v + share_2 * g * g  # second moment
    return m, v, t


@register
class OneBitAdam(CompressedOptimizer):
    """Adam with v frozen after a warm-up, whose workers then send the momentum in one bit an entry.

    Use it for long trainings that do well with Adam: past the warm-up a step sends what SGD with
    momentum would, 1 bit an entry with `BlockSign`. First, dense, with g the mean gradient:

        m = beta_1 m + (1 - beta_1) g;  v = beta_2 v + (1 - beta_2) g^2
        variable -= learning_rate * mhat / sqrt(vhat + epsilon);  mhat, vhat: without bias

    Then, with vhat as it is and m = mhat at first, on worker i and then everywhere:

        message_i = C(beta_1 m + (1 - beta_1) g_i + e_i);  e_i = what C left out
        m = mean message_i
        variable -= learning_rate * m / sqrt(vhat + epsilon)

    All replicas switch at the same step, without a new trace; the log says so once. A `fit` that
    ends within the warm-up has compressed nothing, and logs a warning.

    Entries that had no gradient in the warm-up have v = 0, and move by m / sqrt(epsilon): if there
    are some, such as rare rows of an embedding, choose a longer warm-up or a larger `epsilon`.

    Args:
        learning_rate: float or learning-rate schedule, `gamma` in the paper. If it rises at first,
            that should be over within the warm-up.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        epsilon: positive; inside the root it keeps steps below `learning_rate * m / 1e-4`.
        warm_up: number of steps, `T_w` in the paper; or "auto": until v has settled, which is
            when |v_t| >= 0.96 |v_{t - delta}|, sums over all variables, delta = 1 / (1 - beta_2).
            It is looked at every delta steps, so that is at 2 delta steps at the earliest: 2,000.
        compressor: of the momentum: a `tfqcomm.compressors.Compressor`, its name or its config;
            the paper's is `BlockSign()`.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: moments are kept without bias, or v frozen after 120 steps would be
    0.11 of itself, and "auto" would see v grow; epsilon stands inside the root: beside it 1e-8
    diverges where entries had next to no gradient in the warm-up. Small and rank <= 1 tensors are
    not compressed unless `min_size=0`; the paper's are `schedule="two_phase"` and
    `granularity="model"`. Gradients of embeddings are made dense, in the warm-up, too. A step in
    which any worker's gradient is not finite is skipped by all.

    Example:
    >>> optimizer = OneBitAdam(1e-3, warm_up=500)
    >>> optimizer.options.compressor
    BlockSign(block=None)

    References:
        Tang et al.: 1-bit Adam: Communication Efficient Large-Scale Training with Adam's
        Convergence Speed, ICML 2021, https://arxiv.org/abs/2102.02888, Algorithm 1, Section 7.1
    """

    decides = frozenset({"warm_up"})
    reads_server = True
    warms_up = True

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        *,
        warm_up: int | str = "auto",
        compressor="block_sign",
        name: str = "one_bit_adam",
        **options,
    ):
        checks.fraction("beta_1", beta_1)
        checks.fraction("beta_2", beta_2)
        checks.positive("epsilon", epsilon)
        _check_warm_up(warm_up)
        super().__init__(
            learning_rate,
            compressor=compressor,
            name=name,
            **options,
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.warm_up = warm_up
        self._warned = False

    def build(self, variables):
        """Creates the moments `m` and `v` of each variable, and what tells when to switch."""
        if self.built:
            return
        super().build(variables)
        self._moments, self._velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )
        # A variable whose first gradient comes late has a bias of its own.
        self._steps = [
            self.add_variable((), dtype="int64", name=f"{v.name}_warm_up_steps") for v in variables
        ]
        if self.warm_up == "auto":
            self._settled_at = self.add_variable((), dtype="int64", name="settled_at")  # 0: not yet
            self._norm = self.add_variable((), dtype="float64", name="velocity_norm")

    @property
    def switched_after(self) -> int | None:
        """Steps of the warm-up, once it is over; None before (eager)."""
        if not self.built or not bool(self.compresses()):
            return None
        return self.warm_up if isinstance(self.warm_up, int) else int(self._settled_at.numpy())

    def server_state(self, index):
        """All workers share m, and each adds its own gradient to it."""
        return {"m": self._moments[index]}

    def worker_step(self, gradient, state, iteration):
        """The worker's half: the gradient in the warm-up, then the worker's momentum."""
        momentum = self.beta_1 * state["m"] + (1 - self.beta_1) * gradient
        return tf.where(self.compresses(), momentum, gradient), {}

    def update_step(self, gradient, variable, learning_rate):
        """The server's half, for one variable: `gradient` is the mean message."""
        index = self.index_of(variable)
        message, over = tf.convert_to_tensor(gradient), self.compresses()
        slots = [slot[index] for slot in (self._moments, self._velocities, self._steps)]
        state = [tf.convert_to_tensor(slot) for slot in slots]
        warm = warm_up_moments(message, state, beta_1=self.beta_1, beta_2=self.beta_2)
        frozen = message, *state[1:]
        state = [tf.where(over, a, b) for a, b in zip(frozen, warm, strict=True)]
        for slot, value in zip(slots, state, strict=True):
            self.assign(slot, value)
        m, v, _ = state
        self.assign_sub(variable, tf.cast(learning_rate, m.dtype) * m / tf.sqrt(v + self.epsilon))

    def compresses(self) -> tf.Tensor:
        """Bool scalar: whether the warm-up is over. See `tfqcomm.step.halves.WarmUp`."""
        if self.warm_up == "auto":
            return tf.convert_to_tensor(self._settled_at) > 0
        return tf.convert_to_tensor(self.iterations) >= self.warm_up

    def step_taken(self):
        """Looks whether v has settled, if it is time to, and logs the end of the warm-up.

        All replicas have the same v, to the bit, so they come to the same conclusion.
        """
        t = tf.cast(tf.convert_to_tensor(self.iterations), tf.int64) + 1
        if self.warm_up == "auto":
            delta = max(1, round(1 / (1 - self.beta_2)))
            due = tf.equal(t % delta, 0) & ~self.compresses()
            tf.cond(due, lambda: self._look(t), lambda: tf.constant(False))
            last = tf.equal(t, tf.convert_to_tensor(self._settled_at))
        else:
            last = tf.equal(t, self.warm_up)
        if not _tf_private.in_xla_context():  # which cannot call Python
            tf.cond(last, lambda: self._log_the_switch(t), lambda: tf.constant(False))

    def _look(self, t):
        velocities = [tf.convert_to_tensor(v) for v in self._velocities]
        norm = tf.add_n([tf.reduce_sum(tf.cast(v, tf.float64)) for v in velocities])
        before = tf.convert_to_tensor(self._norm)  # 0 at the first look
        settled = (before > 0) & (norm >= _SETTLED * before)
        self._settled_at.assign(tf.where(settled, t, 0))
        self._norm.assign(norm)
        return settled

    def _log_the_switch(self, t):
        def log(step):
            text = "%s: the warm-up is over after %d steps; from now on momenta travel as %s."
            logging.info(text, self.name, step, self.options.compressor)
            return False

        with tf.device("CPU:0"):
            return tf.numpy_function(log, [t], tf.bool)

    def finalize_variable_values(self, var_list):
        """Called at the end of `fit`: warns, once, if that came before the end of the warm-up."""
        super().finalize_variable_values(var_list)
        if self.switched_after is None and not self._warned:
            self._warned = True
            logging.warning(
                "%s: `fit` ended after %d steps within the warm-up (`warm_up=%r`), and nothing has "
                "been compressed. Choose a shorter one, or train for longer.",
                self.name,
                int(self.iterations.numpy()),
                self.warm_up,
            )

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "warm_up": self.warm_up,
        }


def _check_warm_up(warm_up):
    steps = isinstance(warm_up, int) and not isinstance(warm_up, bool) and warm_up > 0
    if not steps and warm_up != "auto":
        raise ValueError(
            "Argument `warm_up` must be a positive integer, a number of steps, or 'auto'. "
            f"Received: warm_up={warm_up!r}"
        )
