"""Processes that join, however their cluster is written, and what they say when they cannot."""

from __future__ import annotations

import contextlib
import json
import socket
import types

import pytest
import tensorflow as tf

from tests.distribute import joining_functions as functions
from tests.multi_process import run_workers
from tfqcomm.distribute import MultiWorkerMirroredStrategy, joining, read_cluster
from tfqcomm.launch import reserve_ports

SPEC = tf.train.ClusterSpec({"worker": ["host0:2222", "host1:2222"]})


def set_tf_config(monkeypatch, cluster, job, index=0):
    task = {"type": job, "index": index}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))


def test_a_mistake_is_said_before_tensorflow_is_started(monkeypatch):
    set_tf_config(monkeypatch, {"worker": ["host0:2222"]}, "worker", 1)
    with pytest.raises(ValueError, match="an integer from 0 to 0, for there are 1 tasks"):
        MultiWorkerMirroredStrategy()


def test_parameter_servers_are_not_of_this_strategy(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}
    set_tf_config(monkeypatch, cluster, "worker")
    message = r"has no parameter servers. Leave out the job 'ps', or train .* Received: ps=\['c:1'"
    with pytest.raises(ValueError, match=message):
        MultiWorkerMirroredStrategy()


def test_an_evaluator_ends_with_success(monkeypatch, caplog):
    """A failure would be started again by its cluster manager, for ever."""
    set_tf_config(monkeypatch, {"worker": ["a:1"], "evaluator": ["b:1"]}, "evaluator")
    with pytest.raises(SystemExit) as caught:
        MultiWorkerMirroredStrategy()
    assert caught.value.code == 0
    assert "This process is the evaluator of its cluster. Nothing is to be done" in caplog.text
    assert read_cluster().job == "evaluator"  # what a script may ask before


def test_two_tasks_with_one_index_on_one_machine(monkeypatch):
    monkeypatch.delenv("TF_GRPC_REUSE_PORT", raising=False)
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        set_tf_config(monkeypatch, {"worker": ["a:1", address]}, "worker", 1)
        message = f"this process is worker 1 and cannot listen .* Received: worker 1 at {address}"
        with pytest.raises(ValueError, match=message):
            MultiWorkerMirroredStrategy()


def test_a_resolver_that_knows_no_task_is_told_what_to_set():
    """TensorFlow's own for Kubernetes, given a client that lists two pods."""
    pods = [
        types.SimpleNamespace(
            metadata=types.SimpleNamespace(name=f"pod-{i}"),
            status=types.SimpleNamespace(phase="Running", host_ip=f"10.0.0.{i}"),
        )
        for i in range(2)
    ]
    client = types.SimpleNamespace(
        list_pod_for_all_namespaces=lambda label_selector: types.SimpleNamespace(items=pods)
    )
    resolver = tf.distribute.cluster_resolver.KubernetesClusterResolver(override_client=client)
    with pytest.raises(ValueError, match="set its `task_type` and `task_id`"):
        MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    resolver.task_type, resolver.task_id = "worker", 1
    assert read_cluster(resolver).tasks == {
        "worker 0": "10.0.0.0:8470",
        "worker 1": "10.0.0.1:8470",
    }
    assert read_cluster(resolver).task == "worker 1"


def test_a_task_that_was_given_to_the_resolver_needs_none_in_tf_config(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:1"]}}))
    own = tf.distribute.cluster_resolver.TFConfigClusterResolver("worker", 1)
    cluster = read_cluster(own)
    assert cluster.task == "worker 1"
    assert joining._resolver_for(cluster, own) is own
    monkeypatch.setenv("TF_CONFIG", "{nope")
    with pytest.raises(ValueError, match="TF_CONFIG must be JSON"):
        read_cluster(own)
    monkeypatch.setenv("TF_CONFIG", "")
    assert joining._resolver_for(read_cluster(own), own) is not own


def test_the_users_own_resolver_is_used():
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        SPEC, task_type="worker", task_id=0
    )
    cluster = joining.read_cluster(resolver)
    assert joining._resolver_for(cluster, resolver) is resolver


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_a_process_alone_keeps_its_gpus(monkeypatch, text):
    """TensorFlow looks for them itself only under its own resolver; others must count them."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * 2)
    resolver = joining._resolver_for(read_cluster(), None)
    assert resolver.cluster_spec().as_dict() == {}
    own = isinstance(resolver, tf.distribute.cluster_resolver.TFConfigClusterResolver)
    assert own or resolver.num_accelerators() == {"GPU": 2}
    assert own == (text != "")


pytestmark = pytest.mark.timeout(400)


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_chief_its_workers_and_an_evaluator():
    chief, worker, evaluator = run_workers(functions.as_chief_worker_and_evaluator, workers=3)
    assert chief == worker == 3.0
    assert evaluator == "SystemExit: 0"


@contextlib.contextmanager
def ports_in_a_row(count):
    """Two ports side by side."""
    while True:
        (first,) = reserve_ports(1)
        number = first.getsockname()[1]
        first.close()
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in reserve_ports(count, number):
                stack.enter_context(port)
            yield number
            return


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_host_names_and_ipv6(host):
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    assert run_workers(functions.under_host, args={"host": host}) == [3.0, 3.0]


@pytest.mark.slow
@pytest.mark.multi_process
def test_keras_own_launch_variables():
    assert run_workers(functions.with_keras_variables) == [3.0, 3.0]


@pytest.mark.slow
@pytest.mark.multi_process
def test_slurm_on_machines_without_gpus():
    """TensorFlow's resolver cannot be told that there are none: it counts one a task."""
    with ports_in_a_row(2) as first:
        assert run_workers(functions.under_slurm, args={"first_port": first}) == [3.0, 3.0]


@pytest.mark.slow
@pytest.mark.multi_process
def test_clusters_of_different_sizes_are_told_apart():
    errors = run_workers(functions.with_clusters_of_different_sizes, workers=3)
    told = {i: error for i, error in enumerate(errors) if "different sizes" in str(error)}
    assert told, errors  # those whom TensorFlow tells; the others have waited
    for i, error in told.items():
        assert "ValueError: The tasks were given clusters of different sizes. TF_CONFIG of" in error
        assert f"this process, worker {i}, has {3 if i else 2} tasks: {{'worker': [" in error


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_told_to_be_the_same_worker():
    first, second = sorted(run_workers(functions.all_as_worker_0), key=len)
    assert "ValueError: TF_CONFIG: this process is worker 0 and cannot listen on its port" in first
    assert "RuntimeError: Timeout waiting for the cluster, timeout is 8 seconds" in second
    assert "It waited for\n  worker 1 (127.0.0.1:" in second


@pytest.mark.slow
@pytest.mark.multi_process
def test_those_who_never_came_are_named_and_nobody_else():
    for error in run_workers(functions.with_others_that_never_come):
        assert "Timeout waiting for the cluster, timeout is 12 seconds" in error
        assert "It waited for\n  worker 2 (127.0.0.1:9): nobody listens there" in error
        assert "\n  worker 3 (no-such-host.invalid:2222): there is no such host" in error


@pytest.mark.multi_process
def test_a_strategy_made_too_late_says_what_to_do():
    (error,) = run_workers(functions.too_late, workers=1)
    assert error.startswith(
        "RuntimeError: tfqcomm.distribute.MultiWorkerMirroredStrategy must be made before anything"
    )
    assert "Make the strategy in the first lines of the script, right after the imports." in error
