"""The tasks of a parameter-server cluster, as the chief sees them: devices that may fail.

Embedded clusters live in the chief's own process, for examples and tests: their servers talk gRPC
over the loopback interface as real ones do. They cannot be stopped, so a process has one cluster.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private, pages
from tfqcomm import cluster as tasks
from tfqcomm.parameter_server.first_calls import first_calls

PATIENCE = 600  # seconds to wait for tasks that have not started yet
_connected: Cluster | None = None
# How HTTP/2, and so gRPC, begins: a preface, and a frame of SETTINGS that holds none.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """Scope of eager operations on a task that may fail."""
    with tf.device(device), _tf_private.executor_scope(device):
        yield


class Graphs:
    """The graphs of a function, one for each kind of arguments, for variables of any task.

    Traced by hand: TensorFlow would warn of "retracing", since every server and every trainer has
    functions of its own.

    Args:
        function: returns nothing, or tensors.
        kind_of: arguments -> what tells their kinds apart.
    """

    def __init__(self, function: Callable, kind_of: Callable = lambda *arguments: None):
        self._function = tf.function(function, autograph=False)
        self._kind_of = kind_of
        self._graphs: dict = {}
        self._tracing = threading.Lock()

    def __call__(self, *arguments):
        return self.of(*arguments)(*arguments)

    def of(self, *arguments):
        """The graph for arguments of this kind."""
        kind = self._kind_of(*arguments)
        with self._tracing:
            if kind not in self._graphs:
                graph = self._function.get_concrete_function(*arguments)
                # TensorFlow refuses to make a graph part of another when those variables are gone
                # that it was traced with, as they are of a worker that is lost.
                self._graphs[kind] = graph, graph.variables
        return self._graphs[kind][0]


class Errand:
    """Calls graphs on a task, and brings home the tensor they return: in one call, not two.

    The chief runs a function of which the graph is a part, on the task. A tensor that ends on the
    chief leaves nothing behind in TensorFlow, as one that is fetched from elsewhere does; and no
    thread of the task is blocked meanwhile, as it is by an operation that the task is given.

    Args:
        graphs: whose they are; operations without a device of their own run on the task.
        device: of the task.
    """

    def __init__(self, graphs: Graphs, device: str):
        self._graphs = graphs
        self._device = device
        self._home = tf.constant(0).device
        self._calls: dict = {}
        self._known: dict = {}  # call -> the generation in which it was made known

    def __call__(self, *arguments) -> np.ndarray:
        """What the graph returns; raises `tf.errors.OpError` if the task is gone."""
        with tf.device(self._home), _tf_private.executor_scope(self._device):
            graph = self._graphs.of(*arguments)
            if graph not in self._calls:
                self._calls[graph] = Graphs(functools.partial(self._call, graph))
            call = self._calls[graph].of(*arguments)
            self._make_known(call, arguments)
            with first_calls.together():
                return call(*arguments).numpy()

    def _make_known(self, call, arguments) -> None:
        generation = first_calls.generation
        if self._known.get(call) != generation:
            with first_calls.alone():
                _tf_private.instantiate(call, arguments, self._device)
            self._known[call] = generation

    def _call(self, graph, *arguments):
        with tf.device(self._device):
            result = graph(*arguments)
        with tf.device(self._home):
            return tf.identity(result)


class ServerLost(RuntimeError):
    """A parameter server is gone, and the weights with it."""


class Cluster:
    """Devices of workers and parameter servers.

    Attributes:
        workers, servers: device names in task order.
        addresses: device -> host:port.
        embedded: whether all of them live in this process.
    """

    def __init__(self, spec: tf.train.ClusterSpec, *, embedded: bool):
        jobs: dict[str, list[str]] = {"worker": [], "ps": []}
        self.addresses: dict[str, str] = {}
        for job, devices in jobs.items():
            for task in spec.task_indices(job):
                device = f"/job:{job}/replica:0/task:{task}"
                devices.append(device)
                self.addresses[device] = spec.task_address(job, task)
        self.workers, self.servers = jobs["worker"], jobs["ps"]
        self.spec = spec.as_dict()
        self.embedded = embedded

    def describe(self, device: str) -> str:
        """What people call a task."""
        job, task = device.split("/")[1], device.rpartition(":")[2]
        kind = "Worker" if job == "job:worker" else "Parameter server"
        return f"{kind} {task} ({self.addresses[device]})"

    def silent(self, device: str, seconds: float) -> RuntimeError:
        """The error for a task that was there and does not answer: of a server `ServerLost`."""
        kind = ServerLost if device in self.servers else RuntimeError
        return kind(
            f"{self.describe(device)} has not answered for {seconds:g} s, and is waited for: its "
            "process is stopped, or its machine is frozen or out of reach. Restart the cluster; "
            "`tfqcomm.callbacks.BackupAndRestore` resumes from the last backup. (`timeout_seconds` "
            "of the trainer says how long to wait.)"
        )


def greet(address: str, seconds: float) -> bool:
    """Whether the task at `address`, host:port, answers within so many seconds.

    The kernel accepts connections for a process that is stopped; what gRPC sends on a new one
    comes from the process itself.

    Raises:
        OSError: if there is no connection; a `ConnectionError` where nobody listens.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection:
        connection.sendall(_GREETING)
        try:
            if not connection.recv(1):
                raise ConnectionResetError(f"{address} has closed the connection")
        except TimeoutError:
            return False
    return True


def connect(
    resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
    workers: int,
    parameter_servers: int,
    timeout_seconds: float | None,
) -> Cluster:
    """The cluster of `resolver`, or that of TF_CONFIG, or an embedded one.

    Args:
        workers, parameter_servers: of an embedded cluster. One that exists already must have at
            least as many; the first ones are used.
        timeout_seconds: how long a task may be there and not answer; None: for ever.

    Raises:
        ValueError: where the cluster cannot be this process' own.
        ServerLost: where a parameter server does not answer.
        RuntimeError: where a worker does not.
    """
    if resolver is None and os.environ.get("TF_CONFIG"):
        tasks.Cluster.from_environment()  # says what is wrong with it
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if resolver is None:
        return _embedded(workers, parameter_servers)
    _check_task(resolver)
    return _connect(resolver, timeout_seconds, embedded=False)


def _check_task(resolver) -> None:
    spec = resolver.cluster_spec()
    jobs = spec.as_dict()
    if not jobs.get("worker") or not jobs.get("ps"):
        raise ValueError(
            "The cluster must have tasks of the jobs `worker` and `ps`; with the launcher: "
            "`python -m tfqcomm.launch --workers=2 --parameter_servers=1 script.py`. "
            f"Received: cluster={jobs}"
        )
    if resolver.task_type in ("worker", "ps"):
        raise ValueError(
            "The script runs on the chief only. Start the workers and the parameter servers with "
            "`python -m tfqcomm.launch --serve`. "
            f"Received: task={resolver.task_type} {resolver.task_id}"
        )


def _embedded(workers: int, parameter_servers: int) -> Cluster:
    if _connected is not None:
        if workers <= len(_connected.workers) and parameter_servers <= len(_connected.servers):
            return _first_of(_connected, workers, parameter_servers)
        raise ValueError(
            "An embedded cluster cannot grow: make the trainer with the most workers and "
            f"parameter servers first. This process has {len(_connected.workers)} and "
            f"{len(_connected.servers)}. Received: workers={workers}, "
            f"parameter_servers={parameter_servers}"
        )
    count = workers + parameter_servers
    reserved = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in reserved]
    for one in reserved:
        one.close()
    spec = tf.train.ClusterSpec({"worker": addresses[:workers], "ps": addresses[workers:]})
    config = tf.compat.v1.ConfigProto()
    # Steps that wait for one another must not take all the threads.
    config.inter_op_parallelism_threads = max(os.cpu_count() or 1, workers + 1)
    with tasks.loopback_only(addresses):
        for job in ("worker", "ps"):
            for task in spec.task_indices(job):
                tf.distribute.Server(spec, job, task, protocol="grpc", config=config)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, rpc_layer="grpc")
    return _connect(resolver, None, embedded=True)


def _first_of(cluster: Cluster, workers: int, parameter_servers: int) -> Cluster:
    jobs = {
        "worker": cluster.spec["worker"][:workers],
        "ps": cluster.spec["ps"][:parameter_servers],
    }
    return Cluster(tf.train.ClusterSpec(jobs), embedded=cluster.embedded)


def _connect(resolver, timeout_seconds: float | None, *, embedded: bool) -> Cluster:
    global _connected
    spec = resolver.cluster_spec()
    if _connected is not None:
        if _connected.spec != spec.as_dict():
            raise ValueError(
                "This process is connected to another cluster already, and cannot leave it. "
                f"Received: cluster={spec.as_dict()} after {_connected.spec}"
            )
        return _connected
    pages.tell_malloc()
    # A lost task must be an error, not an endless wait.
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")
    cluster = Cluster(spec, embedded=embedded)
    for device in (*cluster.workers, *cluster.servers):
        _wait_for(cluster, device, timeout_seconds)
    with tasks.loopback_only(cluster.addresses.values()):
        # What connects this process; its variables and its `run` are not used.
        tf.distribute.ParameterServerStrategy(resolver)
    _tf_private.share_functions()
    _connected = cluster
    return cluster


def _wait_for(cluster: Cluster, device: str, timeout_seconds: float | None) -> None:
    """Returns when a task answers: TensorFlow's own retries are minutes apart."""
    began = silent_since = time.monotonic()
    while True:
        try:
            if greet(cluster.addresses[device], seconds=1.0):
                return
            if timeout_seconds and time.monotonic() - silent_since > timeout_seconds:
                raise cluster.silent(device, timeout_seconds)
        except OSError as error:  # it has not started yet
            silent_since = time.monotonic()
            if silent_since - began > PATIENCE:
                raise TimeoutError(
                    f"{cluster.describe(device)} has not started within {PATIENCE} s: {error}"
                ) from error
        time.sleep(0.1)
