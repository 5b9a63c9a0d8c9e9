"""What fragments are made of: ranges of elements of the variables.

    variables                        0 0 0 0 0 0 0 0 0 0 0 0 0 | 1 | 2 2 2 2 2 2
    compressed, in four fragments    a a a a a b b b b b c c c |   | c c d d d d
    not compressed, in four                                    | a |                 not enough

All that travels in one way is cut into equal ranges, apart from what travels in others. So
fragments send about the same number of bytes, whatever a codec makes of its share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import tensorflow as tf

from tfqcomm.kernels.layout import Layout, Segment
from tfqcomm.step.options import ExchangeOptions

_ALIGNED = 256  # elements, the block of block codecs
_UNEVEN = 1 / 16  # of a fragment, what alignment, and padding to it, may cost each


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a variable that is in a fragment: elements [start, stop) of it, flattened.

    Attributes:
        place: of the variable among those of the model.
        shape: of the variable.
        start, stop: what is here.
    """

    place: int
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Elements of the variable."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether this is all of the variable."""
        return self.stop - self.start == self.size

    def of(self, tensor: tf.Tensor | tf.Variable) -> tf.Tensor:
        """These elements of a tensor like the variable: in its shape if whole, else flat."""
        tensor = tf.convert_to_tensor(tensor)
        return tensor if self.whole else tf.reshape(tensor, [-1])[self.start : self.stop]

    def put(self, variable: tf.Variable, values: tf.Tensor) -> None:
        """Assigns what `of` gives, and leaves the rest as it is."""
        if not self.whole:
            flat = tf.reshape(variable.read_value(), [-1])
            flat = tf.concat([flat[: self.start], values, flat[self.stop :]], 0)
            values = tf.reshape(flat, self.shape)
        variable.assign(values)


def wide(variable) -> tf.DType:
    """What global weights, and differences to them, are computed in."""
    return tf.float64 if variable.dtype == tf.float64 else tf.float32


def cut(
    variables: Sequence, paths: Sequence[str], options: ExchangeOptions, fragments: int
) -> list[list[Piece]]:
    """Cuts variables into fragments: for each of these its pieces, by their places.

    A codec that needs a matrix, one of low rank, gets whole variables.
    """
    kinds: dict[Hashable, list[int]] = {}
    shapes = [tuple(variable.shape) for variable in variables]
    for place, (variable, path) in enumerate(zip(variables, paths, strict=True)):
        own, size = options.for_path(path), math.prod(shapes[place])
        kind = own if own.compresses(shapes[place], size) else wide(variable)
        if size:
            kinds.setdefault(kind, []).append(place)
    found: list[list[Piece]] = [[] for _ in range(fragments)]
    for kind, places in kinds.items():
        whole = isinstance(kind, ExchangeOptions) and kind.one_compressor.low_rank
        sizes = [math.prod(shapes[place]) for place in places]
        shares = _whole(sizes, fragments) if whole else ranges(sizes, fragments)
        for fragment, segments in zip(found, shares, strict=True):
            for part in segments:
                place = places[part.vector]
                fragment.append(Piece(place, shapes[place], part.start, part.stop))
    return [sorted(fragment, key=lambda piece: piece.place) for fragment in found]


def ranges(sizes: Sequence[int], fragments: int) -> list[list[Segment]]:
    """Cuts vectors in a row into equal ranges, an eighth above their mean at most.

    Cuts are at multiples of 256 elements of a vector, or of a lower power of two where fragments
    are small.
    """
    total, aligned = sum(sizes), _ALIGNED
    while aligned > 1:
        padding = Layout(tuple(sizes), aligned).size - total
        if max(padding, fragments * aligned) <= _UNEVEN * total:
            break
        aligned //= 2
    return [list(part.segments) for part in Layout(tuple(sizes), aligned).cut(fragments)]


def deal(sizes: Sequence[int], fragments: int) -> list[list[int]]:
    """Deals variables greedily, the largest first, into fragments of nearly equal size.

    Returns:
        For each fragment the positions of its variables, ascending; of too few some get none.
    """
    dealt: list[list[int]] = [[] for _ in range(fragments)]
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        min(dealt, key=lambda fragment: sum(sizes[i] for i in fragment)).append(place)
    return [sorted(fragment) for fragment in dealt]


def _whole(sizes: Sequence[int], fragments: int) -> list[list[Segment]]:
    return [[Segment(i, 0, sizes[i]) for i in places] for places in deal(sizes, fragments)]
