"""Periodic averaging: local SGD whose replicas are averaged now and then."""

from __future__ import annotations

from tfqcomm import checks
from tfqcomm.optimizers.local.local_sgd import LocalSGDOptimizer
from tfqcomm.optimizers.local.pulls import every
from tfqcomm.optimizers.shared_arguments import register


@register
class PeriodicAveragingSGD(LocalSGDOptimizer):
    """SGD on every replica alone; every `period` steps all take the average of their parameters.

    The plainest way to send little, and the one to measure others by. On replica i:

        x_i = x_i - learning_rate * g_i
        every `period` steps:  x_i = mean of all x

    A pull costs one float32 ring all-reduce, so 1 / `period` of synchronous training.

    Between pulls the replicas' weights differ: add `tfqcomm.callbacks.AverageReplicas` to `fit`
    if it validates, saves, or ends between two of them. A replica whose gradient is not finite
    skips its own step; `TrafficLogger` counts the steps in which one of this process did.

    Args:
        learning_rate: float or learning-rate schedule.
        momentum: in [0, 1); local, and untouched by averaging.
        period: steps between two averages; higher => less traffic.
        nesterov: look ahead, as in Keras' SGD.
        **options: shared with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Example:
    >>> PeriodicAveragingSGD(0.1, momentum=0.9, period=16).period
    16

    References:
        Stich: Local SGD Converges Fast and Communicates Little, ICLR 2019,
        https://arxiv.org/abs/1805.09767
    """

    def __init__(
        self,
        learning_rate=0.01,
        momentum: float = 0.0,
        *,
        period: int = 64,
        nesterov: bool = False,
        name: str = "periodic_averaging_sgd",
        **options,
    ):
        super().__init__(learning_rate, momentum, nesterov=nesterov, name=name, **options)
        checks.positive_integer("period", period)
        self.period = period

    @property
    def route(self):
        """For `TrafficLogger`."""
        return f"float32 every {self.period} steps", "dense"

    def pull_if_due(self, step, replicas):
        """Averages the replicas."""

        def pull():
            replicas.assign([replicas.mean()] * replicas.transport.local)
            return replicas.transport.bytes_all_reduce(replicas.size)

        return every(self.period, step, pull)

    def get_config(self):
        """Serializable arguments."""
        return {**super().get_config(), "period": self.period}
