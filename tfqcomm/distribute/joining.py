"""Joining the other processes: what is checked before, and what is said when it fails."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

import tensorflow as tf
from absl import logging

from tfqcomm.cluster import Cluster, RollCall, from_parts, loopback_only

Resolver: TypeAlias = tf.distribute.cluster_resolver.ClusterResolver

_TOO_LATE = (
    "tfqcomm.distribute.MultiWorkerMirroredStrategy must be made before anything else of "
    "TensorFlow: TensorFlow has been started already, by an operation, a variable, a tensor, a "
    "model or a list of logical devices, and can no longer be joined to other processes. Make the "
    "strategy in the first lines of the script, right after the imports."
)
_served: set[str] = set()  # addresses at which this process itself listens


def checked(init: Callable) -> Callable:
    """Wraps the constructor of a strategy that takes `cluster_resolver`.

    The cluster is checked before TensorFlow sees it, and what TensorFlow says of a cluster that
    does not come together is completed by who is missing.
    """

    @functools.wraps(init)
    def checked_init(strategy, *args, cluster_resolver: Resolver | None = None, **kwargs):
        cluster = read_cluster(cluster_resolver)
        if cluster is not None:
            leave_if_evaluator(cluster)
            cluster = _of_workers(cluster)
            _check_port(cluster)
        resolver = _resolver_for(cluster, cluster_resolver)
        with _joining(cluster):
            init(strategy, *args, cluster_resolver=resolver, **kwargs)

    return checked_init


def read_cluster(resolver: Resolver | None = None) -> Cluster | None:
    """The cluster that a strategy would join; None for a process alone.

    Calls nothing of TensorFlow's that would start it.

    Raises:
        ValueError: in one sentence what is wrong with it.
    """
    if resolver is None:
        return Cluster.from_environment()
    try:
        jobs = resolver.cluster_spec().as_dict()
    except json.JSONDecodeError:
        return Cluster.from_environment()  # says what is wrong with TF_CONFIG
    if not jobs:
        return None
    name = type(resolver).__name__
    return from_parts(name, jobs, resolver.task_type, resolver.task_id, resolver.rpc_layer)


def leave_if_evaluator(cluster: Cluster) -> None:
    """Ends this process, successfully, if it is the cluster's evaluator.

    Raises:
        SystemExit: with code 0.
    """
    if cluster.job == "evaluator":
        logging.warning(
            "This process is the evaluator of its cluster. Nothing is to be done: the workers "
            "evaluate by themselves, in `fit(validation_data=...)`. To evaluate checkpoints beside "
            "the training, do it before the strategy is made, where "
            "`tfqcomm.distribute.read_cluster().job == 'evaluator'`."
        )
        sys.exit(0)


def _of_workers(cluster: Cluster) -> Cluster:
    if cluster.jobs.get("ps"):
        raise ValueError(
            f"{cluster.source}: MultiWorkerMirroredStrategy has no parameter servers. Leave out "
            "the job 'ps', or train with tfqcomm.parameter_server.Trainer. "
            f"Received: ps={cluster.jobs['ps']}"
        )
    return cluster.only("chief", "worker")


def _check_port(cluster: Cluster) -> None:
    """One server serves all strategies of a process; another's must not be there."""
    if cluster.address not in _served:
        cluster.check_port()
        _served.add(cluster.address)


def _resolver_for(cluster: Cluster | None, given: Resolver | None) -> Resolver:
    """The user's own, unless TensorFlow could not use it as it is."""
    resolvers = tf.distribute.cluster_resolver
    if given is None or isinstance(given, resolvers.TFConfigClusterResolver):
        empty = not os.environ.get("TF_CONFIG", "{}").strip()  # over which it stumbles
        given = None if empty else given or resolvers.TFConfigClusterResolver()
    slurm = isinstance(given, resolvers.SlurmClusterResolver)  # may count GPUs that are not there
    jobs = cluster.jobs if cluster else {}
    if given is not None and not slurm and given.cluster_spec().as_dict() == jobs:
        return given
    return resolvers.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs),
        task_type=cluster.job if cluster else None,
        task_id=cluster.index if cluster else None,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer=cluster.rpc_layer if cluster else None,
    )


@contextlib.contextmanager
def _joining(cluster: Cluster | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if cluster is not None:
            stack.enter_context(loopback_only(cluster.tasks.values()))
            call = stack.enter_context(RollCall(cluster))
        try:
            yield
        except (RuntimeError, tf.errors.OpError) as error:
            text = getattr(error, "message", str(error))
            if "at program startup" in text:
                raise RuntimeError(f"{_TOO_LATE} TensorFlow says: {text}") from error
            if cluster is None:
                raise
            raise _explained(text, cluster, call) from error


def _explained(text: str, cluster: Cluster, call: RollCall) -> Exception:
    if "group with size" in text:
        return ValueError(
            f"The tasks were given clusters of different sizes. {cluster.source} of this process, "
            f"{cluster.task}, has {len(cluster.tasks)} tasks: {cluster.jobs}. Give all tasks the "
            f"same `cluster`. TensorFlow says: {text}"
        )
    return RuntimeError(f"{text}\n{call.report()}")
