"""MoBA inside Hugging Face transformers: `register()`, then attn_implementation="moba".

    from moba_train import hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")

What each layer computes is in config.json, where plain transformers ignores it:
    "moba": {"layers": [{"kind": "moba", "block_size": 512, "top_k": 12}, ..., {"kind": "full"}]}

No [T, S] mask is built. A padded token (0 in attention_mask, on either side) is taken out of its row: blocks are
counted over the tokens that are left, from the row's first one, so a padded batch computes what its rows compute alone.
The rows' bounds are found once per forward and reach every layer in the place of the mask. What would be computed
otherwise than asked is refused: packed rows, 4D masks, sliding windows, soft caps, dropout, static caches.

transformers hands an attention function all keys and no cache object, so block means are formed from all keys at every
step; launch/generate.py keeps them incrementally. Picks are the same.

Letters: B rows of the batch, T query columns, S key columns, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, moba_attention

__all__ = ["NAME", "Rows", "layer_of", "register", "rows_of"]

NAME = "moba"
_DECODE = ("moba", "full")
_SIZES = ("block_size", "top_k")
_ROUTING = (*_SIZES, "force_first_block", "force_previous_block", "share_picks_in_group")
_REFUSED = ("sliding_window", "softcap", "s_aux", "dropout")
_settings = {"decode": "moba"}


def register(decode: str = "moba") -> None:
    """Make attn_implementation="moba" known to transformers in this process; calling again changes `decode`.

    decode: what one new token after cached ones attends to: "moba": its layer's picked blocks, as in the prefill;
    "full": everything, in every layer (as the MoBA report evaluates, arXiv 2502.13189, section 3.3).
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # takes seconds

    if decode not in _DECODE:
        raise ValueError(f"decode={decode!r}: choose one of {', '.join(_DECODE)}")
    _settings["decode"] = decode
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


@dataclass(frozen=True)
class Rows:
    """The real tokens of a batch, each row a document; goes to every layer as its attention mask.

    query_index, key_index: where real queries lie among B * T columns and real keys among B * S; None: all are real.
    """

    sequence: SequenceInfo
    query_index: Tensor | None
    key_index: Tensor | None


def rows_of(batch_size: int, q_length: int, kv_length: int, real_BS: Tensor | None) -> Rows:
    """`real_BS`: bool, True where a token is real, None: everywhere. Queries are the last `q_length` columns."""
    if real_BS is None or bool(real_BS.all()):
        bounds = torch.arange(batch_size + 1) * kv_length
        columns_T = torch.arange(kv_length - q_length, kv_length)
        queries = None if q_length == kv_length else (bounds[:-1, None] + columns_T).flatten()
        return Rows(SequenceInfo(bounds, q_positions=queries), None, None)
    host_BS = real_BS.cpu()
    row_S = host_BS.flatten().cumsum(0) - 1  # rank of each real token among all of them
    asked_BS = host_BS.clone()
    asked_BS[:, : kv_length - q_length] = False
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), host_BS.sum(1).cumsum(0)])
    query_index = host_BS[:, kv_length - q_length :].flatten().nonzero()[:, 0]
    return Rows(
        SequenceInfo(bounds, q_positions=row_S[asked_BS.flatten()]),
        query_index.to(real_BS.device),
        host_BS.flatten().nonzero()[:, 0].to(real_BS.device),
    )


def layer_of(moba: Any, index: int, count: int) -> dict[str, Any]:
    """Entry `index` of the "moba" section of a config.json for `count` layers.

    ValueError where it is not sound, or sets something that is not known here.
    """
    layers = moba.get("layers") if isinstance(moba, dict) else None
    if not isinstance(layers, list) or len(layers) != count:
        raise ValueError(
            f'attn_implementation="{NAME}" needs config.moba = {{"layers": [...]}} with {count} entries such as '
            '{"kind": "moba", "block_size": 512, "top_k": 12} or {"kind": "full"}; folders exported by '
            "launch/convert.py core-to-hf have it in config.json"
        )
    layer = layers[index]
    if not isinstance(layer, dict):
        raise ValueError(f"config.moba layer {index} is {layer!r}: give kind, block_size and top_k")
    unknown = sorted(name for name in set(layer) - {"kind", *_ROUTING} if layer[name])
    if unknown:
        raise ValueError(f"config.moba layer {index} sets {', '.join(unknown)}, which is not known here")
    sizes = [layer.get(name) for name in _SIZES]
    sound = all(isinstance(size, int) and size >= 1 for size in sizes)
    if layer.get("kind") != "full" and not (layer.get("kind") == "moba" and sound):
        raise ValueError(
            f"config.moba layer {index} is {layer}: kind is 'full', or 'moba' with block_size and top_k of at least 1"
        )
    return layer


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Rows:
    """What transformers calls once per forward to make a mask."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise _refusal("a mask other than causal (packed rows by position_ids, a sliding window, a custom overlay)")
    if kv_offset or int(q_offset) + q_length != kv_length:
        raise _refusal(f"a cache of {kv_length} columns for {int(q_offset) + q_length} tokens: use DynamicCache")
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise _refusal(f"an attention_mask of shape {list(attention_mask.shape)}: give [{batch_size}, {kv_length}]")
    return rows_of(batch_size, q_length, kv_length, attention_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D]; padded queries are 0."""
    if not isinstance(attention_mask, Rows):
        raise _refusal("a ready-made attention mask: give the 2D one of the tokenizer, or none")
    for name in _REFUSED:
        value_given = kwargs.get(name)
        if value_given is not None and (isinstance(value_given, Tensor) or value_given):
            raise _refusal(f"{name}={value_given}")
    batch_size, num_heads, q_length, head_dim = query.shape
    q_THD, k_SGD, v_SGD = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    rows = attention_mask
    if rows.query_index is not None and rows.key_index is not None:
        q_THD = q_THD.index_select(0, rows.query_index)
        k_SGD, v_SGD = (x.index_select(0, rows.key_index) for x in (k_SGD, v_SGD))
    layer = layer_of(getattr(module.config, "moba", None), module.layer_idx, module.config.num_hidden_layers)
    decoding = q_length == 1 and key.shape[2] > 1
    if layer["kind"] == "full" or (decoding and _settings["decode"] == "full"):
        out_THD, _ = full_attention(q_THD, k_SGD, v_SGD, rows.sequence, softmax_scale=scaling)
    else:
        out_THD, _ = moba_attention(
            *(q_THD, k_SGD, v_SGD, rows.sequence),
            **{name: layer[name] for name in _ROUTING if name in layer},
            softmax_scale=scaling,
        )
    if rows.query_index is not None:
        padded_THD = out_THD.new_zeros(batch_size * q_length, num_heads, head_dim)
        out_THD = padded_THD.index_copy(0, rows.query_index, out_THD)
    return out_THD.view(batch_size, q_length, num_heads, head_dim), None


def _refusal(what: str) -> ValueError:
    return ValueError(f'attn_implementation="{NAME}" does not serve {what}')
