"""What one worker of `tests.multi_process` does: runs the function and pickles its result."""

from __future__ import annotations

import faulthandler
import importlib
import pathlib
import pickle
import signal
import threading
from collections.abc import Mapping
from typing import Any


def work(function: str, devices: int, args: Mapping[str, Any], result: pathlib.Path) -> None:
    """Runs the function, and stays: a worker that ends early is a lost peer to the others."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # The parent asks where we hang.
    if devices > 1:
        _make_logical_devices(devices)
    module, name = function.split(":")
    value = getattr(importlib.import_module(module), name)(**args)
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_bytes(pickle.dumps(value))
    unfinished.rename(result)
    threading.Event().wait()  # until the parent ends all of us together


def _make_logical_devices(count: int) -> None:
    import tensorflow as tf  # Only here: some functions do without.

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )
