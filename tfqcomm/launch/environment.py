"""What makes a process one task of a cluster on this machine: ports, variables, its parent."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
RESTART_COUNT = "TFQCOMM_RESTART_COUNT"  # the variable that says how often a task was started anew
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # the variable of TensorFlow's C++ log, and a level of it
ERRORS_ONLY = "2"


def reserve_ports(count: int, first: int = 0) -> list[socket.socket]:
    """Binds `count` free ports and holds them until the sockets are closed.

    TensorFlow's servers bind the same ports on top (`task_environment` lets them), so no other
    program can take a port between its reservation and its use.

    Args:
        count: The number of ports.
        first: The first of `count` ports in a row; 0 takes any free ones.

    Raises:
        OSError: A port is taken.
    """
    sockets = []
    with contextlib.ExitStack() as undo:
        for port in range(first, first + count) if first else [0] * count:
            if port:  # SO_REUSEPORT, below, would share it with a server that also sets it.
                _check_free(port)
            reserved = undo.enter_context(socket.socket())
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(("", port))
            sockets.append(reserved)
        undo.pop_all()
    return sockets


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A recent use is no use.
        probe.bind(("", port))


def cluster_of(addresses: Sequence[str], parameter_servers: int = 0) -> dict[str, list[str]]:
    """Deals addresses to jobs: all to workers, or one to a chief, then workers, then servers."""
    if not parameter_servers:
        return {"worker": list(addresses)}
    chief, *workers = addresses[:-parameter_servers]
    return {"chief": [chief], "worker": workers, "ps": list(addresses[-parameter_servers:])}


def task_environment(
    cluster: Mapping[str, list[str]], job: str, index: int, restarts: int = 0
) -> dict[str, str]:
    """Returns the environment variables that make a process the task `index` of `job`.

    Args:
        cluster: the addresses of each job.
        job: of the task.
        index: of the task.
        restarts: how often it was started before.
    """
    hosts = {address.rpartition(":")[0] for address in itertools.chain(*cluster.values())}
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    variables = {
        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": job, "index": index}}),
        "TF_GRPC_REUSE_PORT": "true",  # The reservation keeps the port bound.
        # gRPC would ask an HTTP proxy, where one is set, for the tasks of this very machine.
        "no_proxy": ",".join([*([no_proxy] if no_proxy else []), *sorted(hosts)]),
        "PYTHONUNBUFFERED": "1",
        RESTART_COUNT: str(restarts),
    }
    if "ps" in cluster:  # The coordinator must see a lost server as an error, not wait for it.
        variables["GRPC_FAIL_FAST"] = os.environ.get("GRPC_FAIL_FAST", "use_caller")
    return variables


def die_with_parent(parent: int) -> None:
    """Has the calling process killed when `parent` ends, even by SIGKILL (Linux only).

    As `preexec_fn` of a `Popen`, only where signals do not raise: Python forks through its hooks
    then, in which exceptions are ignored, KeyboardInterrupt among them.

    Args:
        parent: The process id of the parent, as the parent knows it.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It ended before we asked.
        os._exit(128 + signal.SIGKILL)
