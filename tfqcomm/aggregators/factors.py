"""The factors that PowerSGD starts a step with: those of the step before."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.kernels import low_rank


class Factors:
    """One factor of each matrix, equal on all replicas: it follows from reduced numbers.

    They are kept by tensor, so that a run may go on with other buckets and other replicas; those of
    equal shape lie side by side in one variable. What was saved of another rank or shape is left
    aside, and the warm start begins anew.

    Args:
        rank: r.
        seed: of the factors at first.
        device: where they are kept.

    Attributes:
        step: int64 variable, steps taken: whose turn it is where factors alternate.
    """

    def __init__(self, rank: int, seed: int, device: str | None):
        self.rank = rank
        self._seed = seed
        self._device = device
        self.step = _tf_private.local_variable(np.int64(0), name="factors/step", device="CPU:0")
        self._variables: dict[tuple[str, tuple[str, ...]], tf.Variable] = {}
        self._saved: dict[str, np.ndarray] = {}

    def variable(self, side: str, keys: Sequence[str], length: int) -> tf.Variable:
        """The factors of matrices of equal shape, random at first.

        Args:
            side: "left", float32[b, n, r], or "right", float32[b, r, m].
            keys: the tensors' names.
            length: n or m.
        """
        place = side, tuple(keys)
        if place not in self._variables:
            with tf.init_scope():
                known = self._saved | self.state()
                value = np.stack([self._initial(known, side, key, length) for key in keys])
            self._variables[place] = _tf_private.local_variable(
                value, name=f"factors/{side}", device=self._device
            )
        return self._variables[place]

    def state(self) -> dict[str, np.ndarray]:
        """What a backup keeps: by side and tensor."""
        state = {"step": self.step.numpy()}
        for (side, keys), variable in self._variables.items():
            state |= {f"{side}/{k}": v for k, v in zip(keys, variable.numpy(), strict=True)}
        return state

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Inverse of `state`; now, not in every step of a graph that is being traced."""
        self._saved = dict(state)
        with tf.init_scope():
            self.step.assign(state.get("step", 0))
            for (side, keys), variable in self._variables.items():
                length = variable.shape[1 if side == "left" else 2]
                values = [self._initial(self._saved, side, key, length) for key in keys]
                variable.assign(np.stack(values))

    def _initial(self, known, side, key, length) -> np.ndarray:
        shape = (length, self.rank) if side == "left" else (self.rank, length)
        saved = known.get(f"{side}/{key}")
        if saved is not None and saved.shape == shape:
            return saved.astype(np.float32)
        number = zlib.crc32(f"{self._seed}/{side}/{key}".encode()) & 0x7FFFFFFF
        return low_rank.random_directions(tf.constant([number, 0]), shape).numpy()
