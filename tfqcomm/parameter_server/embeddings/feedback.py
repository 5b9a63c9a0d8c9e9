"""Error feedback of rows: what a worker owes those that it has pushed, in slots by their ids.

    id % slots --> owner | float32[d]      owed to that id alone: another one that takes the slot
                                           begins with nothing, and what was owed there is dropped

A slot changes when the servers have taken the message. Where messages wait in inboxes that is known
a step later: until then ids and rows of the last message are pending.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from tfqcomm import checks
from tfqcomm.parameter_server.embeddings.codecs import RowCodec
from tfqcomm.parameter_server.embeddings.tables import Table
from tfqcomm.parameter_server.partition import Piece

ALL = "all"
NOBODY = -1  # the owner of a slot that nobody has taken yet

Kept = list[list[tf.Variable]]  # for each table owners and rows; then both of the last message
Pushed = Mapping[Piece, tuple[tf.Tensor, tf.Tensor]]  # places in a part, int32[r]; float32[r, d]
LeftOut = dict[int, tuple[tf.Tensor, tf.Tensor]]  # of a table: ids, int64[r]; float32[r, d]


def check_feedback(value, codec: RowCodec) -> None:
    """Accepts None, "all" or a positive integer as `row_feedback`; None alone without rounding."""
    if value != ALL:
        checks.positive_integer_or_none("row_feedback", value, or_else=f"'{ALL}'")
    if value is not None and codec.lossless:
        raise ValueError(
            f"Argument `row_feedback` must be None with row_codec='{codec.name}', which leaves "
            f"nothing out. Received: row_feedback={value!r}, row_codec='{codec.name}'"
        )


class RowFeedback:
    """How a worker keeps what it owes to rows.

    Args:
        tables: whose rows are pushed.
        slots: how many a worker has for each table; "all": one for each row. None: no feedback.

    Attributes:
        slots: how many there are, by the table's place among the weights.
    """

    def __init__(self, tables: Sequence[Table], slots: int | str | None):
        self._tables = list(tables) if slots is not None else []
        self.slots = {
            table.variable: table.rows if slots == ALL else min(int(slots or 0), table.rows)
            for table in self._tables
        }

    def make(self, waiting: bool) -> Kept:
        """Variables, on the device of the scope, in which nothing is owed.

        Args:
            waiting: whether messages wait in inboxes.
        """
        return [
            [
                tf.Variable(_nobody(self.slots[table.variable]), trainable=False),
                tf.Variable(tf.zeros([self.slots[table.variable], table.width]), trainable=False),
                *(
                    tf.Variable(serialized, trainable=False)
                    for serialized in _serialized(*_nothing(table))
                    if waiting
                ),
            ]
            for table in self._tables
        ]

    def forget(self, kept: Kept) -> None:
        """Owes nothing any more."""
        for table, (owners, _, *pending) in zip(self._tables, kept, strict=True):
            owners.assign(_nobody(owners.shape[0]))
            _assign(pending, _nothing(table))

    def settle(self, kept: Kept, accepted) -> None:
        """Owes what was pending, now that it is known whether that message was accepted."""
        for table, (owners, rows, *pending) in zip(self._tables, kept, strict=True):
            if pending:
                ids, left_out = (variable.read_value() for variable in pending)
                ids = tf.ensure_shape(tf.io.parse_tensor(ids, tf.int64), [None])
                left_out = tf.io.parse_tensor(left_out, tf.float32)
                left_out = tf.ensure_shape(left_out, [None, table.width])
                _write(owners, rows, (ids, left_out), accepted)

    def add(self, kept: Kept, pushed: Pushed) -> Pushed:
        """Rows to be pushed, with what they are owed."""
        sums = dict(pushed)
        for table, (owners, rows, *_) in zip(self._tables, kept, strict=True):
            for part in table.parts:
                places, values = pushed[part]
                ids = _ids(part, places)
                slots = ids % owners.shape[0]
                own = tf.expand_dims(tf.gather(owners, slots) == ids, 1)
                owed = tf.where(own, tf.gather(rows, slots), 0.0)
                sums[part] = places, values + owed
        return sums

    def left_out(self, pushed: Pushed, sent: Pushed) -> LeftOut:
        """What encoding has left out of rows: they are owed it, if the servers take this message.

        Args:
            pushed: as `add` returns it.
            sent: the same, as servers decode it.
        """
        found = {}
        for table in self._tables:
            ids = [_ids(part, pushed[part][0]) for part in table.parts]
            rows = [pushed[part][1] - sent[part][1] for part in table.parts]
            found[table.variable] = tf.concat(ids, 0), tf.concat(rows, 0)
        return found

    def remember(self, kept: Kept, left_out: LeftOut, taken) -> None:
        """At once where servers have taken the message, or as pending where they may yet.

        Args:
            taken: bool scalar, that they have.
        """
        for table, (owners, rows, *pending) in zip(self._tables, kept, strict=True):
            message = _one_a_slot(*left_out[table.variable], self.slots[table.variable])
            if pending:
                _assign(pending, message)
            else:
                _write(owners, rows, message, taken)


def _nobody(slots: int) -> tf.Tensor:
    return tf.fill([slots], tf.constant(NOBODY, tf.int64))


def _nothing(table: Table) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.zeros([0], tf.int64), tf.zeros([0, table.width])


def _serialized(ids, rows) -> list[tf.Tensor]:
    """Strings, since no task may be told of a variable of unknown shape."""
    return [tf.io.serialize_tensor(ids), tf.io.serialize_tensor(rows)]


def _assign(pending: Sequence[tf.Variable], message: tuple[tf.Tensor, tf.Tensor]) -> None:
    for variable, value in zip(pending, _serialized(*message) if pending else [], strict=True):
        variable.assign(value)


def _ids(part: Piece, places) -> tf.Tensor:
    return tf.cast(places, tf.int64) + part.start


def _one_a_slot(ids, rows, slots: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Of ids that share a slot the smallest: where they are sorted, the most frequent one."""
    own, index = tf.unique(ids % slots)
    first = tf.math.unsorted_segment_min(ids, index, tf.size(own))
    stays = ids == tf.gather(first, index)
    return tf.boolean_mask(ids, stays), tf.boolean_mask(rows, stays)


def _write(owners: tf.Variable, rows: tf.Variable, message, taken) -> None:
    """Puts rows into their slots, or none of them."""
    ids, values = message
    count = tf.where(taken, tf.size(ids), 0)
    slots = ids[:count] % owners.shape[0]
    owners.scatter_update(tf.IndexedSlices(ids[:count], slots))
    rows.scatter_update(tf.IndexedSlices(values[:count], slots))
