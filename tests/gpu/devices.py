"""Two devices to train on: GPUs; or, to try the suite itself, logical CPUs."""

from __future__ import annotations

import functools
import os

import tensorflow as tf

KIND = os.environ.get("TFQCOMM_GPU_SUITE_ON", "GPU")  # or CPU
MEGABYTES = 2048  # of the one GPU that plays two


@functools.cache
def two_devices() -> list[str]:
    """Names of two devices; empty without a GPU. To be called before TensorFlow does anything.

    A single GPU is split in two: everything but NCCL works there as on two.
    """
    physical = tf.config.list_physical_devices(KIND)
    if KIND == "GPU" and len(physical) == 1:
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=MEGABYTES)
        tf.config.set_logical_device_configuration(physical[0], [limit] * 2)
    names = [device.name for device in tf.config.list_logical_devices(KIND)[:2]]
    return [name.removeprefix("/device:") for name in names]
