"""What the workers of `test_joining.py` do: each writes itself a cluster, and joins it."""

from __future__ import annotations

import json
import os

import keras
import tensorflow as tf

from tests.multi_process_functions import tf_config
from tfqcomm.cluster.config import KERAS_VARIABLES
from tfqcomm.distribute import MultiWorkerMirroredStrategy


def join(resolver=None, timeout_seconds=60.0):
    """Returns the sum of all workers' ranks + 1, or the error."""
    try:
        strategy = MultiWorkerMirroredStrategy(
            timeout_seconds=timeout_seconds, cluster_resolver=resolver
        )
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"

    @tf.function
    def total():
        context = tf.distribute.get_replica_context()
        return context.all_reduce("sum", tf.constant(float(_rank(strategy)) + 1))

    return float(strategy.run(total))


def _rank(strategy):
    resolver = strategy.cluster_resolver
    after_chief = resolver.task_type == "worker" and "chief" in resolver.cluster_spec().jobs
    return resolver.task_id + after_chief


def _addresses(host=None):
    addresses = tf_config()["cluster"]["worker"]
    return [f"{host}:{a.rpartition(':')[2]}" for a in addresses] if host else addresses


def _become(cluster, job, index):
    task = {"type": job, "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})


def as_chief_worker_and_evaluator():
    rank = tf_config()["task"]["index"]
    chief, worker, evaluator = _addresses()
    cluster = {"chief": [chief], "worker": [worker], "evaluator": [evaluator]}
    _become(cluster, ["chief", "worker", "evaluator"][rank], 0)
    return join()


def under_host(host):
    _become({"worker": _addresses(host)}, "worker", tf_config()["task"]["index"])
    return join()


def with_keras_variables():
    values = ",".join(_addresses()), "2", str(tf_config()["task"]["index"])
    del os.environ["TF_CONFIG"]
    os.environ.update(zip(KERAS_VARIABLES, values, strict=True))
    return join()


def under_slurm(first_port):
    os.environ.update(
        SLURM_PROCID=str(tf_config()["task"]["index"]),
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="localhost",
        SLURM_STEP_TASKS_PER_NODE="2",
    )
    del os.environ["TF_CONFIG"]
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=first_port, gpus_per_node=2, gpus_per_task=1, auto_set_gpu=False
    )
    return join(resolver)


def with_clusters_of_different_sizes():
    """Worker 0 was told of two workers, the others of three."""
    rank = tf_config()["task"]["index"]
    addresses = _addresses()
    _become({"worker": addresses[:2] if rank == 0 else addresses}, "worker", rank)
    return join(timeout_seconds=12.0)


def all_as_worker_0():
    _become({"worker": _addresses()}, "worker", 0)
    return join(timeout_seconds=8.0)


def with_others_that_never_come():
    rank = tf_config()["task"]["index"]
    absent = ["127.0.0.1:9", "no-such-host.invalid:2222"]
    _become({"worker": [*_addresses(), *absent]}, "worker", rank)
    return join(timeout_seconds=12.0)


def too_late():
    keras.Sequential([keras.Input([2]), keras.layers.Dense(2)])
    return join()
