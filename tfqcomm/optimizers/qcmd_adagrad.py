"""QCMD Adagrad: quantized composite mirror descent with adaptive steps and l1."""

from __future__ import annotations

import tensorflow as tf

from tfqcomm.kernels import numerics
from tfqcomm.optimizers.proximal import ProximalAdagrad, soft_threshold
from tfqcomm.optimizers.shared_arguments import register


def qcmd_adagrad_update(gradient, x, state, learning_rate, *, l1, delta):
    """The server's half of QCMD Adagrad (arXiv 2208.05631).

    Args:
        gradient: mean of the quantized gradients, `q`.
        x: the variable.
        state: (`S`,), the sum of squares of `q`.

    Returns:
        The new variable and state.
    """
    q, (s,) = numerics.squarable(gradient), state
    s = numerics.add_square(s, q)
    h = delta + tf.sqrt(s)
    return soft_threshold(x - learning_rate * q / h, learning_rate * l1 / h), (s,)


@register
class QCMDAdagrad(ProximalAdagrad):
    """Adagrad with l1 on the mean of quantized gradients: composite mirror descent.

    Use it for sparse models, or where 2 bits per entry must do without error feedback. On worker
    i, and then everywhere:

        q_i = Q(g_i);  q = mean q_i
        S = S + q^2;  H = delta + sqrt(S)
        variable = soft(variable - eta q / H, eta lambda / H)

    where soft(a, b) = sign(a) max(|a| - b, 0): weights become exactly zero.

    Args:
        learning_rate: float or learning-rate schedule, `eta` in the paper. First steps are about
            `learning_rate / delta` times a gradient.
        l1: weight of the l1 norm, `lambda`; 0 for none.
        delta: positive, added to the root; 1e-2 works where 1e-8 does not.
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
    >>> optimizer = QCMDAdagrad(0.05, l1=1e-4)
    >>> optimizer.l1
    0.0001

    References:
        Xu et al.: Quantized Adaptive Subgradient Algorithms and Their Applications,
        https://arxiv.org/abs/2208.05631
        Duchi, Hazan, Singer: Adaptive Subgradient Methods, JMLR 12, 2011
    """

    slots = ("sum_of_squares",)

    def __init__(
        self,
        learning_rate=0.05,
        l1: float = 0.0,
        delta: float = 1e-2,
        *,
        compressor="threshold_quantizer",
        error_feedback: bool | str = False,
        l1_on_vectors: bool = False,
        name: str = "qcmd_adagrad",
        **options,
    ):
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

    def proximal(self, gradient, x, state, learning_rate, l1):
        """The new variable and slots."""
        return qcmd_adagrad_update(gradient, x, state, learning_rate, l1=l1, delta=self.delta)
