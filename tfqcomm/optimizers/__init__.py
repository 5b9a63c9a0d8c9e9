"""The papers' algorithms as Keras optimizers."""

from tfqcomm.optimizers.adaptive_top_k_sgd import AdaptiveTopKSGD
from tfqcomm.optimizers.base import CompressedOptimizer
from tfqcomm.optimizers.comp_ams import CompAMS
from tfqcomm.optimizers.demo import DeMo
from tfqcomm.optimizers.local.diloco import DiLoCo
from tfqcomm.optimizers.local.elastic_averaging_sgd import ElasticAveragingSGD
from tfqcomm.optimizers.local.leader_sgd import LeaderSGD
from tfqcomm.optimizers.local.periodic_averaging_sgd import PeriodicAveragingSGD
from tfqcomm.optimizers.local.sparse_loco import SparseLoCo
from tfqcomm.optimizers.one_bit_adam import OneBitAdam
from tfqcomm.optimizers.qadam import QAdam
from tfqcomm.optimizers.qcmd_adagrad import QCMDAdagrad
from tfqcomm.optimizers.qrda_adagrad import QRDAAdagrad

__all__ = [
    "AdaptiveTopKSGD",
    "CompAMS",
    "CompressedOptimizer",
    "DeMo",
    "DiLoCo",
    "ElasticAveragingSGD",
    "LeaderSGD",
    "OneBitAdam",
    "PeriodicAveragingSGD",
    "QAdam",
    "QCMDAdagrad",
    "QRDAAdagrad",
    "SparseLoCo",
]
