"""Asynchronous Leader SGD: workers train alone, and leaders' weights live on the servers."""

from tfqcomm.parameter_server.leader.trainer import LeaderTrainer

__all__ = ["LeaderTrainer"]
