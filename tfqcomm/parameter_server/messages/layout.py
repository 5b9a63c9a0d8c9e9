"""Where a worker keeps what it owes and remembers: one vector, held in a few variables.

    short slots | a long slot | a long slot | residuals of a bucket      a slot: one number per
    one variable  one variable  one variable  one variable               element of a piece

A step assigns a long slot as it finds it, and residuals as they are encoded; in a row with others
they would have to be copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfqcomm.parameter_server.buckets import Bucket
from tfqcomm.parameter_server.partition import ALONE_FROM, Piece

Key = tuple[Piece | Bucket, str]  # whose it is, and its name


class MemoryLayout:
    """The vector that a worker remembers, and how it is divided among variables.

    Args:
        first_values: of each slot of a piece, or of all pieces of a bucket, as they lie there.

    Attributes:
        slots: where in the vector that of each piece lies.
        initial: the vector at the beginning, float32[m].
    """

    def __init__(self, first_values: Mapping[Key, float]):
        short = [key for key in first_values if not _by_itself(key[0])]
        groups = [short, *([key] for key in first_values if _by_itself(key[0]))]
        self.slots: dict[tuple[Piece, str], slice] = {}
        self._places: dict[Key, tuple[int, slice]] = {}  # its variable, and where in that
        self._groups = [group for group in groups if group]
        self._ends, values, end = [], [np.zeros([0], np.float32)], 0
        for number, group in enumerate(self._groups):
            begin = end
            for key in group:
                start, end = end, end + key[0].size
                for piece, place in _pieces(key[0]).items():
                    self.slots[piece, key[1]] = slice(start + place.start, start + place.stop)
                self._places[key] = number, slice(start - begin, end - begin)
                values.append(np.full([key[0].size], first_values[key], np.float32))
            self._ends.append(end)
        self.initial = np.concatenate(values)

    def divide(self, vector: np.ndarray) -> list[np.ndarray]:
        """What each variable has of the vector."""
        return np.split(vector, self._ends[:-1]) if self._ends else []

    def whole(self, parts: list[np.ndarray]) -> np.ndarray:
        """Inverse of `divide`."""
        return np.concatenate([np.zeros([0], np.float32), *parts])

    def slot(self, parts: list[tf.Tensor], key: Key) -> tf.Tensor | None:
        """float32[n] out of the values of all variables; None if there is no such slot."""
        if key not in self._places:
            return None
        number, place = self._places[key]
        return parts[number] if len(self._groups[number]) == 1 else parts[number][place]

    def join(self, state: Mapping[Key, tf.Tensor]) -> list[tf.Tensor]:
        """The values of all variables, out of those of all slots."""
        flat = {key: tf.reshape(state[key], [-1]) for group in self._groups for key in group}
        return [
            flat[group[0]] if len(group) == 1 else tf.concat([flat[key] for key in group], 0)
            for group in self._groups
        ]


def _by_itself(owner: Piece | Bucket) -> bool:
    return isinstance(owner, Bucket) or owner.size >= ALONE_FROM


def _pieces(owner: Piece | Bucket) -> dict[Piece, slice]:
    return owner.slices if isinstance(owner, Bucket) else {owner: slice(0, owner.size)}
