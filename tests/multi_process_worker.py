"""The process of one worker of `tests.multi_process`: runs the function and pickles its result."""

from __future__ import annotations

import faulthandler
import importlib
import os
import pathlib
import pickle
import signal
import sys
import threading


def main(function: str, devices: str, arguments: str, result: str) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # The parent asks where we hang.
    leash = threading.Thread(target=_end_with_parent, daemon=True)
    leash.start()
    if int(devices) > 1:
        _make_logical_devices(int(devices))
    module, name = function.split(":")
    value = getattr(importlib.import_module(module), name)(
        **pickle.loads(pathlib.Path(arguments).read_bytes())
    )
    unfinished = pathlib.Path(f"{result}.unfinished")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.rename(result)
    # A worker that ends early is a lost peer to the others: the parent ends all of us together.
    leash.join()


def _end_with_parent() -> None:
    """Ends this process, and what it started, when the parent ends: then its pipe closes."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


def _make_logical_devices(count: int) -> None:
    import tensorflow as tf  # Only here: some functions do without.

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
