"""TensorFlow's register of kernels, and the functions that a graph calls: for tests only.

The wheel for x86 registers its kernels for GPUs also where there is none.
"""

from __future__ import annotations

import functools

import tensorflow as tf
from tensorflow.python.framework import kernels


@functools.cache
def kernels_on(device_type: str, op_type: str) -> tuple:
    """The `KernelDef`s that run ops of `op_type` on devices such as "GPU".

    Those registered for every device come last, as they do where TensorFlow looks for one.
    """
    found = kernels.get_registered_kernels_for_op(op_type).kernel
    return tuple(
        kernel
        for device in (device_type, "DEFAULT")
        for kernel in found
        if kernel.device_type == device and not kernel.label
    )


def called_graph(graph: tf.Graph, name: str) -> tf.Graph:
    """The body of the function `name` that an op in `graph` calls."""
    return graph._get_function(name).graph
