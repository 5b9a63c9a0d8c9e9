"""A TensorFlow cluster on this machine: `python -m tfqcomm.launch`, described in `__main__.py`."""

from tfqcomm.launch.environment import (
    cluster_of,
    die_with_parent,
    reserve_ports,
    task_environment,
)

__all__ = ["cluster_of", "die_with_parent", "reserve_ports", "task_environment"]
