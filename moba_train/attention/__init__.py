"""Full attention and Mixture of Block Attention on one device. See README.md beside this file."""

from moba_train.attention.gate import block_means, block_sums, means_from_sums
from moba_train.attention.kv_cache import LayerCache
from moba_train.attention.merge import merge
from moba_train.attention.ops import (
    convolve_keys,
    full_attention,
    moba_attention,
    select_blocks,
    select_from_means,
)
from moba_train.attention.sequence import BlockTable, DenseRun, DeviceSequence, SequenceInfo

__all__ = [
    "BlockTable",
    "DenseRun",
    "DeviceSequence",
    "LayerCache",
    "SequenceInfo",
    "block_means",
    "block_sums",
    "convolve_keys",
    "full_attention",
    "means_from_sums",
    "merge",
    "moba_attention",
    "select_blocks",
    "select_from_means",
]
