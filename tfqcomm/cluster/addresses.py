"""Addresses `host:port` of tasks, and what this machine can know of them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Iterator

CONNECT_SECONDS = 2.0
_LISTENS = "0A"  # in /proc/net/tcp: TCP_LISTEN of <net/tcp_states.h>
_claims: dict[int, socket.socket] = {}  # ports that this process has claimed, to its end


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of "host:port", "10.0.0.1:port" or "[::1]:port".

    Raises:
        ValueError: what is wrong with it.

    Example:
    >>> split_address("[fd00::2]:2222")
    ('fd00::2', 2222)
    """
    if not isinstance(address, str):
        raise ValueError("it must be text")
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise ValueError("it must have a host and a port, as in `host:2222`")
    if "//" in address or address != address.strip():
        raise ValueError("it must be `host:2222`, without a scheme, a path or spaces")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("its port must be a number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address needs brackets, as in `[::1]:2222`")
    return host, int(port)


def failure_to_connect(address: str) -> str | None:
    """Says why nobody can be reached there now; None if somebody listens."""
    try:
        socket.create_connection(split_address(address), CONNECT_SECONDS).close()
    except socket.gaierror as error:
        return f"there is no such host ({error.strerror})"
    except ConnectionRefusedError:
        return "nobody listens there"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    return None


def failure_to_listen(address: str) -> str | None:
    """Says why a server of this machine cannot listen on the port; None if it can.

    From then on the port is this process'.
    """
    host, port = split_address(address)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A recent use is no use.
        if _reuses_ports():  # It may be reserved for us; but not in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.strerror
    if _reuses_ports() and is_of_this_machine(host) and failure_to_connect(address) is None:
        return "Address already in use"
    return None if _claim(port) else "Address already in use"


def _claim(port: int) -> bool:
    """Whether no other process has passed here with this port and is still there.

    A look at the port alone comes too early where two processes start at once: both find it free,
    and TensorFlow's servers then share it. A name in Linux' abstract namespace, which belongs to
    the network as ports do, has one owner, and is free again when that has ended.
    """
    if port in _claims or not sys.platform.startswith("linux"):
        return True
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0tfqcomm/port/{port}")
    except OSError:
        claim.close()
        return False
    _claims[port] = claim
    return True


def _reuses_ports() -> bool:
    return os.environ.get("TF_GRPC_REUSE_PORT", "").lower() in ("1", "true")


def is_of_this_machine(host: str) -> bool | None:
    """Whether an interface of this machine has the address; None where the name is not known."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return None
    return any(_can_bind(family, where) for family, *_, where in found)


def _can_bind(family: int, where: tuple) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(where)
        except OSError:
            return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine itself can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@contextlib.contextmanager
def loopback_only(addresses: Iterable[str]) -> Iterator[None]:
    """Scope in which servers are started that only this machine can reach, if `addresses` are its.

    TensorFlow's server always binds 0.0.0.0, and lets everybody who reaches it run operations.
    Where all tasks know each other by loopback addresses, nobody else has business there. Linux
    only, and from 5.7 on for users other than root; elsewhere nothing is changed.

    Args:
        addresses: of all tasks.
    """
    local = all(is_loopback(split_address(address)[0]) for address in addresses)
    before = _listening() if local else {}
    try:
        yield
    finally:
        for socket_id, descriptor in (_listening() if local else {}).items():
            if socket_id not in before:
                _bind_to_loopback(descriptor)


def _bind_to_loopback(descriptor: int) -> None:
    # A duplicate, which Python may close; the option is that of the socket they share.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")


def _listening() -> dict[str, int]:
    """The sockets on which this process listens for TCP, and a file descriptor of each."""
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            rows = [line.split() for line in lines]
            listening |= {f"socket:[{row[9]}]" for row in rows if row[3] == _LISTENS}
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found[os.readlink(f"/proc/self/fd/{name}")] = int(name)
    return {socket_id: found[socket_id] for socket_id in found.keys() & listening}
