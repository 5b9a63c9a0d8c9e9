"""Where the tasks of a cluster on this machine run: on its loopback, or in their own networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from tfqcomm.launch.environment import reserve_ports
from tfqcomm.launch.namespaces import Network, ensure_rights, network

PORT = 2222  # of every task that has an IP address of its own


class Places(Protocol):
    """A place for each task."""

    @property
    def addresses(self) -> list[str]:
        """The "host:port" of each."""

    def command(self, i: int, command: Sequence[str]) -> Sequence[str]:
        """Returns the command that runs `command` in place i; same process, same parent."""

    def renew(self) -> None:
        """Takes other ports for another attempt, unless the user named them.

        Something that a task has left behind might still listen there, or try to connect.

        Raises:
            OSError: there are none.
        """


class Loopback:
    """Ports of this machine's loopback, held so that no other program takes one.

    Args:
        count: of the tasks.
        first: the first of `count` ports in a row; 0 takes any free ones.

    Raises:
        OSError: a port is taken.
    """

    def __init__(self, count: int, first: int = 0):
        self._count, self._first = count, first
        self._ports = reserve_ports(count, first)

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{port.getsockname()[1]}" for port in self._ports]

    def command(self, i: int, command: Sequence[str]) -> Sequence[str]:
        return command

    def renew(self) -> None:
        if self._first:
            return
        ports = reserve_ports(self._count)  # before the old ones are let go of
        for port in self._ports:
            port.close()
        self._ports = ports


class Namespaces:
    """A network namespace for each task, behind an interface of limited speed.

    Args:
        net: the namespaces.
        port: of every task; 0 takes `PORT` and those above it.
    """

    def __init__(self, net: Network, port: int = 0):
        self._network = net
        self._port, self._is_named = port or PORT, bool(port)

    @property
    def addresses(self) -> list[str]:
        return [f"{address}:{self._port}" for address in self._network.addresses]

    def command(self, i: int, command: Sequence[str]) -> Sequence[str]:
        return self._network.command(i, command)

    def renew(self) -> None:
        self._port += not self._is_named


@contextlib.contextmanager
def networks(
    count: int, port: int = 0, rate: int | None = None, delay: int | None = None
) -> Iterator[Namespaces]:
    """Makes a place of its own for each of `count` tasks; see `network` for `rate` and `delay`.

    Raises:
        NetworkError: what is missing.
    """
    ensure_rights()
    with network(count, rate, delay) as net:
        yield Namespaces(net, port)
