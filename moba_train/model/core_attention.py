"""The core_attention of every layer: from megatron-core's packed layout to the op, full or MoBA alike.

megatron-core calls it with packed tokens: q [T, H, D], k and v [S, G, D] without batch, where T == S are the tokens
this context rank holds and H, G this tensor rank's heads; it returns [T, H * D]. Which kind a layer is comes from
model/layer_plan.py and may change between steps (`set_layer_plan`); no parameter depends on it. The one option with
parameters, the key convolution, is in layers of both kinds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from moba_train.attention import LayerCache, SequenceInfo, full_attention, moba_attention
from moba_train.context_parallel.layout import LayoutRule
from moba_train.context_parallel.wrap import wrap
from moba_train.model.key_conv import KeyConv
from moba_train.model.layer_plan import LayerAttention, LayerKind
from moba_train.model.rope import rotate

__all__ = ["CoreAttention", "Observer", "RowParams", "observed_by", "set_layer_plan"]


@dataclass
class RowParams(PackedSeqParams):
    """What every layer needs to know of a micro-batch; rides through megatron-core as its packed_seq_params.

    sequence: global document bounds and this rank's query positions. rotary: cos and sin from `rope.rotary_table`.
    caches: when generating, one per layer of the model; the row holds the document's next tokens (no context parallel).
    """

    sequence: SequenceInfo = field(kw_only=True)
    rotary: tuple[torch.Tensor, torch.Tensor] = field(kw_only=True)
    caches: Sequence[LayerCache] | None = field(kw_only=True, default=None)


_Op = Callable[..., tuple[torch.Tensor, torch.Tensor]]
_OPS: dict[LayerKind, _Op] = {LayerKind.FULL: full_attention, LayerKind.MOBA: moba_attention}


class CoreAttention(MegatronModule):
    """Perhaps the key convolution, rotary embedding, then the layer's op behind its context-parallel wrapper.

    observer: None, or what is shown q [T, H, D] and k [S, G, D] as the op will get them (see `observed_by`).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        attention_dropout: float | None = None,
        *,
        layer: LayerAttention,
        backends: dict[LayerKind, str],
        deterministic: bool,
        strategies: dict[LayerKind, str],
        layout: LayoutRule,
        gather_heads: int | None,
        overlap: bool,
        hierarchical: bool,
        key_conv: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        assert not attention_dropout, attention_dropout
        self.layer_number = layer_number
        self.layer = layer
        self.backends = backends
        self.deterministic = True if deterministic else None  # None: as torch's own switch says
        self.softmax_scale = softmax_scale
        self.observer: Observer | None = None
        # megatron-core has groups by level, neighbours first, but forgets to forget those of a mesh it destroyed.
        inner, across = pg_collection.hcp if hierarchical else (None, pg_collection.cp)
        self.ops: dict[LayerKind, _Op] = {
            kind: wrap(
                op,
                across,
                strategies[kind],
                layout=layout,
                gather_heads=gather_heads,
                inner_group=inner,
                overlap=overlap,
            )
            for kind, op in _OPS.items()
        }

        self.key_conv = None
        if key_conv:
            backend = backends[LayerKind.MOBA]
            self.key_conv = KeyConv(config, key_conv, pg_collection, layout=layout, backend=backend)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [S, G, D] -> [T, H * D]. Documents come with the row; there is no mask."""
        assert isinstance(packed_seq_params, RowParams), type(packed_seq_params)
        assert attention_mask is None, "documents come with the row"
        assert attention_bias is None, "no bias in these models"
        sequence, caches = packed_seq_params.sequence, packed_seq_params.caches
        cache = None if caches is None else caches[self.layer_number - 1]
        if self.key_conv is not None:
            key = self.key_conv(key, sequence, cache)
        q_THD = rotate(query, *packed_seq_params.rotary)
        k_SGD = rotate(key, *packed_seq_params.rotary)
        if self.observer is not None:
            self.observer(self, q_THD, k_SGD, packed_seq_params.sequence)
        options: dict[str, Any] = {
            "softmax_scale": self.softmax_scale,
            "backend": self.backends[self.layer.kind],
            "deterministic": self.deterministic,
        }
        if self.layer.kind is LayerKind.MOBA:
            options |= self.layer.routing
        if cache is not None:
            cache.append(k_SGD, value)
            k_SGD, value = cache.keys, cache.values
            if self.layer.kind is LayerKind.MOBA:
                options["picks"] = cache.select(q_THD, sequence, backend=options["backend"], **self.layer.routing)
        out_THD, _ = self.ops[self.layer.kind](q_THD, k_SGD, value, sequence, **options)
        return out_THD.reshape(out_THD.shape[0], -1)


Observer = Callable[[CoreAttention, torch.Tensor, torch.Tensor, SequenceInfo], None]


@contextlib.contextmanager
def observed_by(observer: Observer, chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Show every layer's queries and keys to `observer` in the forwards within; nothing is kept or changed here."""
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, CoreAttention)]
    for layer in layers:
        layer.observer = observer
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def set_layer_plan(chunks: Iterable[torch.nn.Module], plan: tuple[LayerAttention, ...]) -> None:
    """Make every layer of these model chunks compute what `plan`, over all layers of the model, says."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, CoreAttention):
                module.layer = plan[module.layer_number - 1]  # megatron-core counts layers from 1
