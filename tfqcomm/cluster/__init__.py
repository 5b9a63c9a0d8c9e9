"""Which tasks there are, where they listen, which one this process is; without TensorFlow."""

from tfqcomm.cluster.addresses import loopback_only
from tfqcomm.cluster.config import Cluster, from_parts
from tfqcomm.cluster.roll_call import RollCall

__all__ = ["Cluster", "RollCall", "from_parts", "loopback_only"]
