"""A small network on one machine: Linux network namespaces joined to one bridge.

Everything sent between two namespaces passes an interface that counts its bytes and, where wanted,
limits their rate. Nothing is changed outside the namespaces made here. Needs root and iproute2.

    with network(2, rate="100mbit") as net:
        net.run(0, ["ping", "-c1", net.addresses[1]])
        print(net.traffic())
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

INTERFACE = "eth0"  # of every namespace
_PREFIX = "tfqcomm"
_serial = itertools.count()


class Traffic(NamedTuple):
    """Bytes that have passed an interface, with the headers of Ethernet, IP and TCP."""

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent - before.sent, self.received - before.received)


@dataclasses.dataclass(frozen=True)
class Network:
    """The namespaces of one `network(...)`."""

    namespaces: list[str]
    addresses: list[str]  # IPv4, one per namespace

    def command(self, i: int, command: Sequence[str]) -> list[str]:
        """Returns the command that runs `command` in namespace i; same process, same parent."""
        return ["ip", "netns", "exec", self.namespaces[i], *command]

    def run(self, i: int, command: Sequence[str], **options) -> subprocess.CompletedProcess:
        """Runs a command in namespace i with `subprocess.run`."""
        return subprocess.run(self.command(i, command), **options)

    def traffic(self) -> list[Traffic]:
        """Returns what each namespace has sent and received since it was made."""
        return [
            _parse(_output(self.command(i, ["cat", "/proc/net/dev"])), INTERFACE)
            for i in range(len(self.namespaces))
        ]


def interface_bytes(interface: str = INTERFACE) -> Traffic:
    """Returns the counters of the namespace that the calling process is in."""
    # Not /proc/net, which may be cached for the thread group's first thread.
    with open("/proc/thread-self/net/dev") as file:
        return _parse(file.read(), interface)


@contextlib.contextmanager
def network(count: int, rate: str | None = None) -> Iterator[Network]:
    """Makes `count` namespaces that reach one another, and removes them at the end.

    Args:
        count: The number of namespaces, at most 254.
        rate: The most that each may send, and the most that each may receive, as `tc` writes it:
            "100mbit". None for no limit.
    """
    _remove_those_of_dead_processes()
    name = f"{_PREFIX}-{os.getpid()}-{next(_serial)}"
    hub = f"{name}-hub"
    net = Network(
        namespaces=[f"{name}-{i}" for i in range(count)],
        addresses=[f"10.0.0.{i + 1}" for i in range(count)],
    )
    with contextlib.ExitStack() as undo:
        for namespace in [hub, *net.namespaces]:
            _ip("netns", "add", namespace)
            undo.callback(_ip, "netns", "delete", namespace)  # and the interfaces in it
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        _up(hub, "bridge")
        for i, (namespace, address) in enumerate(zip(net.namespaces, net.addresses, strict=True)):
            _plug_in(namespace, address, hub, f"port{i}", rate)
        yield net


def _plug_in(namespace: str, address: str, hub: str, port: str, rate: str | None) -> None:
    peer = ["peer", "name", INTERFACE, "netns", namespace]
    _ip("-n", hub, "link", "add", port, "type", "veth", *peer)
    _ip("-n", hub, "link", "set", port, "master", "bridge")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
    _ip("-n", namespace, "link", "set", "lo", "up")
    for where, interface in ((hub, port), (namespace, INTERFACE)):
        if rate:
            limit = ["rate", rate, "burst", "128kb", "latency", "50ms"]
            _output(["tc", "-n", where, "qdisc", "add", "dev", interface, "root", "tbf", *limit])
        _up(where, interface)


def _up(namespace: str, interface: str) -> None:
    # Without an IPv6 address the kernel sends nothing of its own accord.
    _ip("-n", namespace, "link", "set", interface, "addrgenmode", "none")
    _ip("-n", namespace, "link", "set", interface, "up")


@functools.cache
def available() -> bool:
    """Whether this process may make such networks here, with a rate limit."""
    if os.geteuid() != 0:
        return False
    try:
        with network(1, rate="1gbit"):
            return True
    except (OSError, RuntimeError):
        return False


def _remove_those_of_dead_processes() -> None:
    """Removes what a killed test run has left."""
    for namespace, pid in re.findall(rf"^({_PREFIX}-(\d+)-\S+)", _ip("netns", "list"), re.M):
        if not os.path.exists(f"/proc/{pid}"):
            _ip("netns", "delete", namespace)


def _parse(text: str, interface: str) -> Traffic:
    """Reads /proc/net/dev: after the name, 8 columns of receiving and 8 of sending, bytes first."""
    columns = re.search(rf"^\s*{re.escape(interface)}:(.*)$", text, re.M)[1].split()
    return Traffic(sent=int(columns[8]), received=int(columns[0]))


def _ip(*arguments: str) -> str:
    return _output(["ip", *arguments])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr}")
    return done.stdout
