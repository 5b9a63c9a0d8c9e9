"""Embedding tables whose rows alone travel: a worker pulls and pushes those of its batch."""

from tfqcomm.parameter_server.rows.lookups import Lookups
from tfqcomm.parameter_server.rows.payload import RowFormat
from tfqcomm.parameter_server.rows.shard import ServerRows
from tfqcomm.parameter_server.rows.tables import ROWS_FROM, Table, find_tables

__all__ = ["ROWS_FROM", "Lookups", "RowFormat", "ServerRows", "Table", "find_tables"]
