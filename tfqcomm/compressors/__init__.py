"""Codecs: a vector of floats to words and back."""

from tfqcomm.compressors.base import Compressor
from tfqcomm.compressors.block_sign import BlockSign
from tfqcomm.compressors.float16 import BFloat16, Float16
from tfqcomm.compressors.identity import Identity
from tfqcomm.compressors.random_k import RandomK
from tfqcomm.compressors.registry import deserialize, get, serialize
from tfqcomm.compressors.top_k import TopK

__all__ = [
    "BFloat16",
    "BlockSign",
    "Compressor",
    "Float16",
    "Identity",
    "RandomK",
    "TopK",
    "deserialize",
    "get",
    "serialize",
]
