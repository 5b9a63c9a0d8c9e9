"""What the workers of `test_communication_options.py` do: trace a step, and read its graph."""

from __future__ import annotations

import keras
import tensorflow as tf

import tfqcomm

METHODS = {  # name -> compressor, schedule and optimizer of a strategy
    "none": (None, "auto", "adam"),
    "dense": ("bfloat16", "dense", "adam"),
    "all-gather": ("block_sign", "all_gather", "adam"),
    "two-phase": ("block_sign", "two_phase", "adam"),
    "Leader SGD": (None, "auto", "leader"),
}


def hints_in(graph: tf.compat.v1.GraphDef) -> list[tuple[str, str]]:
    """(op, communication hint) of the collectives of a graph and of the functions in it."""
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return sorted(
        {
            (node.op, node.attr["communication_hint"].s.decode())
            for node in nodes
            if node.op.startswith("Collective")
        }
    )


def hints(implementation: str | None) -> dict[str, list[tuple[str, str]]]:
    """The hints in a training step of each method; None leaves TensorFlow's options alone."""
    return {name: _hints_of_step(_options(implementation), *how) for name, how in METHODS.items()}


def hints_of_own_all_reduce() -> list[tuple[str, str]]:
    """Those of a program's own `all_reduce` that asks for NCCL, on a strategy that does not."""
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy()

    def total(value):
        context = tf.distribute.get_replica_context()
        return context.all_reduce("sum", value + 1, options=_options("NCCL"))

    @tf.function
    def step(value):
        return strategy.run(total, args=(value,))

    return hints_in(step.get_concrete_function(tf.ones([8])).graph.as_graph_def())


def _options(implementation):
    if implementation is None:
        return None
    return tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation[implementation]
    )


def _hints_of_step(options, compressor, schedule, optimizer):
    strategy = tfqcomm.distribute.MultiWorkerMirroredStrategy(
        compressor, schedule=schedule, min_size=0, communication_options=options
    )
    with strategy.scope():
        model = keras.Sequential([keras.Input([512]), keras.layers.Dense(520)])
        if optimizer == "leader":
            optimizer = tfqcomm.optimizers.LeaderSGD(0.1, local_period=1, global_period=1)
        model.compile(optimizer, "mse")
        model.optimizer.build(model.trainable_variables)
    x, y = tf.ones([8, 512]), tf.ones([8, 520])
    model.fit(x, y, batch_size=8, verbose=0)

    @tf.function
    def step(x, y):
        return strategy.run(model.train_step, args=((x, y),))

    return hints_in(step.get_concrete_function(x, y).graph.as_graph_def())
