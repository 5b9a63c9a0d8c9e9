"""Optimizers whose replicas train alone between pulls."""

from tfqcomm.optimizers.local.diloco import DiLoCo
from tfqcomm.optimizers.local.elastic_averaging_sgd import ElasticAveragingSGD
from tfqcomm.optimizers.local.leader_sgd import LeaderSGD
from tfqcomm.optimizers.local.periodic_averaging_sgd import PeriodicAveragingSGD
from tfqcomm.optimizers.local.sparse_loco import SparseLoCo

__all__ = [
    "DiLoCo",
    "ElasticAveragingSGD",
    "LeaderSGD",
    "PeriodicAveragingSGD",
    "SparseLoCo",
]
