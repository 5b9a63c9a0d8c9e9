"""Decoupled DiLoCo: learners train alone, and servers merge one fragment of the model at a time."""

from tfqcomm.parameter_server.diloco.trainer import DiLoCoTrainer

__all__ = ["DiLoCoTrainer"]
