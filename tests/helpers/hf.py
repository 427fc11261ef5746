"""Small Hugging Face folders of every family, written by transformers, and the logits that transformers computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["FAMILIES", "SHAPE", "hf_logits", "smollm2", "write_folder"]

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
    "rms_norm_eps": 1e-5,
}
# name -> model type and what it has of its own.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, head dim": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def write_folder(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A folder of a randomly initialised model; norms and biases are random too, where transformers gives ones and
    zeros. `shard` is the largest file, such as 20KB."""
    shard = fields.pop("shard", "5GB")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def hf_logits(folder: Path, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[T, V] in fp32 of documents of these lengths, each on its own, by transformers' eager attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in tokens.split(list(lengths))])


def smollm2() -> Path | None:
    """The real SmolLM2 folder that MOBA_TRAIN_SMOLLM2 names, where it is set."""
    name = os.environ.get("MOBA_TRAIN_SMOLLM2")
    return Path(name) if name else None
