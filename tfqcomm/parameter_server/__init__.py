"""Training with parameter servers: quantized weights on the way down, quantized updates up."""

from tfqcomm.parameter_server.cluster import ServerLost
from tfqcomm.parameter_server.diloco import DiLoCoTrainer
from tfqcomm.parameter_server.embeddings.exported import load_export
from tfqcomm.parameter_server.embeddings.named import rows
from tfqcomm.parameter_server.leader import LeaderTrainer
from tfqcomm.parameter_server.messages import Trainer
from tfqcomm.parameter_server.sparse_weights import SparseWeights

__all__ = [
    "DiLoCoTrainer",
    "LeaderTrainer",
    "ServerLost",
    "SparseWeights",
    "Trainer",
    "load_export",
    "rows",
]
