"""The networks of `tfqcomm.launch.namespaces`, for the tests marked `network`."""

from __future__ import annotations

import functools
import os

from tfqcomm.launch.namespaces import Network, NetworkError, Traffic, interface_bytes, network

__all__ = ["Network", "Traffic", "available", "interface_bytes", "network"]


@functools.cache
def available() -> bool:
    """Whether this process may make such networks here, with a rate limit."""
    if os.geteuid() != 0:
        return False
    try:
        with network(1, rate=10**9):
            return True
    except NetworkError:
        return False
