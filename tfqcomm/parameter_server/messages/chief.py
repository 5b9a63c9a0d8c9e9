"""The chief's copy of what the servers hold: a plain model and its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np

from tfqcomm import _tf_private
from tfqcomm.parameter_server import optimizers
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.flat import assign_flat, flat_values
from tfqcomm.parameter_server.messages.server import Server
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.payload import Format
from tfqcomm.parameter_server.rows import RowFormat, ServerRows, Table
from tfqcomm.parameter_server.rows.codecs import RowCodec


class ChiefCopy:
    """Moves weights, moving statistics and slots between the chief's model and the servers.

    Args:
        model: built and compiled.
        pieces: in the order of its trainable variables, those of tables too.
        servers: that hold them; the first one also the moving statistics.
    """

    def __init__(self, model: keras.Model, pieces: Sequence[Piece], servers: Sequence[Server]):
        self._weights = list(model.trainable_variables)
        self._pieces = pieces
        self._servers = servers
        self._statistics = _tf_private.statistics(model)
        self._optimizer = optimizers.inner(model.optimizer)
        self._shared, self._slots = optimizers.slots_by_variable(self._optimizer, self._weights)

    def send(self) -> None:
        """Gives the servers what the chief has."""
        for server in self._servers:
            shared = optimizers.slots_of(server.optimizer)[0]
            for there, here in zip(shared, self._shared, strict=True):
                there.assign(here.numpy())
            for piece, held in server.held().items():
                whole = self._weights[piece.variable]
                split = piece.shape != tuple(whole.shape)
                for there, here in zip(held, [whole, *self._slots[piece.variable]], strict=True):
                    value = here.numpy()
                    # A slot may have another shape, but then its variable is not split.
                    there.assign(piece.cut(value) if split else value)
        self._servers[0].statistics.assign(flat_values(self._statistics))
        for server in self._servers:
            server.outdate()

    def fetch(self) -> None:
        """Takes what the servers have."""
        weights: list[list[np.ndarray]] = [[] for _ in self._slots]
        slots: list[list[list[np.ndarray]]] = [[[] for _ in own] for own in self._slots]
        values = {}
        for server in self._servers:
            for piece, held in server.held().items():
                values[piece] = [variable.numpy() for variable in held]
        for piece in self._pieces:  # in the order of their rows
            weight, *rest = values[piece]
            weights[piece.variable].append(weight)
            for parts, value in zip(slots[piece.variable], rest, strict=True):
                parts.append(value)
        for variable, parts in zip(self._weights, weights, strict=True):
            variable.assign(_whole(parts))
        for variables, wholes in zip(self._slots, slots, strict=True):
            for variable, parts in zip(variables, wholes, strict=True):
                variable.assign(_whole(parts))
        shared = optimizers.slots_of(self._servers[0].optimizer)[0]
        for here, there in zip(self._shared, shared, strict=True):
            if here is not _learning_rate(self._optimizer):
                here.assign(there.numpy())
        assign_flat(self._statistics, self._servers[0].statistics.numpy())

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
        pieces: in the order of its trainable variables, those of tables too.
        tables: of which only rows travel.
        row_codec: how they do.
        devices: of the servers.
        format_of: the pieces and the number of statistics of a server -> what it exchanges.
        workers, share, inboxes: see `Server`.
    """
    servers = []
    for index, device in enumerate(devices):
        parts = tuple(p for table in tables for p in table.parts if p.server == index)
        own = tuple(p for p in pieces if p.server == index and p not in parts)
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
                _make_rows(model, device, RowFormat(parts, row_codec), workers),
            )
        )
    return servers


def _make_rows(model: keras.Model, device: str, format: RowFormat, workers: int) -> ServerRows:
    wholes = [model.trainable_variables[p.variable] for p in format.parts]
    values = [p.cut(v.numpy()) for p, v in zip(format.parts, wholes, strict=True)]
    with on(device):
        half = optimizers.worker_half(model.optimizer)
        return ServerRows(device, format, values, wholes, workers, half)


def _learning_rate(optimizer: keras.optimizers.Optimizer) -> keras.Variable | None:
    """The variable that holds it; None where a schedule does."""
    value = optimizer.learning_rate
    return value if isinstance(value, keras.Variable) else None


def _whole(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
