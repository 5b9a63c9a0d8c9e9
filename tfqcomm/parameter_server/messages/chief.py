"""The chief's copy of what the servers hold: a plain model and its optimizer.

Tables whose rows travel are not copied: in the model and in its optimizer stand variables whose
values are those of the servers, to be asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfqcomm import _tf_private
from tfqcomm.parameter_server import optimizers
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.embeddings import RowFormat, ServerRows, Stored, Table
from tfqcomm.parameter_server.embeddings.codecs import RowCodec
from tfqcomm.parameter_server.flat import assign_flat, flat_values
from tfqcomm.parameter_server.messages.server import Server
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format


class ChiefCopy:
    """Moves weights, moving statistics and slots between the chief's model and the servers.

    Args:
        model: built and compiled.
        pieces: in the order of its trainable variables, without those of tables.
        tables: of which only rows travel.
        servers: that hold them; the first one also the moving statistics.
    """

    def __init__(
        self,
        model: keras.Model,
        pieces: Sequence[Piece],
        tables: Sequence[Table],
        servers: Sequence[Server],
    ):
        self._weights = list(model.trainable_variables)
        self._pieces = pieces
        self._servers = servers
        self._statistics = _tf_private.statistics(model)
        self._optimizer = optimizers.inner(model.optimizer)
        with _tf_private.as_one_row([table.weights for table in tables]):
            found = optimizers.slots_by_variable(self._optimizer, self._weights)
        self._shared, self._slots = found
        for table in tables:
            _leave_slots_there(table, self._slots[table.variable], servers)

    def send(self) -> None:
        """Gives the servers what the chief has."""
        held = self._held()
        for server in self._servers:
            shared = optimizers.slots_of(server.optimizer)[0]
            for there, here in zip(shared, self._shared, strict=True):
                there.assign(here.numpy())
        for piece in self._pieces:
            whole = self._weights[piece.variable]
            split = piece.shape != tuple(whole.shape)
            for there, here in zip(held[piece], [whole, *self._slots[piece.variable]], strict=True):
                value = here.numpy()
                # A slot may have another shape, but then its variable is not split.
                there.assign(piece.cut(value) if split else value)
        self._servers[0].statistics.assign(flat_values(self._statistics))
        for server in self._servers:
            server.outdate()

    def fetch(self) -> None:
        """Takes what the servers have."""
        parts: dict[int, list[list[np.ndarray]]] = {}
        values: dict[Piece, list[np.ndarray]] = {}
        for server in self._servers:
            held = server.held()
            with on(server.device):  # as an operation of the chief, a read is a call to the server
                values |= {p: [v.numpy() for v in held[p]] for p in server.format.pieces}
        for piece in self._pieces:  # in the order of their rows
            parts.setdefault(piece.variable, []).append(values[piece])
        for index, found in parts.items():
            variables = [self._weights[index], *self._slots[index]]
            for variable, of_pieces in zip(variables, zip(*found, strict=True), strict=True):
                variable.assign(_whole(of_pieces))
        first = self._servers[0]
        with on(first.device):
            shared = [variable.numpy() for variable in optimizers.slots_of(first.optimizer)[0]]
            statistics = first.statistics.numpy()
        for here, value in zip(self._shared, shared, strict=True):
            if here is not _learning_rate(self._optimizer):
                here.assign(value)
        assign_flat(self._statistics, statistics)

    def _held(self) -> dict[Piece, list]:
        """For each piece its variable on its server, and the optimizer's slots."""
        return {piece: held for s in self._servers for piece, held in s.held().items()}

    def send_learning_rate(self, last: float | None) -> float | None:
        """Passes on what a callback may have set, if it is not `last`; None with a schedule."""
        if _learning_rate(self._optimizer) is None:
            return None
        value = float(self._optimizer.learning_rate)
        if value != last:
            for server in self._servers:
                server.optimizer.learning_rate.assign(value)
        return value


def make_servers(
    model: keras.Model,
    pieces: Sequence[Piece],
    tables: Sequence[Table],
    row_codec: RowCodec,
    devices: Sequence[str],
    format_of: Callable[[tuple[Piece, ...], int], Format],
    workers: int,
    share: float,
    inboxes: bool,
) -> list[Server]:
    """Servers with the model's present weights.

    Args:
        model: built and compiled.
        pieces: in the order of its trainable variables, without those of tables.
        tables: of which only rows travel; they are on the servers already.
        row_codec: how they do.
        devices: of the servers.
        format_of: the pieces and the number of statistics of a server -> what it exchanges.
        workers, share, inboxes: see `Server`.
    """
    servers = []
    for index, device in enumerate(devices):
        here = [(t, t.parts[index], t.stored.shards[index]) for t in tables if index < len(t.parts)]
        parts = tuple(part for _, part, _ in here)
        own = tuple(p for p in pieces if p.server == index)
        variables = [model.trainable_variables[p.variable] for p in own]
        elsewhere = sum(part.size for part in parts)
        statistics = flat_values(_tf_private.statistics(model) if index == 0 else [])
        servers.append(
            Server(
                device,
                dataclasses.replace(format_of(own, statistics.size), elsewhere=elsewhere),
                [p.cut(v.numpy()) for p, v in zip(own, variables, strict=True)],
                variables,
                statistics,
                optimizers.inner(model.optimizer),
                workers,
                share,
                inboxes,
                _make_rows(model, device, RowFormat(parts, row_codec), here, workers),
            )
        )
    return servers


def _make_rows(model: keras.Model, device: str, format: RowFormat, here, workers: int):
    wholes = [table.weights for table, _, _ in here]
    values = [shard.variable for _, _, shard in here]
    with on(device):
        half = optimizers.worker_half(model.optimizer)
        return ServerRows(device, format, values, wholes, workers, half)


def _leave_slots_there(table: Table, slots: Sequence[keras.Variable], servers) -> None:
    """Lets the slots that the chief's optimizer has of a table be those of the servers.

    What was loaded into them before is sent; made by the trainer they have one row.
    """
    held = [servers[part.server].rows.held()[part][1:] for part in table.parts]
    for slot, variables in zip(slots, zip(*held, strict=True), strict=True):
        stored = Stored(
            [
                dataclasses.replace(shard, variable=variable)
                for shard, variable in zip(table.stored.shards, variables, strict=True)
            ]
        )
        if slot.shape[0] == table.rows > 1:
            stored.write(slot.numpy())
        _tf_private.keep_elsewhere(slot, stored, stored.shape)


def _learning_rate(optimizer: keras.optimizers.Optimizer) -> keras.Variable | None:
    """The variable that holds it; None where a schedule does."""
    value = optimizer.learning_rate
    return value if isinstance(value, keras.Variable) else None


def _whole(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
