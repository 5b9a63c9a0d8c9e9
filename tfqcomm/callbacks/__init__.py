"""Keras callbacks: what was sent, how to go on after a crash, whom to evaluate, what is zero."""

from tfqcomm.callbacks.average_replicas import AverageReplicas
from tfqcomm.callbacks.backup_and_restore import BackupAndRestore
from tfqcomm.callbacks.sparsity_logger import SparsityLogger
from tfqcomm.callbacks.traffic_logger import TrafficLogger

__all__ = ["AverageReplicas", "BackupAndRestore", "SparsityLogger", "TrafficLogger"]
