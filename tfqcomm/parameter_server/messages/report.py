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
        pulled_words: how many.
        row_words: how many were sent to ask for rows of tables, and to push them.
        message_norm: of all gradients' messages, before compression.
        residual_norm: of what compression has left out.
        metrics: the worker's share in the states of all metrics, float64.
    """

    healthy: bool
    version: int
    pulled_words: int
    row_words: int
    message_norm: float
    residual_norm: float
    metrics: np.ndarray

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> Report:
        """Inverse of what the graph packs: numbers as float64, which holds them exactly."""
        healthy, version, pulled, rows, message, residual = (n.item() for n in vector[:6])
        words = int(pulled), int(rows)
        return cls(bool(healthy), int(version), *words, message, residual, vector[6:])
