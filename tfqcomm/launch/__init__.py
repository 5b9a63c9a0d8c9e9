"""A TensorFlow cluster on this machine: `python -m tfqcomm.launch`, described in `__main__.py`."""

from tfqcomm.launch.environment import cluster_of, die_with_parent, reserve_ports, task_environment
from tfqcomm.launch.namespaces import Network, NetworkError, Traffic, interface_bytes, network
from tfqcomm.launch.output import is_chatter
from tfqcomm.launch.units import bits_per_second

__all__ = [
    "Network",
    "NetworkError",
    "Traffic",
    "bits_per_second",
    "cluster_of",
    "die_with_parent",
    "interface_bytes",
    "is_chatter",
    "network",
    "reserve_ports",
    "task_environment",
]
