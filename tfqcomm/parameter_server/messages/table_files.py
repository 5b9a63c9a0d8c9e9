"""Tables in the files of a backup, which servers write and read themselves.

    server 0 of 2   writes rows 0 to n   -.
    server 1 of 2   writes rows n to 2n  -+-> one checkpoint of TensorFlow's, of sliced tensors
                                              --> server 1 of 3 reads the rows that it holds

The chief only joins what they have written: all of them must see the directory.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator

import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.parameter_server.cluster import on
from tfqcomm.parameter_server.embeddings.shard import SavedRows
from tfqcomm.parameter_server.fleet import Fleet
from tfqcomm.parameter_server.messages.memory import Memories
from tfqcomm.parameter_server.messages.program import Program
from tfqcomm.parameter_server.messages.worker import Worker

_NAME = "tables"  # of the checkpoint within a backup's directory


class TableFiles:
    """The tables of a training, for backups: it holds nothing of them.

    Args:
        fleet: whose servers hold them.
        program: what lies where.
        memories: of the workers, from which those of rows may be left out.
    """

    def __init__(self, fleet: Fleet[Worker], program: Program, memories: Memories):
        self._fleet = weakref.ref(fleet)
        self._program = weakref.ref(program)
        self._memories = memories

    def save(self, directory: str) -> None:
        """Lets the servers write rows, slots and moments into a new directory.

        Raises:
            OSError: if the chief does not see what they have written.
        """
        directory = os.path.abspath(directory)
        os.makedirs(directory)
        prefixes = sorted(self._on_servers(_save, directory))
        try:
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=prefixes,
                destination_prefix=os.path.join(directory, _NAME),
                delete_old_dirs=False,
            )
        except (tf.errors.NotFoundError, tf.errors.DataLossError) as error:
            raise OSError(
                "The directory of a backup must be on a file system that the chief and all "
                "parameter servers share: tables that live on servers alone are written there by "
                f"these. Received: backup_dir={os.path.dirname(directory)!r} ({error.message})"
            ) from error

    def restore(self, directory: str) -> None:
        """Gives servers the rows that they hold, wherever they were before.

        Raises:
            ValueError: if the backup is one of other tables or of another optimizer.
        """
        prefix = os.path.join(os.path.abspath(directory), _NAME)
        found = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
        self._on_servers(_check, found)
        self._on_servers(_restore, prefix)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Scope in which weights, slots and moments of tables seem to have no rows."""
        program = self._program()
        variables = []
        if program is not None:
            tables = program.lookups.tables.values()
            variables = [*(table.weights for table in tables), *program.optimizer.variables]
        self._memories.rows_left_out = True
        try:
            with _tf_private.left_out(variables):
                yield
        finally:
            self._memories.rows_left_out = False

    def _on_servers(self, call: Callable, *arguments) -> list:
        """What `call` returns for all that servers have to save, in one list."""
        fleet = self._fleet()
        if fleet is None:
            return []
        found = fleet.in_parallel(
            [
                lambda s=server: call(s.device, s.rows.saved(), *arguments)
                for server in fleet.servers
            ]
        )
        return [one for of_server in found for one in of_server]


def _save(device: str, saved: list[SavedRows], directory: str) -> list[str]:
    """The prefixes of the files that one server has written."""
    prefixes = []
    with on(device):
        for rows in saved:
            for start, stop in rows.blocks():
                name = f"{rows.name.replace('/', '-')}-{start:012d}.part"
                prefixes.append(os.path.join(directory, name))
                tf.raw_ops.SaveV2(
                    prefix=prefixes[-1],
                    tensor_names=[rows.name],
                    shape_and_slices=[rows.slice(start, stop)],
                    tensors=[rows.read(start, stop)],
                )
    return prefixes


def _check(device: str, saved: list[SavedRows], found: dict[str, list[int]]) -> list:
    for rows in saved:
        if list(rows.shape) != found.get(rows.name):
            raise ValueError(
                "A backup must be of the same tables and of the same optimizer. Expected "
                f"{rows.name} of the shape {list(rows.shape)}. Received: "
                f"{found.get(rows.name, 'nothing of this name')}"
            )
    return []


def _restore(device: str, saved: list[SavedRows], prefix: str) -> list:
    with on(device):
        for rows in saved:
            for start, stop in rows.blocks():
                (value,) = tf.raw_ops.RestoreV2(
                    prefix=prefix,
                    tensor_names=[rows.name],
                    shape_and_slices=[rows.slice(start, stop)],
                    dtypes=[rows.dtype],
                )
                rows.write(start, value)
    return []
