"""A small network on one machine: Linux network namespaces joined to one bridge.

    with network(2, rate=100_000_000) as net:
        net.run(0, ["ping", "-c1", net.addresses[1]])
        print(net.traffic())

Everything sent between two namespaces passes an interface that counts its bytes and, where wanted,
limits their rate and delays them:

    task 0 - eth0 [tbf] ======== port0 [tbf, netem] \
                                                     bridge, in a namespace of its own
    task 1 - eth0 [tbf] ======== port1 [tbf, netem] /

The namespaces have no names: this process holds them by file descriptors, and the kernel removes
each, with its interfaces, when nobody holds it or runs in it any more. So nothing is left, however
this process ends, and nothing outside is changed. Inside there is no way to other machines.

Needs Linux, iproute2 (`ip`, `tc`), util-linux (`unshare`, `nsenter`), and root or the right to make
user namespaces.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

INTERFACE = "eth0"  # of every namespace
MOST = 254  # namespaces; one network of 8 bits
BURST_BYTES = 128 << 10  # twice the largest packet that veth passes on undivided
SMALLEST_BURST = 16 << 10
BURST_SECONDS = 0.01  # of a slow link; a longer burst would be free for short messages
QUEUE = "50ms"  # how long a packet waits for its turn at most
DELAYED_PACKETS = 100_000  # on their way; netem drops what is beyond its limit, 1,000 by default
CLONE_NEWUSER = 0x10000000  # <linux/sched.h>
CAP_SYS_ADMIN = 21  # <linux/capability.h>


class NetworkError(RuntimeError):
    """No such network can be made here; says why."""


class Traffic(NamedTuple):
    """Bytes that have passed an interface, with the headers of Ethernet, IP and TCP."""

    sent: int
    received: int

    def since(self, before: Traffic) -> Traffic:
        """What has passed since `before`."""
        return Traffic(self.sent - before.sent, self.received - before.received)


@dataclasses.dataclass(frozen=True)
class Network:
    """The namespaces of one `network(...)`.

    Attributes:
        namespaces: a file of each, to enter it by.
        addresses: IPv4, one per namespace.
    """

    namespaces: list[str]
    addresses: list[str]

    def command(self, i: int, command: Sequence[str]) -> list[str]:
        """Returns the command that runs `command` in namespace i; same process, same parent."""
        return _inside(self.namespaces[i], command)

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
def network(count: int, rate: int | None = None, delay: int | None = None) -> Iterator[Network]:
    """Makes `count` namespaces that reach one another, and lets go of them at the end.

    Args:
        count: The number of namespaces, at most 254.
        rate: The most that each may send, and the most that each may receive, in bits per second.
            None for no limit.
        delay: Microseconds from one namespace to another, beside the time that `rate` takes; an
            answer needs them twice. None for none.

    Raises:
        NetworkError: What is missing.
    """
    if not 1 <= count <= MOST:
        raise NetworkError(f"There can be 1 to {MOST} namespaces. Received: count={count}")
    with contextlib.ExitStack() as undo:
        hub, *namespaces = [undo.enter_context(_namespace()) for _ in range(1 + count)]
        net = Network(namespaces, [f"10.0.0.{i + 1}" for i in range(count)])
        _in(hub, "ip link add bridge type bridge mcast_snooping 0")
        _up(hub, "bridge")
        for i, (namespace, address) in enumerate(zip(namespaces, net.addresses, strict=True)):
            port = f"port{i}"
            _plug_in(namespace, address, hub, port)
            _shape(namespace, INTERFACE, rate, None)
            _shape(hub, port, rate, delay)
            _up(hub, port)
            _up(namespace, INTERFACE)
        yield net


@contextlib.contextmanager
def _namespace() -> Iterator[str]:
    """A new namespace: a path by which all processes of this user can enter it."""
    # Made by a child: a thread that has left its own namespace may not be allowed back.
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    with _popen(command, stdin=subprocess.PIPE) as child:
        if child.stdout and not child.stdout.read(1):
            raise _failure(command[:2], child.communicate()[1].decode())
        descriptor = os.open(f"/proc/{child.pid}/ns/net", os.O_RDONLY)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _plug_in(namespace: str, address: str, hub: str, port: str) -> None:
    _in(hub, f"ip link add {port} type veth peer name {INTERFACE} netns {namespace}")
    _in(hub, f"ip link set {port} master bridge")
    _in(namespace, f"ip address add {address}/24 dev {INTERFACE}")
    _in(namespace, "ip link set lo up")


def _shape(namespace: str, interface: str, rate: int | None, delay: int | None) -> None:
    """Limits and delays what leaves by `interface`."""
    parent = "root"
    if rate:
        burst = min(max(int(rate * BURST_SECONDS) // 8, SMALLEST_BURST), BURST_BYTES)
        limit = f"tbf rate {rate}bit burst {burst} latency {QUEUE}"
        _in(namespace, f"tc qdisc add dev {interface} root handle 1: {limit}")
        parent = "parent 1:1"
    if delay:
        how = f"netem delay {delay}us limit {DELAYED_PACKETS}"
        try:
            _in(namespace, f"tc qdisc add dev {interface} {parent} handle 10: {how}")
        except NetworkError as error:
            if "unknown" not in str(error) and "not found" not in str(error):
                raise
            raise NetworkError(
                "A latency needs the queueing discipline netem (module sch_netem), which this "
                "kernel does not have."
            ) from error


def _up(namespace: str, interface: str) -> None:
    # Without an IPv6 address the kernel sends nothing of its own accord.
    _in(namespace, f"ip link set {interface} addrgenmode none")
    _in(namespace, f"ip link set {interface} up")


def ensure_rights() -> None:
    """Gives the calling process, if it has not root's rights, a user namespace in which it has.

    Files are read and written as before, by the same user; the process and all that it starts only
    believe to be root. To be called while the process has one thread.

    Raises:
        NetworkError: This user may not make user namespaces, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise NetworkError(f"Network namespaces are Linux only; this is {sys.platform}.")
    if _effective_capabilities() >> CAP_SYS_ADMIN & 1:
        return
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER):
        why = os.strerror(ctypes.get_errno())
        raise NetworkError(
            f"This user has not root's rights and may not make user namespaces: {why}."
        )
    for name, text in (
        ("setgroups", "deny"),  # or the kernel lets nobody but root map groups
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as mapping:
                mapping.write(text)
        except OSError as error:
            raise NetworkError(f"/proc/self/{name} cannot be written: {error}.") from error


def _effective_capabilities() -> int:
    """Of the calling process, a bit for each."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["CapEff"], 16)


def _parse(text: str, interface: str) -> Traffic:
    """Reads /proc/net/dev: after the name, 8 columns of receiving and 8 of sending, bytes first."""
    (counts,) = re.findall(rf"^\s*{re.escape(interface)}:(.*)$", text, re.M)
    columns = counts.split()
    return Traffic(sent=int(columns[8]), received=int(columns[0]))


def _inside(namespace: str, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net={namespace}", *command]


def _in(namespace: str, command: str) -> None:
    _output(_inside(namespace, command.split()))


def _output(command: Sequence[str]) -> str:
    with _popen(command, stdin=subprocess.DEVNULL) as process:
        out, err = process.communicate()
    if process.returncode:
        raise _failure(command, err.decode())
    return out.decode()


def _popen(command: Sequence[str], stdin: int) -> subprocess.Popen:
    """Starts a helper in a session of its own, where Ctrl-C does not reach it."""
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise NetworkError(f"The command `{command[0]}` of util-linux is missing.") from error


def _failure(command: Sequence[str], said: str) -> NetworkError:
    if command[0] == "nsenter":
        command = command[2:]
    if "failed to execute" in said:
        return NetworkError(f"The command `{command[0]}` of iproute2 is missing.")
    return NetworkError(f"`{' '.join(command)}` failed: {said.strip() or 'without a word'}.")
