"""What a machine can know of addresses: who listens there, and whether they are its own."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests import network
from tests.multi_process import WITHOUT_TENSORFLOW
from tfqcomm.cluster import Cluster, RollCall, addresses, loopback_only, roll_call


@contextlib.contextmanager
def listener(host="", port=0):
    """A server as TensorFlow's: on all interfaces."""
    with socket.create_server((host, port)) as server:
        yield server.getsockname()[1]


def cluster_at(*where, index=0):
    return Cluster("TF_CONFIG", {"worker": list(where)}, "worker", index)


def test_a_port_in_use_is_named_with_its_task(monkeypatch):
    monkeypatch.delenv("TF_GRPC_REUSE_PORT", raising=False)
    with listener() as port:
        cluster = cluster_at("10.0.0.1:2222", f"127.0.0.1:{port}", index=1)
        with pytest.raises(ValueError) as caught:
            cluster.check_port()
    assert "this process is worker 1 and cannot listen on its port: Address already in use" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"Received: worker 1 at 127.0.0.1:{port}")
    cluster.check_port()  # now it is free


def test_a_port_that_is_only_reserved_for_the_task_is_free(monkeypatch):
    monkeypatch.setenv("TF_GRPC_REUSE_PORT", "true")
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        port = reserved.getsockname()[1]
        cluster_at(f"127.0.0.1:{port}").check_port()
        with socket.socket() as other:  # another process has been told to be the same task
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            other.bind(("", port))
            other.listen()
            with pytest.raises(ValueError, match="Address already in use"):
                cluster_at(f"127.0.0.1:{port}").check_port()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ports are claimed on Linux only")
def test_of_two_processes_that_find_a_port_free_at_once_one_gets_it(monkeypatch):
    """Both look before either listens: TensorFlow's servers would share the port."""
    monkeypatch.delenv("TF_GRPC_REUSE_PORT", raising=False)
    with listener() as port:
        pass  # it is free again
    program = (
        "import sys\nfrom tfqcomm.cluster import addresses\n"
        f"print(addresses.failure_to_listen('127.0.0.1:{port}'), flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "None\n"  # it does not listen yet
        assert addresses.failure_to_listen(f"127.0.0.1:{port}") == "Address already in use"
        other.stdin.close()
    assert addresses.failure_to_listen(f"127.0.0.1:{port}") is None  # it has ended
    assert addresses.failure_to_listen(f"127.0.0.1:{port}") is None  # ours already


def test_addresses_of_this_machine():
    assert addresses.is_of_this_machine("127.0.0.1") is True
    assert addresses.is_of_this_machine("198.51.100.7") is False  # of no machine: documentation
    assert addresses.is_of_this_machine("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("localhost.example.com", False),
    ],
)
def test_is_loopback(host, loopback):
    assert addresses.is_loopback(host) is loopback


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such option")
def test_servers_of_a_cluster_on_loopback_listen_there_alone():
    with listener() as before, contextlib.ExitStack() as stack:
        with loopback_only(["127.0.0.1:1", "localhost:2"]):
            inside = stack.enter_context(listener())
        with loopback_only(["127.0.0.1:1", "10.0.0.1:2"]):
            public = stack.enter_context(listener())
        assert bound_device_of(inside) == b"lo"
        assert bound_device_of(before) == bound_device_of(public) == b""  # not ours to change
        socket.create_connection(("127.0.0.1", inside)).close()


def bound_device_of(port: int) -> bytes:
    """The interface that the listening socket on `port`, of this process, is bound to."""
    for descriptor in addresses._listening().values():
        with socket.socket(fileno=addresses.os.dup(descriptor)) as found:
            if found.getsockname()[1] == port:
                name = found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
                return name.rstrip(b"\0")
    raise AssertionError(f"nobody listens on {port}")


@pytest.mark.network
def test_another_machine_cannot_reach_them():
    server = f"""{WITHOUT_TENSORFLOW}
import socket, sys, time
from tfqcomm.cluster import loopback_only
with loopback_only([sys.argv[1]]):
    server = socket.create_server(("", 2222))
print("listening", flush=True)
time.sleep(60)
"""
    client = "import socket, sys; socket.create_connection((sys.argv[1], 2222), timeout=5)"
    for address, reached in (("127.0.0.1:2222", False), ("10.0.0.1:2222", True)):
        with network.network(2) as net:
            running = subprocess.Popen(
                net.command(0, [sys.executable, "-c", server, address]),
                stdout=subprocess.PIPE,
            )
            with running:
                assert running.stdout.readline() == b"listening\n"
                tried = net.run(
                    1,
                    [sys.executable, "-c", client, net.addresses[0]],
                    capture_output=True,
                )
                running.kill()
            assert (tried.returncode == 0) is reached, tried.stderr


def test_who_never_came_is_named(monkeypatch):
    monkeypatch.setattr(roll_call, "PERIOD", 0.01)
    with listener() as present, listener() as absent:
        pass
    with listener(port=present):
        cluster = cluster_at(
            "127.0.0.1:1", f"127.0.0.1:{present}", f"127.0.0.1:{absent}", "no-such-host.invalid:2"
        )
        with RollCall(cluster) as call:
            wait_until(
                lambda: "not asked yet" not in call.report() and "worker 1" not in call.report()
            )
    report = call.report()
    assert report.startswith("This process is worker 0 (127.0.0.1:1). It waited for\n  worker 2 (")
    assert f"worker 2 (127.0.0.1:{absent}): nobody listens there\n" in report
    assert "worker 3 (no-such-host.invalid:2): there is no such host (" in report
    assert "Start these tasks, or correct their addresses. In TF_CONFIG `cluster` must be" in report


def test_who_has_answered_once_was_there(monkeypatch):
    """Workers that give up together must not accuse each other of never having come."""
    monkeypatch.setattr(roll_call, "PERIOD", 0.01)
    with listener() as port, RollCall(cluster_at("127.0.0.1:1", f"127.0.0.1:{port}")) as call:
        wait_until(lambda: "somebody answered" in call.report())
    assert "nobody listens" not in call.report()


def test_a_task_told_that_it_is_another_machines_is_told_so():
    call = RollCall(cluster_at("198.51.100.7:2222"))
    assert "No interface of this machine has the address 198.51.100.7:2222" in call.report()


def test_a_long_wait_is_said(monkeypatch, caplog):
    monkeypatch.setattr(roll_call, "PATIENCE", 0.3)
    with listener() as absent:
        pass
    with RollCall(cluster_at("127.0.0.1:1", f"127.0.0.1:{absent}")):
        wait_until(lambda: "Waiting for worker 1 (" in caplog.text)


def test_the_roll_call_ends_its_threads(monkeypatch):
    monkeypatch.setattr(roll_call, "PERIOD", 0.01)
    before = threading.active_count()
    with RollCall(cluster_at("127.0.0.1:1", "127.0.0.1:2")):
        pass
    wait_until(lambda: threading.active_count() <= before)


def wait_until(reached) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
