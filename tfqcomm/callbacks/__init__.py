"""Keras callbacks: what was sent, and how to go on after a crash."""

from tfqcomm.callbacks.backup_and_restore import BackupAndRestore
from tfqcomm.callbacks.traffic_logger import TrafficLogger

__all__ = ["BackupAndRestore", "TrafficLogger"]
