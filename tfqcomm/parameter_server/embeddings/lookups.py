"""What layers look up in a worker's graph, where their tables are elsewhere.

take(table, ids) --> unique --> by server --> rows, pulled --> watched --> gathered
                                            gradients of these rows, summed by id --> pushed

Which ids are asked for is known inside a layer's call alone: so, while a step is traced, a reader
of our own answers for the table's variable, and who reads the whole of it gets an error.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

import keras
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.embeddings.reads import by_lookup
from tfqcomm.parameter_server.embeddings.shard import ServerRows
from tfqcomm.parameter_server.embeddings.tables import Table
from tfqcomm.parameter_server.partition import Piece


class Lookups:
    """The lookups of a step, found anew whenever one is traced.

    Args:
        tables: that live on servers.
        servers: the rows of each.

    Attributes:
        pulled: of each lookup so far the table's place, unique ids int64[r], rows float32[r, d].
    """

    def __init__(self, tables: Sequence[Table] = (), servers: Sequence[ServerRows] = ()):
        self.tables = {table.variable: table for table in tables}
        self.pulled: list[tuple[int, tf.Tensor, tf.Tensor]] = []
        self._servers = list(servers)
        self._words: list[tuple[tf.Tensor, tf.Tensor]] = []

    @property
    def rows(self) -> list[tf.Tensor]:
        """What was pulled, float32[r, d] of each lookup: what gradients are taken of."""
        return [rows for _, _, rows in self.pulled]

    @property
    def words(self) -> tuple[tf.Tensor, tf.Tensor]:
        """How many were sent to ask for rows, and how many came back."""
        zero = tf.zeros([], tf.int32)
        sent, received = zip(*self._words, strict=True) if self._words else ([], [])
        return tf.add_n([zero, *sent]), tf.add_n([zero, *received])

    @contextlib.contextmanager
    def replacing(self, tape: tf.GradientTape) -> Iterator[None]:
        """Scope in which rows of tables are pulled from servers, which `tape` watches."""
        self.pulled, self._words = [], []
        graph = tf.compat.v1.get_default_graph()
        with contextlib.ExitStack() as readers:
            for table in self.tables.values():
                reader = functools.partial(self._read, table, tape, graph)
                readers.enter_context(_tf_private.answering(table.weights, reader))
            yield

    def scope(self, mapping: Sequence[tuple[keras.Variable, tf.Tensor]]) -> keras.StatelessScope:
        """A scope with these values, in which nobody can read a table."""
        return _Scope(mapping, {id(table.weights): table for table in self.tables.values()})

    def summed(self, gradients: Sequence) -> dict[int, tf.IndexedSlices]:
        """For each table the gradients of the rows of this step, each row once.

        Args:
            gradients: of `rows`; None where a lookup did not matter.

        Returns:
            From the table's place among the weights; a table that no loss depends on is missing.
        """
        found: dict[int, list[tuple[tf.Tensor, tf.Tensor]]] = {}
        for (variable, ids, _), gradient in zip(self.pulled, gradients, strict=True):
            if gradient is not None:
                found.setdefault(variable, []).append((ids, _dense(gradient, tf.size(ids))))
        slices = {}
        for variable, parts in found.items():
            ids, rows = _by_id(parts)
            slices[variable] = tf.IndexedSlices(rows, ids)
        return slices

    def _read(self, table: Table, tape, graph, ids, name: str | None = None):
        """Rows of a table, in place of its variable."""
        if tf.compat.v1.get_default_graph() is not graph:
            raise ValueError(
                f"The rows of {table.name} must not be read within a loop, a condition or a "
                "function of its own: they are pulled once per step. Call the layer outside, on "
                f"all ids at once. {table.way_out}"
            )

        def pull(unique):
            rows = self._pull(table, unique)
            tape.watch(rows)
            self.pulled.append((table.variable, unique, rows))
            return rows

        return by_lookup(table.weights, ids, pull)

    def _pull(self, table: Table, ids) -> tf.Tensor:
        """float32[r, d]: each range of rows from its server."""
        found = []
        by_part = _by_part(table, ids)
        for part, (places, _) in zip(table.parts, by_part, strict=True):
            rows, per_row = self._servers[part.server].pulled(part, places)
            # Not the size of the words: TensorFlow would send these to the chief to count them.
            self._words.append((tf.size(places), tf.size(places) * per_row))
            found.append(rows)
        order = [order for _, order in by_part]
        return tf.ensure_shape(tf.dynamic_stitch(order, found), [None, table.width])

    def apart(self, gradients: Sequence) -> tuple[list, dict[int, tf.Tensor]]:
        """Gradients as a norm may take them: with float32[r, d] for tables; and the rows' ids."""
        ids = {
            i: gradients[i].indices
            for i in self.tables
            if isinstance(gradients[i], tf.IndexedSlices)
        }
        return [g.values if i in ids else g for i, g in enumerate(gradients)], ids

    def split(
        self, gradients: Sequence, ids: Mapping[int, tf.Tensor]
    ) -> dict[Piece, tuple[tf.Tensor, tf.Tensor]]:
        """What is pushed: for each part of each table places in it, and rows.

        Args:
            gradients, ids: as of `apart`.
        """
        pushed = {}
        for variable, table in self.tables.items():
            own, rows = tf.zeros([0], tf.int64), tf.zeros([0, table.width])
            if variable in ids:
                own, rows = ids[variable], gradients[variable]
            for part, (places, order) in zip(table.parts, _by_part(table, own), strict=True):
                pushed[part] = places, tf.gather(rows, order)
        return pushed


class _Scope(keras.StatelessScope):
    """One in which whole tables are not to be had."""

    def __init__(self, mapping, tables: Mapping[int, Table]):
        super().__init__(mapping, collect_losses=True)
        self._tables = tables

    def get_current_value(self, variable):
        """The value in this scope."""
        table = self._tables.get(id(variable))
        if table is not None:
            raise ValueError(
                f"The weight {table.name} must be read by `keras.ops.take(..., ids, axis=0)`, "
                "`tf.gather` or `tf.nn.embedding_lookup` alone, where only the rows of a batch "
                "travel: nothing may read the whole of it, such as a layer that shares it, a "
                f"regularizer or a loss. {table.way_out}"
            )
        return super().get_current_value(variable)


@contextlib.contextmanager
def naming_strange_ids() -> Iterator[None]:
    """Scope that runs a graph with lookups: its error for an id says nothing else.

    Raises:
        ValueError: for an id that a table does not have.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"(The ids of .* Received: id=)\] \[(-?\d+)\]", error.message)
        if found is None:
            raise
        raise ValueError(found[1] + found[2]) from error


def _by_part(table: Table, ids) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """For each part of a table the places of its rows in it, and their places among `ids`."""
    count = len(table.parts)
    starts = tf.constant([part.start for part in table.parts[1:]], tf.int64)
    owner = tf.searchsorted(starts, ids, side="right")
    places = tf.dynamic_partition(ids, owner, count)
    order = tf.dynamic_partition(tf.range(tf.size(ids)), owner, count)
    return [
        (tf.cast(own - part.start, tf.int32), at)
        for part, own, at in zip(table.parts, places, order, strict=True)
    ]


def _dense(gradient, rows) -> tf.Tensor:
    """The gradient of pulled rows: of those that were gathered several times the sum."""
    if isinstance(gradient, tf.IndexedSlices):
        gradient = tf.math.unsorted_segment_sum(gradient.values, gradient.indices, rows)
    return tf.cast(gradient, tf.float32)


def _by_id(parts: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> tuple[tf.Tensor, tf.Tensor]:
    """Unique ids of several lookups, and the sums of their rows."""
    if len(parts) == 1:
        return parts[0]
    ids, places = tf.unique(tf.concat([own for own, _ in parts], 0))
    rows = tf.concat([rows for _, rows in parts], 0)
    return ids, tf.math.unsorted_segment_sum(rows, places, tf.size(ids))
