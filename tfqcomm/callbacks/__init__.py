"""Keras callbacks: what was sent, how to go on after a crash, and whom to evaluate."""

from tfqcomm.callbacks.average_replicas import AverageReplicas
from tfqcomm.callbacks.backup_and_restore import BackupAndRestore
from tfqcomm.callbacks.traffic_logger import TrafficLogger

__all__ = ["AverageReplicas", "BackupAndRestore", "TrafficLogger"]
