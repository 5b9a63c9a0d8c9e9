"""Messages of all replicas in, their mean out."""

from tfqcomm.aggregators.adaptive_mean import AdaptiveMean
from tfqcomm.aggregators.all_gather_mean import AllGatherMean
from tfqcomm.aggregators.dense_mean import DenseMean
from tfqcomm.aggregators.integer_mean import IntegerMean
from tfqcomm.aggregators.options import ExchangeOptions
from tfqcomm.aggregators.two_phase_mean import TwoPhaseMean

__all__ = [
    "AdaptiveMean",
    "AllGatherMean",
    "DenseMean",
    "ExchangeOptions",
    "IntegerMean",
    "TwoPhaseMean",
]
