"""Codecs: a vector of floats to words and back."""

from tfqcomm.compressors.adaptive_top_k import AdaptiveTopK
from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.block_int8 import BlockInt8
from tfqcomm.compressors.block_sign import BlockSign
from tfqcomm.compressors.float8 import Float8
from tfqcomm.compressors.float16 import BFloat16, Float16
from tfqcomm.compressors.identity import Identity
from tfqcomm.compressors.log_grid import LogGrid
from tfqcomm.compressors.natural_compression import NaturalCompression
from tfqcomm.compressors.power_sgd import PowerSGD
from tfqcomm.compressors.qsgd import QSGD
from tfqcomm.compressors.random_k import RandomK
from tfqcomm.compressors.registry import deserialize, get, serialize
from tfqcomm.compressors.ternary import Ternary
from tfqcomm.compressors.threshold_quantizer import ThresholdQuantizer
from tfqcomm.compressors.top_k import TopK
from tfqcomm.compressors.two_means import TwoMeans
from tfqcomm.compressors.uniform_grid import UniformGrid

__all__ = [
    "AdaptiveTopK",
    "BFloat16",
    "BlockInt8",
    "BlockSign",
    "Compressor",
    "Float16",
    "Float8",
    "Identity",
    "LogGrid",
    "NaturalCompression",
    "PowerSGD",
    "QSGD",
    "RandomK",
    "Ternary",
    "ThresholdQuantizer",
    "TopK",
    "TwoMeans",
    "UniformGrid",
    "deserialize",
    "get",
    "serialize",
]
