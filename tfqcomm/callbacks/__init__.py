"""Keras callbacks: what was sent, and how to go on after a crash."""

from tfqcomm.callbacks.traffic_logger import TrafficLogger

__all__ = ["TrafficLogger"]
