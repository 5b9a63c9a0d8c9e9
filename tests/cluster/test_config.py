"""Clusters as people write them: each is understood, or one sentence says what is wrong."""

import json

import pytest

from tfqcomm.cluster import Cluster, from_parts
from tfqcomm.cluster.config import KERAS_VARIABLES

WORKERS = ["host0:2222", "host1:2222"]
WORKER_0 = {"type": "worker", "index": 0}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("TF_CONFIG", *KERAS_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def read(monkeypatch, **config):
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    return Cluster.from_environment()


@pytest.mark.parametrize("text", [None, "", " ", "{}", '{"cluster": {}}'])
def test_a_process_alone_has_no_cluster(monkeypatch, text):
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    assert Cluster.from_environment() is None


def test_chief_and_workers(monkeypatch):
    cluster = read(
        monkeypatch,
        cluster={"worker": WORKERS, "chief": ["[fd00::2]:2222"], "evaluator": ["host3:1"]},
        task={"type": "worker", "index": "1"},  # as text, which TensorFlow takes, too
    )
    assert (cluster.task, cluster.address, cluster.rpc_layer) == ("worker 1", "host1:2222", "grpc")
    assert cluster.tasks["chief 0"] == "[fd00::2]:2222"
    assert cluster.only("chief", "worker").jobs == {"worker": WORKERS, "chief": ["[fd00::2]:2222"]}


def test_an_evaluator_need_not_be_in_the_cluster(monkeypatch):
    task = {"type": "evaluator", "index": 0}
    assert read(monkeypatch, cluster={"worker": WORKERS}, task=task).job == "evaluator"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cluster": {"worker": WORKERS}}, "TF_CONFIG must have 'task'."),
        ({"task": WORKER_0}, "TF_CONFIG must have 'cluster'."),
        ({"cluster": WORKERS, "task": WORKER_0}, "TF_CONFIG must have 'cluster'."),
        ({"cluster": {"worker": WORKERS}, "task": {"type": "worker"}}, "must have 'index' in"),
        ({"cluster": {"worker": WORKERS}, "task": {"index": 0}}, "must have 'type' in 'task'"),
        (
            {"cluster": {"master": WORKERS}, "task": WORKER_0},
            "a job must be one of chief, worker, ps, evaluator. Received: 'master' in",
        ),
        (
            {"cluster": {"worker": "host0:2222"}, "task": WORKER_0},
            "job 'worker' must be a list of addresses, one for each task. "
            "Received: worker='host0:2222'",
        ),
        (
            {"cluster": {"chief": WORKERS}, "task": {"type": "chief", "index": 0}},
            "there must be one chief; the others are workers. Received: chief=['host0:2222', ",
        ),
        (
            {"cluster": {"worker": WORKERS}, "task": {"type": "chief", "index": 0}},
            "must be one of the cluster's jobs, 'worker'. Received: task={'type': 'chief', ",
        ),
        (
            {"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": 2}},
            "must be an integer from 0 to 1, for there are 2 tasks of the job 'worker': "
            "['host0:2222', 'host1:2222']. Received: task={'type': 'worker', 'index': 2}",
        ),
        ({"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": -1}}, "from 0 to 1"),
        ({"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": "x"}}, "from 0 to 1"),
        ({"cluster": {"worker": WORKERS}, "task": {"type": "worker", "index": True}}, "from 0 to"),
        (
            {"cluster": {"chief": ["host1:2222"], "worker": WORKERS}, "task": WORKER_0},
            "chief 0 and worker 1 have the same address; each task needs its own. "
            "Received: 'host1:2222' twice",
        ),
        (
            {"cluster": {"worker": ["host0:2222", "host1"]}, "task": WORKER_0},
            "the address of worker 1 is wrong: it must have a host and a port, as in `host:2222`. "
            "Received: 'host1'",
        ),
        ({"cluster": {"worker": [2222]}, "task": WORKER_0}, "it must be text. Received: 2222"),
        ({"cluster": {"worker": [":2222"]}, "task": WORKER_0}, "it must have a host and a port"),
        ({"cluster": {"worker": ["host0:0"]}, "task": WORKER_0}, "a number from 1 to 65535"),
        ({"cluster": {"worker": ["host0:http"]}, "task": WORKER_0}, "a number from 1 to 65535"),
        (
            {"cluster": {"worker": ["fd00::2:2222"]}, "task": WORKER_0},
            "an IPv6 address needs brack",
        ),
        ({"cluster": {"worker": ["grpc://h:2222"]}, "task": WORKER_0}, "without a scheme"),
        (
            {"cluster": {"worker": ["h:2222 "]}, "task": WORKER_0},
            "without a scheme, a path or spac",
        ),
    ],
)
def test_a_mistake_in_tf_config_is_named_before_tensorflow_sees_it(monkeypatch, config, message):
    with pytest.raises(ValueError) as caught:
        read(monkeypatch, **config)
    assert message in str(caught.value)
    assert str(caught.value).startswith("TF_CONFIG")


@pytest.mark.parametrize("text", ["{'cluster'", "{nope}", "[1]", '"x"'])
def test_what_is_no_json_object_is_shown(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG must be .*An example: .*Received: "):
        Cluster.from_environment()


def set_keras_variables(monkeypatch, addresses=None, count=None, index=None):
    for name, value in zip(KERAS_VARIABLES, (addresses, count, index), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)


def test_keras_own_variables(monkeypatch):
    set_keras_variables(monkeypatch, "host0:2222, host1:2222", "2", "1")
    cluster = Cluster.from_environment()
    assert cluster.jobs == {"worker": WORKERS}
    assert cluster.task == "worker 1"


def test_tf_config_wins_over_keras_own_variables(monkeypatch):
    set_keras_variables(monkeypatch, "host5:2222,host6:2222", "2", "1")
    assert read(monkeypatch, cluster={"worker": WORKERS}, task=WORKER_0).address == "host0:2222"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host0:1,host1:1",), "must both be set"),
        ((None, "2", "0"), "must both be set"),
        (("host0:1", "2", "0"), "must have an address for each of the processes"),
        (("host0:1,host1:1", "2", "2"), "must be an integer from 0 to 1"),
        (("host0:1,host1:1", None, "first"), "must be an integer from 0 to 1"),
    ],
)
def test_a_mistake_in_keras_variables_is_named(monkeypatch, values, message):
    set_keras_variables(monkeypatch, *values)
    with pytest.raises(ValueError, match=message) as caught:
        Cluster.from_environment()
    assert str(caught.value).startswith("KERAS_DISTRIBUTION_")


def test_a_resolver_that_does_not_know_its_task():
    with pytest.raises(
        ValueError, match="set its `task_type` and `task_id`. Received: task_type=N"
    ):
        from_parts("KubernetesClusterResolver", {"worker": WORKERS}, None, None, None)
