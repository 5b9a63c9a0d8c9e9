"""Embedding tables whose rows alone travel: a worker pulls and pushes those of its batch."""

from tfqcomm.parameter_server.rows.lookups import Lookups, naming_strange_ids
from tfqcomm.parameter_server.rows.payload import RowFormat
from tfqcomm.parameter_server.rows.placing import on_servers, placing_tables
from tfqcomm.parameter_server.rows.shard import ServerRows
from tfqcomm.parameter_server.rows.stored import Shard, Stored
from tfqcomm.parameter_server.rows.tables import (
    AUTO,
    Table,
    check_rows_from,
    elsewhere,
    find_tables,
    may_be_made,
    refuse_what_needs_tables,
    settle,
)

__all__ = [
    "AUTO",
    "Lookups",
    "RowFormat",
    "ServerRows",
    "Shard",
    "Stored",
    "Table",
    "check_rows_from",
    "elsewhere",
    "find_tables",
    "may_be_made",
    "naming_strange_ids",
    "on_servers",
    "placing_tables",
    "refuse_what_needs_tables",
    "settle",
]
