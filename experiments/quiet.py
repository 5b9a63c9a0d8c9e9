"""TensorFlow without its start-up messages, so that an experiment prints its own lines alone."""

from __future__ import annotations

import os
import sys
import tempfile


def import_tensorflow() -> None:
    """Imports TensorFlow, and shows what its C++ log says meanwhile only where that matters.

    That log writes to file descriptor 2, past Python's `sys.stderr`.
    """
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        lines_that_matter = list
        try:
            lines_that_matter = _import()
        finally:  # a failure shows all of them
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in lines_that_matter(held.read().splitlines()):
                print(line.decode(errors="replace"), file=sys.stderr)


def _import():
    import tensorflow as tf

    import tfqcomm

    tf.config.list_physical_devices()  # looks for GPUs
    return lambda lines: [line for line in lines if not tfqcomm.launch.is_chatter(line)]
