"""Embedding tables whose rows alone travel: a worker pulls and pushes those of its batch."""

from tfqcomm.parameter_server.rows.lookups import Lookups
from tfqcomm.parameter_server.rows.payload import RowFormat
from tfqcomm.parameter_server.rows.shard import ServerRows
from tfqcomm.parameter_server.rows.tables import AUTO, Table, check_rows_from, find_tables

__all__ = [
    "AUTO",
    "Lookups",
    "RowFormat",
    "ServerRows",
    "Table",
    "check_rows_from",
    "find_tables",
]
