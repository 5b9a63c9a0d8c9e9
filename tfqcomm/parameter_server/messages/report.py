"""What a worker's step tells the chief."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Report:
    """What a step tells the chief.

    Attributes:
        healthy: whether the message was finite.
        version: the oldest one of the weights that were pulled.
        number: of the message, among those of its worker.
        staleness: how many steps the servers have taken between the pull and the one with this
            message; -1 if they have not taken it, or not yet.
        pulled_words: how many.
        row_words: how many were sent to ask for rows of tables, and to push them.
        message_norm: of all gradients' messages, before compression.
        residual_norm: of what compression has left out.
        metrics: the worker's share in the states of all metrics, float64.
    """

    healthy: bool
    version: int
    number: int
    staleness: int
    pulled_words: int
    row_words: int
    message_norm: float
    residual_norm: float
    metrics: np.ndarray

    @classmethod
    def from_vector(cls, vector: np.ndarray, servers: int) -> Report:
        """Inverse of what the graph packs: numbers as float64, which holds them exactly."""
        steps, facts, rest = np.split(vector, [servers, servers + 6])
        versions, metrics = np.split(rest, [servers])
        return cls(
            healthy=bool(facts[0]),
            version=int(versions.min()),
            number=int(facts[1]),
            staleness=int((steps - versions).max()) if steps.max() >= 0 else -1,
            pulled_words=int(facts[2]),
            row_words=int(facts[3]),
            message_norm=float(facts[4]),
            residual_norm=float(facts[5]),
            metrics=metrics,
        )
