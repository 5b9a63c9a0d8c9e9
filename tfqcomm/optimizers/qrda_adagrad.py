"""QRDA Adagrad: quantized regularized dual averaging with adaptive steps and l1."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.kernels import numerics
from tfqcomm.optimizers.base import complete, per_row
from tfqcomm.optimizers.proximal import ProximalAdagrad, soft_threshold
from tfqcomm.optimizers.shared_arguments import register

CENTERS = ("zero", "initial")


def qrda_adagrad_update(gradient, state, learning_rate, step, *, center, l1, delta):
    """The server's half of QRDA Adagrad (arXiv 2208.05631).

    With a center of zero this is -sign(G) eta max(|G| - t lambda, 0) / H.

    Args:
        gradient: mean of the quantized gradients, `q`.
        state: (`S`, `G`), the sums of `q^2` and of `q`.
        step: t, the steps this variable has taken, counted from 1.
        center: `x_1`.

    Returns:
        The new variable and state.
    """
    q, (s, g) = numerics.squarable(gradient), state
    s = numerics.add_square(s, q)
    g = g + q
    h = delta + tf.sqrt(s)
    x = soft_threshold(center - learning_rate * g / h, learning_rate * step * l1 / h)
    return x, (s, g)


@register
class QRDAAdagrad(ProximalAdagrad):
    """Adagrad with l1 on the mean of quantized gradients: regularized dual averaging.

    Use it for models as sparse as can be: at an equal `l1` it leaves more zeros than
    `QCMDAdagrad`. On worker i, and then everywhere:

        q_i = Q(g_i);  q = mean q_i
        S = S + q^2;  G = G + q;  H = delta + sqrt(S)
        variable = soft(center - eta G / H, eta t lambda / H)

    where soft(a, b) = sign(a) max(|a| - b, 0): weights become exactly zero. The variable itself
    does not enter: with the paper's center, zero, the initialization is forgotten in the first
    step. Linear models do not mind; for deep ones use `center="initial"`.

    Args:
        learning_rate: float or learning-rate schedule, `eta` in the paper. First steps are about
            `learning_rate / delta` times a gradient.
        l1: weight of the l1 norm, `lambda`; 0 for none.
        delta: positive, added to the root; 1e-2 works where 1e-8 does not.
        center: "zero" as in the paper, or "initial": the variable before the first step.
        compressor: a `tfqcomm.compressors.Compressor`, its name or its config.
        error_feedback: the paper has none, and neither has the default. Without it, entries that
            never pass the threshold are never updated.
        l1_on_vectors: regularize tensors of rank <= 1, too: biases, and batch normalization.
        **options: shared with all that compress, and with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: rank <= 1 tensors are neither quantized nor regularized unless
    asked for; `schedule="all_gather"` is the paper's server; a step in which any worker's gradient
    is not finite is skipped by all. Under an all-reduce strategy the sparse weights do not travel,
    so they save no bytes there.

    Example:
    >>> optimizer = QRDAAdagrad(0.05, l1=1e-4, center="initial")
    >>> optimizer.center
    'initial'

    References:
        Xu et al.: Quantized Adaptive Subgradient Algorithms and Their Applications,
        https://arxiv.org/abs/2208.05631
        Duchi, Hazan, Singer: Adaptive Subgradient Methods, JMLR 12, 2011
    """

    def __init__(
        self,
        learning_rate=0.05,
        l1: float = 0.0,
        delta: float = 1e-2,
        *,
        compressor="threshold_quantizer",
        error_feedback: bool | str = False,
        l1_on_vectors: bool = False,
        center: str = "zero",
        name: str = "qrda_adagrad",
        **options,
    ):
        checks.one_of("center", center, CENTERS)
        super().__init__(
            learning_rate,
            l1,
            delta,
            compressor=compressor,
            error_feedback=error_feedback,
            l1_on_vectors=l1_on_vectors,
            name=name,
            **options,
        )
        self.center = center
        self.slots = ("sum_of_squares", "sum", *(["center"] if center == "initial" else []))

    def build(self, variables):
        """Creates the slots, and the number of steps that each variable has taken."""
        if self.built:
            return
        super().build(variables)
        self._steps = [
            self.add_variable(per_row(v.shape), dtype="float32", name=f"{v.name}_steps")
            for v in variables
        ]
        self._slots = [*self._slots, self._steps]

    def proximal(self, gradient, x, state, learning_rate, l1):
        """The new variable and slots."""
        sums, center, steps = state[:2], state[2:-1], state[-1]
        if center:  # the first gradient may come late, or weights be loaded before it
            center = [tf.where(tf.equal(steps, 0), x, center[0])]
        steps = steps + 1
        x, sums = qrda_adagrad_update(
            gradient,
            sums,
            learning_rate,
            tf.cast(steps, x.dtype),
            center=center[0] if center else 0.0,
            l1=l1,
            delta=self.delta,
        )
        return x, (*sums, *center, steps)

    def load_own_variables(self, store):
        """What was saved before variables had steps of their own: those of the optimizer."""
        if self.built:
            taken = int(store["0"][()]) // (self.gradient_accumulation_steps or 1)
            store = complete(store, self.variables, self._steps, taken)
        super().load_own_variables(store)

    def get_config(self):
        """Serializable arguments."""
        return {**super().get_config(), "center": self.center}
