"""Elastic averaging (EASGD): replicas and a common centre pull one another."""

from __future__ import annotations

from tfqcomm import checks
from tfqcomm.optimizers.local.local_sgd import LocalSGDOptimizer
from tfqcomm.optimizers.local.pulls import every
from tfqcomm.optimizers.shared_arguments import register


def elastic_averaging_pull(vectors, mean, center, alpha, workers):
    """Synchronous EASGD (arXiv 1412.6651, equations 5 and 6), without the gradients.

    Args:
        vectors: some of the workers' parameters, x_i.
        mean: of all workers' parameters.
        center: c.
        workers: how many there are, p.

    Returns:
        The new parameters of those workers, and the new centre. Both moves use the old values.
    """
    x, c = vectors, center
    moved = [x_i - alpha * (x_i - c) for x_i in x]
    return moved, c + alpha * workers * (mean - c)  # = c + alpha * sum_i (x_i - c)


@register
class ElasticAveragingSGD(LocalSGDOptimizer):
    """SGD on every replica alone, tied to a centre that moves towards their average.

    A baseline of Leader SGD. Every `period` steps, with a = `alpha`:

        x_i = x_i - a (x_i - centre);  centre = centre + a sum_i (x_i - centre)

    Every process holds the centre, which starts at the mean of the replicas' parameters; a pull
    costs one float32 ring all-reduce.

    Between pulls the replicas' weights differ: add `tfqcomm.callbacks.AverageReplicas` to `fit`.
    A replica whose gradient is not finite skips its own step; `TrafficLogger` counts the steps in
    which one of this process did.

    Args:
        learning_rate: float or learning-rate schedule.
        momentum: in [0, 1); local, and untouched by pulls.
        alpha: strength of a pull; None: `beta` over the number of replicas.
        beta: as the paper parametrizes it, used where `alpha` is None. 0.9 and 0.43 are common.
        period: steps between two pulls; higher => less traffic.
        nesterov: look ahead, as in Keras' SGD.
        **options: shared with Keras' optimizers.

    Raises:
        ValueError: for arguments that do not fit; the message names what does.

    Differences from the paper: it evaluates the centre, `AverageReplicas` the average of the
    replicas; the pull follows the gradient's step instead of sharing its starting point.

    Example:
    >>> ElasticAveragingSGD(0.1, beta=0.43).alpha_of(workers=4)
    0.1075

    References:
        Zhang, Choromanska, LeCun: Deep Learning with Elastic Averaging SGD, NeurIPS 2015,
        https://arxiv.org/abs/1412.6651
    """

    def __init__(
        self,
        learning_rate=0.01,
        momentum: float = 0.0,
        *,
        alpha: float | None = None,
        beta: float = 0.9,
        period: int = 64,
        nesterov: bool = False,
        name: str = "elastic_averaging_sgd",
        **options,
    ):
        super().__init__(learning_rate, momentum, nesterov=nesterov, name=name, **options)
        if alpha is not None:
            checks.positive("alpha", alpha)
        checks.positive("beta", beta)
        checks.positive_integer("period", period)
        self.alpha = alpha
        self.beta = beta
        self.period = period

    def alpha_of(self, workers: int) -> float:
        """Strength of a pull among `workers` replicas."""
        return self.beta / workers if self.alpha is None else self.alpha

    @property
    def route(self):
        """For `TrafficLogger`."""
        return f"float32 every {self.period} steps", "dense"

    def prepare(self, replicas):
        """Puts the centre where the replicas are."""
        self.shared.create("center", replicas.mean, replicas)

    def pull_if_due(self, step, replicas):
        """Moves the replicas and the centre."""
        center, world = self.shared["center"], replicas.transport.world

        def pull():
            vectors, new_center = elastic_averaging_pull(
                replicas.vectors(),
                replicas.mean(),
                center.read_value(),
                self.alpha_of(world),
                world,
            )
            replicas.assign(vectors)
            center.assign(new_center)
            return replicas.transport.bytes_all_reduce(replicas.size)

        return every(self.period, step, pull)

    def get_config(self):
        """Serializable arguments."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "beta": self.beta,
            "period": self.period,
        }
