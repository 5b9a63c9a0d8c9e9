"""The processes of a strategy: who takes part, who answers, and how what they wait for is ended."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.eager import context


def process_count(strategy: tf.distribute.Strategy) -> int:
    """Processes that take part in `strategy`'s collectives (1 unless it is multi-worker)."""
    return getattr(strategy.extended, "_num_workers", 1)


def process_rank(strategy: tf.distribute.Strategy) -> int:
    """This process' index in [0, process_count)."""
    return getattr(strategy.extended, "_id_in_cluster", 0)


def process_tasks(strategy: tf.distribute.Strategy) -> list[str]:
    """TensorFlow's name of every process in rank order."""
    cluster = strategy.extended._cluster_spec
    return [
        f"/job:{job}/replica:0/task:{task}"
        for job in ("chief", "worker")
        if job in cluster.jobs
        for task in range(cluster.num_tasks(job))
    ]


def process_addresses(strategy: tf.distribute.Strategy) -> list[str]:
    """`host:port` of every process in rank order; empty on a single process."""
    cluster = getattr(strategy.extended, "_cluster_spec", None)
    if not cluster:
        return []
    return [*cluster.as_dict().get("chief", []), *cluster.as_dict().get("worker", [])]


def abort_collectives(message: str) -> None:
    """Ends all collectives of this process, now and for good, with this error."""
    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, message)


def peer_failure(strategy: tf.distribute.Strategy, process: int, timeout_seconds: float):
    """Why a process does not answer; None if it does. Waits for the answer."""
    task = process_tasks(strategy)[process]
    try:
        context.context().check_collective_ops_peer_health(
            task, timeout_in_ms=int(timeout_seconds * 1000)
        )
    except tf.errors.OpError as error:
        return f"{task} is down: {error.message}"
    return None
