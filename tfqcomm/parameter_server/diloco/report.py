"""What a learner's step tells the chief."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LearnerReport:
    """What a learner's step tells the chief.

    Attributes:
        healthy: whether the gradient was finite; if not, the step was skipped.
        sane: whether the weights are finite; looked at where the gradient is not.
        examples: in its batch.
        gradient_norm: before clipping.
        metrics: the learner's share in the states of all metrics, float64.
    """

    healthy: bool
    sane: bool
    examples: int
    gradient_norm: float
    metrics: np.ndarray

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> LearnerReport:
        """Inverse of what the graph packs."""
        healthy, sane, examples, gradient_norm = (number.item() for number in vector[:4])
        return cls(bool(healthy), bool(sane), int(examples), gradient_norm, vector[4:])
