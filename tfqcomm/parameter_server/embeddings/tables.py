"""Which tables travel by rows, and which rows live where: ranges, spread over all servers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import keras
from absl import logging

from tfqcomm import _tf_private, checks
from tfqcomm.parameter_server.embeddings import lazy, placing
from tfqcomm.parameter_server.embeddings.named import is_named, named_tables
from tfqcomm.parameter_server.embeddings.stored import Stored, spread
from tfqcomm.parameter_server.partition import Piece

# Elements. Measured on loopback, where bytes cost least: with 2^17 a step takes as long either way,
# since rows take two calls one after the other, and with 2^18 two thirds as long.
ROWS_FROM = 1 << 18

AUTO = "auto"


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A weight of which only rows travel.

    Attributes:
        variable: its place among the model's trainable variables.
        weights: the model's variable.
        parts: its rows, in their order, one range on each server.
        named: whether `rows` was given it, and not only a trainer a threshold.
    """

    variable: int
    weights: keras.Variable
    parts: tuple[Piece, ...]
    named: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return self.parts[-1].stop

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.parts[0].shape[1]

    @property
    def name(self) -> str:
        """For people: of the layer, and of the weight."""
        return self.weights.path

    @property
    def way_out(self) -> str:
        """How to let it travel whole."""
        return _way_out(self.named)

    @property
    def stored(self) -> Stored:
        """Its rows on the servers, once it is there."""
        return cast(Stored, _tf_private.store_of(self.weights))


def check_rows_from(value) -> None:
    """Accepts "auto", None or a positive integer as `embedding_rows_from`."""
    if value != AUTO:
        checks.positive_integer_or_none("embedding_rows_from", value, or_else=f"'{AUTO}'")


def to_be_made(optimizer: keras.optimizers.Optimizer, rows_from: int | str | None) -> Callable:
    """Which weights of layers that are built are made on the servers: a test of layer, name, shape.

    Those that are given to `rows`; and the embeddings of `rows_from` elements, where those can be
    trained by rows.
    """
    least = rows_from
    if rows_from == AUTO:
        try:
            lazy.check(optimizer, "a table", "")
            least = ROWS_FROM
        except ValueError:
            least = None

    def chosen(layer, name: str, shape: tuple[int, int]) -> bool:
        large = isinstance(least, int) and shape[0] * shape[1] >= least
        plain = is_embedding(layer) and name == "embeddings" and not layer.lora_rank
        return is_named(layer, name) or (large and plain)

    return chosen


def find_tables(model: keras.Model, rows_from: int | str | None, servers: int) -> list[Table]:
    """The weights of a model that travel by rows, if they are trained.

    Those that `rows` was given, and those of layers that look up as `keras.layers.Embedding` does
    and have at least `rows_from` elements; none of these if that is None. With "auto" those are
    left out, and a warning says so, that cannot be trained by rows.

    Raises:
        ValueError: for what cannot be trained by rows.
    """
    places = {id(v): i for i, v in enumerate(model.trainable_variables)}

    def tables_of(variables: Iterable[keras.Variable], named: bool) -> list[Table]:
        found = [
            Table(places[id(v)], v, _spread(places[id(v)], v.shape[0], v.shape[1], servers), named)
            for v in variables
            if id(v) in places
        ]
        for table in found:
            _check(table)
            lazy.check(model.optimizer, table.name, table.way_out)
        return found

    named = tables_of(named_tables(model), True)
    own = {id(table.weights) for table in named}
    large = [v for v in _large(model, rows_from) if id(v) not in own]
    try:
        tables = named + tables_of(large, False)
    except ValueError as error:
        if rows_from != AUTO:
            raise
        logging.warning("Embedding tables travel whole. %s", error)
        tables = named
    return sorted(tables, key=lambda table: table.variable)


def is_embedding(layer: keras.layers.Layer) -> bool:
    """Whether a layer looks up as `keras.layers.Embedding` does."""
    return getattr(type(layer), "call", None) is keras.layers.Embedding.call


def _large(model: keras.Model, rows_from: int | str | None) -> list[keras.Variable]:
    """The weights of embeddings with at least as many elements."""
    if rows_from is None:
        return []
    least = ROWS_FROM if rows_from == AUTO else cast(int, rows_from)
    return [
        layer.embeddings
        for layer in _tf_private.layers_of(model)
        if is_embedding(layer) and layer.input_dim * layer.output_dim >= least
    ]


def _check(table: Table) -> None:
    """Refuses what depends on rows that a batch does not touch, and what cannot be trained."""
    variable = table.weights
    if "float" not in variable.dtype:
        raise ValueError(
            f"The weight {table.name} must be of floats to travel by rows. {table.way_out} "
            f"Received: dtype={variable.dtype}"
        )
    constraint = variable.constraint
    if isinstance(constraint, keras.constraints.NonNeg):
        constraint = None
    for what, value in (("regularizer", variable.regularizer), ("constraint", constraint)):
        if value is not None:
            raise ValueError(
                f"Argument `{variable.name}_{what}` of {table.name} must be None where only the "
                "rows of a batch travel: it depends on the whole table. "
                f"{table.way_out} Received: {what}={type(value).__name__}"
            )


def _way_out(named: bool) -> str:
    if named:
        return "Do not give its layer to `tfqcomm.parameter_server.rows`, to let it travel whole."
    return "Give the trainer `embedding_rows_from=None` to pull and push whole tables."


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
    by_rows = {id(table.weights) for table in tables}
    for variable in elsewhere(model):
        if id(variable) not in by_rows:
            placing.bring_back(variable)
    for table in tables:
        placing.move(table.weights, servers)
    model.test_function = model.predict_function = None  # they may know tables where they were
    refuse_what_needs_tables(model)


def elsewhere(model: keras.Model) -> list[keras.Variable]:
    """The weights that are on servers, or in files."""
    return [v for v in model.weights if _tf_private.store_of(v) is not None]


def refuse_what_needs_tables(model: keras.Model) -> None:
    """Lets `model.fit` and `model.export` say why they cannot, where tables are elsewhere."""
    names = [variable.path for variable in elsewhere(model)]
    for method, what in {"make_train_function": "train it", "export": "export the model"}.items():
        vars(model).pop(method, None)
        if names:
            vars(model)[method] = functools.partial(_refuse, names[0], what)


def _refuse(name: str, what: str, *args, **kwargs) -> None:
    raise ValueError(
        f"The table {name} is not in this process: it lives on parameter servers, where the "
        f"trainer's `fit` trains it, or in a file of an export. To {what} here, load a file that "
        "`trainer.model.save` has written; or give the trainer `embedding_rows_from=None`, and the "
        "layer not to `tfqcomm.parameter_server.rows`."
    )
