"""The tasks of a parameter-server cluster that run no code of the user's."""

from __future__ import annotations

import os
import signal

from tfqcomm.cluster import Cluster, loopback_only


def serve() -> None:
    """Runs the worker or parameter server that `TF_CONFIG` names, until the process is ended.

    The chief, which runs the user's script under `tf.distribute.ParameterServerStrategy`, drives
    it from outside.

    Raises:
        ValueError: what is wrong with `TF_CONFIG`, or that the task's port is taken.
    """
    # Nothing has to be finished; and Python's own handler would wait for `join`, for ever.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    task = Cluster.from_environment()
    if task is None:
        raise ValueError("TF_CONFIG must say which task of which cluster this is. It is not set.")
    task.check_port()
    import tensorflow as tf  # Only here: the launcher itself does without.

    from tfqcomm import pages

    pages.tell_malloc()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    cluster = resolver.cluster_spec()
    config = tf.compat.v1.ConfigProto()
    # Steps that wait for one another must not take all the threads.
    threads = int(os.environ.get("TF_NUM_INTEROP_THREADS", 0)) or os.cpu_count() or 1
    config.inter_op_parallelism_threads = max(threads, cluster.num_tasks("worker") + 1)
    with loopback_only(task.tasks.values()):
        server = tf.distribute.Server(
            cluster, resolver.task_type, resolver.task_id, protocol="grpc", config=config
        )
    server.join()
