"""The rows of tables on one server, and the lazy step: an optimizer that sees these rows alone.

messages --> rows of all workers, summed by place --> working rows <-- rows, slots
                                                      `optimizer.apply` of the server
                                                      working rows --> rows, slots

The optimizer is built for variables of one row, which while a step is traced stand for any number
of them: so its own step is the lazy step, with weight decay and all that it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.embeddings.payload import RowFormat
from tfqcomm.parameter_server.embeddings.stored import blocks
from tfqcomm.parameter_server.optimizers import server_variable, slots_of
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.step.halves import WorkerHalf


class _Rows:
    """A variable with all rows of a part, and the value that the optimizer works on.

    Args:
        variable: of one row, which the optimizer knows.
        rows: all of them.
    """

    def __init__(self, variable: keras.Variable, rows: tf.Variable):
        self.variable = variable
        self.all = rows
        self._working = _tf_private.work_on_values(variable)

    def load(self, places) -> None:
        """Gives the optimizer these rows."""
        self._working.tensor = tf.gather(self.all, places)

    def store(self, places, constraint=None) -> None:
        """Takes them back."""
        rows = self._working.tensor
        if constraint is not None:
            rows = tf.convert_to_tensor(constraint(rows))
        self.all.scatter_update(tf.IndexedSlices(rows, places))


class _Part:
    """A range of a table's rows.

    Attributes:
        rows: its weights.
        slots: what the server's optimizer keeps of them.
        moments: what the worker half of the optimizer keeps of them, by name: the rows of all
            workers, one after the other.
    """

    def __init__(self, part: Piece, rows: tf.Variable, whole: keras.Variable, workers, half):
        self.whole = whole
        self.constraint = whole.constraint
        working = server_variable(np.zeros([1, *part.shape[1:]]), whole, part.name)
        working.constraint = None  # it would look at the shape
        self.rows = _Rows(working, rows)
        self.slots: list[_Rows] = []
        self.moments = {
            name: tf.Variable(
                tf.fill([workers * part.shape[0], part.shape[1]], initial), trainable=False
            )
            for name, initial in (half.worker_slots if half else {}).items()
        }


@dataclasses.dataclass(frozen=True)
class SavedRows:
    """Some rows of a matrix, on the server that the caller is on.

    Attributes:
        name: of the matrix.
        first: the row of the matrix that is the first one here.
        total: how many the matrix has.
        variable: the rows; of several copies one after the other.
        copies: how many there are, of which the mean counts.
    """

    name: str
    first: int
    total: int
    variable: tf.Variable
    copies: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return (self.total, *self.variable.shape[1:])

    @property
    def dtype(self) -> tf.DType:
        """Of the matrix."""
        return self.variable.dtype

    @property
    def _rows(self) -> int:
        return self.variable.shape[0] // self.copies

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of the matrix, one after the other, none of them large."""
        return blocks(self.first, self.first + self._rows, int(np.prod(self.shape[1:])))

    def slice(self, start: int, stop: int) -> str:
        """These rows of the matrix, in the words of TensorFlow's checkpoints."""
        rest = ["-"] * (len(self.shape) - 1)
        return " ".join([*map(str, self.shape), ":".join([f"{start},{stop - start}", *rest])])

    def read(self, start: int, stop: int) -> tf.Tensor:
        """These rows of the matrix."""
        if self.copies == 1:
            return tf.gather(self.variable, self._places(0, start, stop - start))
        found = [
            tf.gather(self.variable, self._places(copy, start, stop - start))
            for copy in range(self.copies)
        ]
        return tf.add_n(found) / self.copies

    def write(self, start: int, value) -> None:
        """Puts others in their place, from the matrix' row `start` on, in all copies."""
        for copy in range(self.copies):
            places = self._places(copy, start, len(value))
            self.variable.scatter_update(tf.IndexedSlices(value, places))

    def _places(self, copy: int, start: int, count: int) -> tf.Tensor:
        place = copy * self._rows + start - self.first
        return tf.range(place, place + count)


class ServerRows:
    """All rows of tables on one server; made on its device.

    Args:
        device: of the server.
        format: which rows live there, and how they travel.
        values: the weights, for each part, on the server.
        wholes: for each part, the model's variable that it is of.
        workers: how many there are.
        half: the worker half of the optimizer, whose state for rows lives here; None for none.
    """

    def __init__(
        self,
        device: str,
        format: RowFormat,
        values: Sequence[tf.Variable],
        wholes: Sequence[keras.Variable],
        workers: int,
        half: WorkerHalf | None,
    ):
        self.device = device
        self.format = format
        self._half = half
        self._places: dict[Piece, tf.Tensor] = {}  # of the rows that are loaded
        self._shards = {
            part: _Part(part, value, whole, workers, half)
            for part, value, whole in zip(format.parts, values, wholes, strict=True)
        }

    @property
    def working(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """What the server's optimizer is to be built for, each with the model's variable."""
        return [(shard.rows.variable, shard.whole) for shard in self._shards.values()]

    def keep_slots(self, optimizer: keras.optimizers.Optimizer) -> None:
        """Makes rows of the slots of an optimizer that was built for `working`."""
        slots = slots_of(optimizer)[1]
        for part, shard in self._shards.items():
            shard.slots = [
                _Rows(slot, _repeated(slot, part.shape[0])) for slot in slots.get(part.name, [])
            ]

    def held(self) -> dict[Piece, list[tf.Variable]]:
        """For each part all its rows, and all their slots, in the optimizer's order."""
        return {
            part: [shard.rows.all, *(slot.all for slot in shard.slots)]
            for part, shard in self._shards.items()
        }

    def saved(self) -> list[SavedRows]:
        """All there is to save of the rows of this server."""
        found = []
        for part, shard in self._shards.items():
            total = shard.whole.shape[0]
            kept = {"rows": shard.rows.all}
            kept |= {f"slot{number}": slot.all for number, slot in enumerate(shard.slots)}
            for name, rows in kept.items():
                found.append(SavedRows(f"{part.variable}/{name}", part.start, total, rows))
            for name, rows in shard.moments.items():
                copies = rows.shape[0] // part.shape[0]
                name = f"{part.variable}/moment/{name}"
                found.append(SavedRows(name, part.start, total, rows, copies))
        return found

    def mean_moments(self) -> dict[tuple[Piece, str], np.ndarray]:
        """What the worker half keeps of each part, by slot: its mean over the workers."""
        with on(self.device):
            return {
                (part, name): tf.reduce_mean(tf.reshape(rows, [-1, *part.shape]), 0).numpy()
                for part, shard in self._shards.items()
                for name, rows in shard.moments.items()
            }

    def load_moments(self, values: Mapping[tuple[str, int], np.ndarray]) -> None:
        """Gives all workers these, by slot and the table's place among the weights."""
        with on(self.device):
            for part, shard in self._shards.items():
                for name, rows in shard.moments.items():
                    if (name, part.variable) in values:
                        own = part.cut(values[name, part.variable])
                        rows.assign(np.tile(own, [rows.shape[0] // len(own), 1]))

    def pulled(self, part: Piece, places) -> tuple[tf.Tensor, int]:
        """Rows in a worker's graph, encoded on the server; and of how many words each was made."""
        codec, (_, width) = self.format.codec, part.shape
        with tf.device(self.device):
            words = codec.encode(tf.gather(self._shards[part].rows.all, places))
        return codec.decode(words, width), codec.num_words(width)

    def begin(self, pushes, share: float) -> list[tuple[tf.Tensor, keras.Variable]]:
        """In the graph of a server's step: what `apply` is to be given, rows loaded.

        Args:
            pushes: for each worker that takes part its index, int32, and what it has pushed, by
                part: places and rows, as `RowFormat.unpack` gives them.
            share: of the mean of what they have pushed.
        """
        messages: dict[Piece, list] = {part: [] for part in self._shards}
        for worker, pushed in pushes:
            for part, (places, rows) in pushed.items():
                message = self._message(self._shards[part], worker, places, rows)
                messages[part].append((places, message))
        pairs = []
        for part, found in messages.items():
            shard = self._shards[part]
            places, index = tf.unique(tf.concat([places for places, _ in found], 0))
            rows = tf.concat([rows for _, rows in found], 0)
            summed = tf.math.unsorted_segment_sum(rows, index, tf.size(places))
            for kept in (shard.rows, *shard.slots):
                kept.load(places)
            self._places[part] = places
            pairs.append((summed * (share / len(pushes)), shard.rows.variable))
        return pairs

    def end(self) -> None:
        """After `apply`: takes rows and slots back."""
        for part, places in self._places.items():
            shard = self._shards[part]
            shard.rows.store(places, shard.constraint)
            for slot in shard.slots:
                slot.store(places)

    def _message(self, shard: _Part, worker, places, gradient):
        """The worker's half of the optimizer for its rows."""
        if self._half is None:
            return gradient
        own = worker * shard.rows.all.shape[0] + places
        state = {name: tf.gather(variable, own) for name, variable in shard.moments.items()}
        message, after = self._half.worker_step(gradient, state, tf.zeros([], tf.int64))
        for name, variable in shard.moments.items():
            variable.scatter_update(tf.IndexedSlices(after[name], own))
        return message


def _repeated(slot: keras.Variable, rows: int) -> tf.Variable:
    """As many rows, on the current device, that begin as the slot's one does."""
    value = tf.tile(tf.convert_to_tensor(slot), [rows, *[1] * (len(slot.shape) - 1)])
    return tf.Variable(value, trainable=False)
