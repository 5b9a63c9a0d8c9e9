"""Strategies that compress what an optimizer sends."""

from tfqcomm.distribute.compressed_all_reduce import CompressedAllReduce
from tfqcomm.distribute.joining import read_cluster
from tfqcomm.distribute.multi_worker_mirrored_strategy import MultiWorkerMirroredStrategy

__all__ = ["CompressedAllReduce", "MultiWorkerMirroredStrategy", "read_cluster"]
