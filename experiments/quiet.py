"""TensorFlow without its start-up messages, so that an experiment prints its own lines alone."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import BinaryIO


def import_tensorflow() -> None:
    """Imports TensorFlow, and shows what its C++ log says meanwhile only where that matters."""
    with _stderr_held() as held:
        import tensorflow as tf

        import tfqcomm

        tf.config.list_physical_devices()  # looks for GPUs
        held.seek(0)
        lines = [line for line in held.readlines() if not tfqcomm.launch.is_chatter(line)]
        held.seek(0)
        held.truncate()
        held.writelines(lines)


@contextlib.contextmanager
def _stderr_held() -> Iterator[BinaryIO]:
    """Writes file descriptor 2, past which C++ does not get, to a file; shows it at the end."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield held
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
