"""Which tables travel by rows, and which rows live where: ranges, spread over all servers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import cast

import keras
from absl import logging

from tfqcomm import _tf_private, checks
from tfqcomm.parameter_server.partition import Piece
from tfqcomm.parameter_server.rows import lazy, placing
from tfqcomm.parameter_server.rows.stored import Stored, spread

# Elements. Measured on loopback, where bytes cost least: with 2^17 a step takes as long either way,
# since rows take two calls one after the other, and with 2^18 two thirds as long.
ROWS_FROM = 1 << 18

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Table:
    """The weights of an embedding layer.

    Attributes:
        variable: its place among the model's trainable variables.
        layer: whose weights these are.
        parts: its rows, in their order, one range on each server.
    """

    variable: int
    layer: keras.layers.Embedding
    parts: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return self.layer.input_dim

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.layer.output_dim

    @property
    def name(self) -> str:
        """For people."""
        return self.layer.embeddings.path

    @property
    def weights(self) -> keras.Variable:
        """The model's variable."""
        return self.layer.embeddings

    @property
    def stored(self) -> Stored:
        """Its rows on the servers, once it is there."""
        return cast(Stored, _tf_private.store_of(self.weights))


def check_rows_from(value) -> None:
    """Accepts "auto", None or a positive integer as `embedding_rows_from`."""
    if value != AUTO:
        checks.positive_integer_or_none("embedding_rows_from", value, or_else=f"'{AUTO}'")


def may_be_made(optimizer: keras.optimizers.Optimizer, rows_from: int | str | None) -> int | None:
    """From how many elements on a table is made on the servers; None where it will travel whole."""
    if rows_from != AUTO:
        return rows_from if isinstance(rows_from, int) else None
    try:
        lazy.check(optimizer, "a table")
    except ValueError:
        return None
    return ROWS_FROM


def find_tables(model: keras.Model, rows_from: int | str | None, servers: int) -> list[Table]:
    """The tables of a model that have at least `rows_from` elements; none if that is None.

    Layers count that look up as `keras.layers.Embedding` does, and whose weights are trained. With
    "auto" those are left out, and a warning says so, that cannot be trained by rows.

    Raises:
        ValueError: for what cannot be trained by rows.
    """
    if rows_from == AUTO:
        try:
            return find_tables(model, ROWS_FROM, servers)
        except ValueError as error:
            logging.warning("Embedding tables travel whole. %s", error)
            return []
    if rows_from is None:
        return []
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}
    tables = []
    for layer in _tf_private.layers_of(model):
        if not placing.is_embedding(layer):
            continue
        place = places.get(id(layer.embeddings))
        if place is None or layer.input_dim * layer.output_dim < rows_from:
            continue
        _check(layer)
        parts = _spread(place, layer.input_dim, layer.output_dim, servers)
        tables.append(Table(place, layer, parts))
    if tables:
        lazy.check(model.optimizer, tables[0].name)
    return sorted(tables, key=lambda table: table.variable)


def _check(layer: keras.layers.Embedding) -> None:
    """Refuses what depends on rows that a batch does not touch."""
    whole = {
        "embeddings_regularizer": layer.embeddings_regularizer,
        "embeddings_constraint": None
        if isinstance(layer.embeddings_constraint, keras.constraints.NonNeg)
        else layer.embeddings_constraint,
    }
    for argument, value in whole.items():
        if value is not None:
            raise ValueError(
                f"Argument `{argument}` of {layer.embeddings.path} must be None where only the "
                "rows of a batch travel: it depends on the whole table. Give the trainer "
                "`embedding_rows_from=None` to train the table as any other weight. "
                f"Received: {argument}={type(value).__name__}"
            )


def _spread(variable: int, rows: int, width: int, servers: int) -> tuple[Piece, ...]:
    return tuple(
        Piece(variable, start, stop, (stop - start, width), server)
        for server, (start, stop) in enumerate(spread(rows, servers))
    )


def settle(model: keras.Model, tables: Sequence[Table], servers: Sequence[str]) -> None:
    """Moves these tables to the servers, where they are not yet, and brings others here.

    Args:
        model: that is built.
        tables: all that travel by rows.
        servers: their devices.
    """
    by_rows = {id(table.layer) for table in tables}
    for layer in _tf_private.layers_of(model):
        if id(layer) in by_rows:
            placing.move(layer, servers)
        elif placing.is_embedding(layer) and layer.built:
            placing.bring_back(layer)
    model.test_function = model.predict_function = None  # they may know tables where they were
    refuse_what_needs_tables(model)


def elsewhere(model: keras.Model) -> list[keras.layers.Embedding]:
    """The layers whose tables are on servers, or in files."""
    return [
        layer
        for layer in _tf_private.layers_of(model)
        if placing.is_embedding(layer)
        and layer.built
        and _tf_private.store_of(layer.embeddings) is not None
    ]


def refuse_what_needs_tables(model: keras.Model) -> None:
    """Lets `model.fit` and `model.export` say why they cannot, where tables are elsewhere."""
    names = [layer.embeddings.path for layer in elsewhere(model)]
    for method, what in {"make_train_function": "train it", "export": "export the model"}.items():
        vars(model).pop(method, None)
        if names:
            vars(model)[method] = functools.partial(_refuse, names[0], what)


def _refuse(name: str, what: str, *args, **kwargs) -> None:
    raise ValueError(
        f"The table {name} is not in this process: it lives on parameter servers, where the "
        f"trainer's `fit` trains it, or in a file of an export. To {what} here, load a file that "
        "`trainer.model.save` has written; or give the trainer `embedding_rows_from=None`."
    )
