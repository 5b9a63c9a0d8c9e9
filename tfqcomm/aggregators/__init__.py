"""Messages of all replicas in, their mean out."""

from tfqcomm.aggregators.adaptive import AdaptiveMean
from tfqcomm.aggregators.all_gather import AllGatherMean
from tfqcomm.aggregators.dense import DenseMean, PlainMean
from tfqcomm.aggregators.integer import IntegerMean
from tfqcomm.aggregators.low_rank import LowRankMean
from tfqcomm.aggregators.majority_vote import MajorityVoteMean
from tfqcomm.aggregators.shared_support import SharedSupportMean
from tfqcomm.aggregators.two_phase import TwoPhaseMean

__all__ = [
    "AdaptiveMean",
    "AllGatherMean",
    "DenseMean",
    "IntegerMean",
    "LowRankMean",
    "MajorityVoteMean",
    "PlainMean",
    "SharedSupportMean",
    "TwoPhaseMean",
]
