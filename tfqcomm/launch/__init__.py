"""A TensorFlow cluster on this machine: `python -m tfqcomm.launch`, described in `__main__.py`."""

from tfqcomm.launch.environment import cluster_of, die_with_parent, reserve_ports, task_environment
from tfqcomm.launch.output import is_chatter

__all__ = ["cluster_of", "die_with_parent", "is_chatter", "reserve_ports", "task_environment"]
