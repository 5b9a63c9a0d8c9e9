"""TensorFlow's graphs: what is asked of them, and what is kept beside them."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.autograph.core import ag_ctx as autograph_ctx
from tensorflow.python.autograph.impl import api as autograph
from tensorflow.python.ops import control_flow_util, resource_variable_ops


def in_xla_context() -> bool:
    """Whether ops are being built for XLA: there is no public way to ask."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def local_variable(value, *, name: str, device: str | None = None) -> tf.Variable:
    """A plain variable of this process, which no strategy mirrors and no checkpoint tracks.

    `tf.Variable` would be mirrored by the strategy in whose scope the caller happens to run.
    """
    with tf.init_scope(), tf.device(device):
        return resource_variable_ops.ResourceVariable(value, trainable=False, name=name)


def not_to_convert(function: Callable) -> Callable:
    """Marks what AutoGraph is to call as it is, and go on with what that calls, as in TensorFlow.

    `tf.autograph.experimental.do_not_convert` would switch AutoGraph off for the user's code, too.
    """
    return autograph.autograph_artifact(function)


def with_python_function(function, wrap: Callable[[Callable], Callable]):
    """A tf.function like `function`, of what `wrap` makes of its Python function."""
    python_function = function.python_function
    if function._autograph:
        python_function = autograph.tf_convert(python_function, autograph_ctx.control_status_ctx())
    # TensorFlow must see that it is a tf.function, and not wrap it once more.
    return autograph.autograph_artifact(function._clone(wrap(python_function)))


def converted(function: Callable) -> Callable:
    """`function` as `tf.distribute.Strategy.run` would convert it for AutoGraph."""
    status = autograph_ctx.control_status_ctx()
    return autograph.tf_convert(function, status, convert_by_default=False)


def run_independently(op: tf.Operation) -> None:
    """Lets an operation run whenever its inputs are there.

    Otherwise a function runs whatever has a state and no variable in program order.
    """
    manager = getattr(op.graph, "experimental_acd_manager", None)
    if manager is not None:
        manager.run_independently(op)
