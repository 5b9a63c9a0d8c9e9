"""What a local step tells the chief."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LocalReport:
    """What a local step tells the chief.

    Attributes:
        healthy: whether the gradient was finite; if not, the step was skipped.
        mean_loss: of the last mini-batches; inf if the weights are not finite.
        gradient_norm: before clipping.
        metrics: the worker's share in the states of all metrics, float64.
    """

    healthy: bool
    mean_loss: float
    gradient_norm: float
    metrics: np.ndarray

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> LocalReport:
        """Inverse of what the graph packs."""
        healthy, mean_loss, gradient_norm = (number.item() for number in vector[:3])
        return cls(bool(healthy), mean_loss, gradient_norm, vector[3:])
