"""The tasks of a cluster that a chief drives."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import tensorflow as tf
from tensorflow.python.eager import cancellation, context, execute, executor


@functools.cache
def _executor(device: str) -> executor.Executor:
    return executor.new_executor(enable_async=False)


@contextlib.contextmanager
def executor_scope(device: str) -> Iterator[None]:
    """Scope in which eager operations have a status of their own, one for each device.

    Otherwise an operation that fails on a lost task makes those of other threads fail, too.
    """
    own = _executor(device)
    try:
        with context.executor_scope(own):
            yield
    except tf.errors.OpError:
        own.clear_error()  # it would be raised once more when the process ends
        raise


def instantiate(graph: tf.types.experimental.ConcreteFunction, arguments: Sequence, device: str):
    """Gives all tasks their parts of a graph, and runs nothing of it.

    TensorFlow does both when a graph is first called. A call that is cancelled beforehand ends in
    between. (A scope of `CancellationManagerContext` would cancel the calls of other threads, too.)

    Args:
        graph: what will be called.
        arguments: of the calls; values do not matter.
        device: whose executor they have.
    """
    here = context.context()
    options = here.function_call_options.as_attrs()
    cancelled = cancellation.CancellationManager()
    cancelled.start_cancel()
    with contextlib.suppress(tf.errors.CancelledError), executor_scope(device):
        execute.execute_with_cancellation(
            graph.function_def.signature.name,
            num_outputs=len(graph.outputs),
            inputs=[*_tensors(graph, arguments), *graph.captured_inputs],
            attrs=tuple(itertools.chain(*options.items())),
            ctx=here,
            cancellation_manager=cancelled,
        )


def _tensors(graph, arguments: Sequence) -> list[tf.Tensor]:
    """What stands for the arguments when the graph is called."""
    kinds = graph.function_type
    return kinds.unpack_inputs(kinds.bind(*arguments))


def share_functions(chief: str = "chief") -> None:
    """Lets the tasks of the cluster call functions that were traced before it was connected.

    TensorFlow gives a task, when it joins, all functions there are, but not when the cluster is
    connected first: so all leave for a moment. Codecs are traced once per process.
    """
    everybody = context.get_server_def()
    alone = type(everybody)()
    alone.CopyFrom(everybody)
    del alone.cluster.job[:]
    alone.cluster.job.extend(job for job in everybody.cluster.job if job.name == chief)
    for server_def in (alone, everybody):
        context.context().update_server_def(server_def)


def reconnect() -> None:
    """Takes up again with the tasks of the cluster that were started anew; fails if any is gone.

    Meanwhile other threads may go on working with the rest of the cluster.
    """
    context.context().update_server_def(context.get_server_def())
