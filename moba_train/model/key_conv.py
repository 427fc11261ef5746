"""The key convolution of a layer: its weights, and the neighbouring rows that context parallelism must bring.

It acts on the keys after their norm and before rotary embedding, and the convolved keys serve the gate and attention
alike: the gate takes no gradient, so weights that only it saw would never learn. Before rotary embedding, because a
filter with a weight per channel does not commute with rotating pairs of channels: after it, scores would depend on
where in the context a text stands. In full layers as in MoBA layers: then both kinds share one set of parameters, a
layer changes its kind without touching its keys, and MoBA with every block picked stays full attention exactly.

Weights start at zero, the identity. Weight decay applies to them, which pulls towards the identity.
Letters: T tokens of this context rank, G key heads of this tensor rank, D head dim, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from moba_train.attention import LayerCache, SequenceInfo, convolve_keys
from moba_train.context_parallel.halo import with_halo
from moba_train.context_parallel.layout import LayoutRule

__all__ = ["KEY_CONV_PREFIX", "KeyConv"]

# Every parameter of it has this in its name, in the state dict of the model.
KEY_CONV_PREFIX = "self_attention.core_attention.key_conv."


class KeyConv(torch.nn.Module):
    """k plus SiLU of a causal depthwise convolution of k (arXiv 2511.11571), each document by itself.

    Decoding: a cache holds the convolved keys, and the raw keys of the last W - 1 tokens to make new ones from.
    """

    def __init__(
        self,
        config: TransformerConfig,
        width: int,
        pg_collection: Any,
        *,
        layout: LayoutRule,
        backend: str,
    ) -> None:
        super().__init__()
        self.context_group: dist.ProcessGroup | None = pg_collection.cp
        self.tensor_group: dist.ProcessGroup = pg_collection.tp
        self.layout = layout
        self.backend = backend
        key_heads = config.num_query_groups // config.tensor_model_parallel_size
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        zeros = torch.zeros(key_heads, config.kv_channels, width, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(zeros)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, key_TGD: torch.Tensor, sequence: SequenceInfo, cache: LayerCache | None = None) -> torch.Tensor:
        """[T, G, D] -> [T, G, D]; `sequence` has the bounds of the whole context and this rank's rows as queries.

        With `cache` the rows are a document's next ones, not appended yet.
        """
        reach = self.weight.shape[2] - 1
        if cache is None:
            held, seq = with_halo(key_TGD, sequence, self.context_group, self.layout, reach)
        else:
            held, seq = cache.with_recent(key_TGD, reach)
        return convolve_keys(held, self.weight, seq, backend=self.backend)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Sharded over tensor ranks by key heads, so that it loads in any layout."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
