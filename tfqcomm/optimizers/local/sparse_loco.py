"""SparseLoCo: DiLoCo whose error feedback is the outer momentum, with sparse 2-bit messages."""

from __future__ import annotations

from typing import ClassVar

from tfqcomm import compressors
from tfqcomm.aggregators.base import Aggregator
from tfqcomm.aggregators.median_clipped import MedianClippedMean
from tfqcomm.optimizers.local.outer_optimizer import OuterOptimizer
from tfqcomm.optimizers.shared_arguments import register

_DEFAULT = compressors.TopK(64 / 4096, value_dtype="table2", chunk=4096)


@register
class SparseLoCo(OuterOptimizer):
    """Any Keras optimizer on every replica alone, which exchange few entries every H steps.

    With H = `every`, Theta the global weights and theta_i, e_i those and the residual of replica i:

        every step:     theta_i = inner(theta_i, g_i)
        every H steps:  e_i = residual_decay * e_i + Theta - theta_i
                        message_i = the largest of each chunk of e_i, in 2 bits each
                        e_i = e_i - message_i
                        share_i = min(1, median_j |message_j| / |message_i|)
                        Theta = Theta - outer_learning_rate * mean_i(share_i * message_i)
                        theta_i = Theta

    What is left out comes again, a little less each time: that is all the momentum there is. The
    norms are those of a tensor, or of its part in a fragment. All else is as in `DiLoCo`.

    Args:
        inner: an optimizer of Keras, not built yet, its name or its config.
        every: H, steps between two exchanges; higher => less traffic.
        compressor: of the differences: by default 64 of each 4,096 entries, in one of four values
            (10.2 bits an entry kept, 0.16 an entry). It must send what `"all_gather"` can move.
        residual_decay: in (0, 1]; lower => old leftovers are forgotten sooner.
        fragments, overlap, merge: as of `DiLoCo`.
        outer_learning_rate: higher => global weights go further than what little was sent; with
            few exchanges in a training, where most is never sent, 2 can be better than 1.
        **options: those of `ExchangeOptions`.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: chunks are 4,096 entries in a row of a kernel, not its tiles of
    64 x 64. Biases and other tensors of rank 1 travel whole, as there, but in float32. The median
    of an even number of norms is the mean of the middle two.

    Example:
    >>> import keras
    >>> SparseLoCo(keras.optimizers.AdamW(1e-3), every=30).every
    30

    References:
        Sarfi, Thérien, Lidin, Belilovsky: Communication Efficient LLM Pre-training with SparseLoCo,
        https://arxiv.org/abs/2508.15706, Algorithm 1
    """

    aggregators: ClassVar[dict[str, type[Aggregator]]] = {"all_gather": MedianClippedMean}

    def __init__(
        self,
        inner,
        every: int = 30,
        compressor=_DEFAULT,
        residual_decay: float = 0.95,
        fragments: int = 1,
        overlap: int = 0,
        merge: float = 1.0,
        outer_learning_rate: float = 1.0,
        *,
        name: str = "sparse_loco",
        **options,
    ):
        self._refuse_unknown(options)
        super().__init__(
            inner,
            every,
            outer_learning_rate,
            0.0,
            compressor,
            fragments,
            overlap,
            merge,
            name=name,
            residual_decay=residual_decay,
            schedule="all_gather",
            **options,
        )

    @classmethod
    def shared_arguments(cls):
        """All but the schedule: only gathered messages have norms."""
        return {n: p for n, p in super().shared_arguments().items() if n != "schedule"}

    def get_config(self):
        """Serializable arguments."""
        config = super().get_config()
        for decided in ("outer_momentum", "schedule"):
            del config[decided]
        return config
