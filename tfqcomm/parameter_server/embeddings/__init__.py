"""Embedding tables whose rows alone travel: a worker pulls and pushes those of its batch."""

from tfqcomm.parameter_server.embeddings.feedback import RowFeedback, check_feedback
from tfqcomm.parameter_server.embeddings.lookups import Lookups, naming_strange_ids
from tfqcomm.parameter_server.embeddings.named import rows
from tfqcomm.parameter_server.embeddings.payload import RowFormat
from tfqcomm.parameter_server.embeddings.placing import on_servers, placing_tables
from tfqcomm.parameter_server.embeddings.shard import ServerRows
from tfqcomm.parameter_server.embeddings.stored import Shard, Stored
from tfqcomm.parameter_server.embeddings.tables import (
    AUTO,
    Table,
    check_rows_from,
    elsewhere,
    find_tables,
    refuse_what_needs_tables,
    settle,
    to_be_made,
)

__all__ = [
    "AUTO",
    "Lookups",
    "RowFeedback",
    "RowFormat",
    "ServerRows",
    "Shard",
    "Stored",
    "Table",
    "check_feedback",
    "check_rows_from",
    "elsewhere",
    "find_tables",
    "naming_strange_ids",
    "on_servers",
    "placing_tables",
    "refuse_what_needs_tables",
    "rows",
    "settle",
    "to_be_made",
]
