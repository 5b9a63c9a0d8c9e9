"""DiLoCo: an exchange of differences every H steps, and Nesterov momentum outside."""

from __future__ import annotations

from tfqcomm.optimizers.local.outer_optimizer import OuterOptimizer
from tfqcomm.optimizers.shared_arguments import register


@register
class DiLoCo(OuterOptimizer):
    """Any Keras optimizer on every replica alone, which exchange their progress every H steps.

    Sends 1 / `every` of what synchronous training sends, and with a compressor a small part of
    that. With H = `every`, Theta the global weights and theta_i those of replica i:

        every step:     theta_i = inner(theta_i, g_i)
        every H steps:  delta = mean_i(Theta - theta_i)            compressed, with error feedback
                        buf = outer_momentum * buf + delta
                        Theta = Theta - outer_learning_rate * (delta + outer_momentum * buf)
                        theta_i = (1 - merge) * theta_i + merge * Theta

    With `overlap` the differences are those of the step t that H divides, and the lines below them
    are those of step t + `overlap`: replicas go on from their own weights meanwhile. With `merge`
    below 1 they keep some of what they have learnt by themselves; with 1 they all start anew from
    the global weights.

    The state of the inner optimizer stays on its replica: `BackupAndRestore` keeps its mean.
    Between exchanges the replicas' weights differ, and an evaluation or a `save` sees those of the
    first replica, unless `tfqcomm.callbacks.AverageReplicas` is given to `fit`: with DiLoCo it
    shows the global weights, and leaves them in the model at the end. Steps since the last
    exchange are then not in them: let `every` divide the steps of an epoch. The global weights know
    nothing of weights that are set or loaded by hand after the first step.

    A step with a gradient that is not finite on any replica of a process is skipped by this
    process; an exchange with a message that is not finite is skipped by all, and all replicas go
    on from the last global weights, whatever `merge` says.

    Between processes what is sent is under way while steps go on, on a thread and in a group of
    collectives of its own, over the CPU: step t + `overlap` waits for what is left of it. This is
    so where all that is sent is known beforehand: without compression, and with the schedules
    `"dense"` and `"all_gather"`. With others, and in a single process, the whole exchange takes
    place in the step that merges: the same weights, and nothing hidden. The differences are kept
    until then, in backups, too.

    Args:
        inner: an optimizer of Keras, not built yet, its name or its config. Its learning rate is
            that of DiLoCo; clipping and weight decay are its arguments, too.
        every: H, steps between two exchanges of a variable; higher => less traffic.
        outer_learning_rate: higher => global weights follow the replicas more; 1.0 without
            momentum is averaging.
        outer_momentum: in [0, 1), Nesterov's; higher => smoother, and faster along what lasts.
        compressor: of the differences: a `tfqcomm.compressors.Compressor`, its name or its config.
        fragments: P, which divides `every`; the model is cut into P fragments of about equal size,
            of which one is exchanged every H / P steps; higher => a lower peak of traffic. A
            variable may be in several, in each with scales, or a top-k, of its part; those that
            `PowerSGD` compresses stay whole, and compressors that adapt take one fragment.
        overlap: steps between the sending of a fragment and its merging, below H / P; higher =>
            more of an exchange's time is hidden behind steps, and the global weights are older.
        merge: in (0, 1], the share of the global weights in what replicas go on from: 1 - alpha in
            the paper, which takes 0.5 with an overlap. Lower => replicas stay further apart.
        **options: those of `ExchangeOptions`.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: the fragments of Streaming DiLoCo are made of layers; here they are
    ranges of elements of the model, of all that is compressed in one way and of the rest each an
    equal share, within an eighth. After a round that was lost, replicas take the global weights
    whole.

    Example:
    >>> optimizer = DiLoCo(keras.optimizers.AdamW(1e-3), every=16, compressor="block_int8")
    >>> optimizer.every
    16

    References:
        Douillard et al.: DiLoCo: Distributed Low-Communication Training of Language Models,
        https://arxiv.org/abs/2311.08105, Algorithm 1; Streaming DiLoCo with overlapping
        communication, https://arxiv.org/abs/2501.18512, Algorithm 2
    """

    def __init__(
        self,
        inner,
        every: int,
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
        compressor=None,
        fragments: int = 1,
        overlap: int = 0,
        merge: float = 1.0,
        *,
        name: str = "diloco",
        **options,
    ):
        super().__init__(
            inner,
            every,
            outer_learning_rate,
            outer_momentum,
            compressor,
            fragments,
            overlap,
            merge,
            name=name,
            **options,
        )
