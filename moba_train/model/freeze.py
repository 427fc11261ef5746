"""Parameters that do not train, by shell patterns over their names.

Names are those of the whole model on one rank: layers are numbered from 0 over all pipeline stages, and tied output
weights go by the embedding's name. `decoder.layers.3.mlp.linear_fc1.weight` matches `decoder.layers.3.*` and `*.mlp.*`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moba_train.config.schema import ConfigError, RunConfig
from moba_train.model.convert_hf import rules
from moba_train.model.key_conv import KEY_CONV_PREFIX

__all__ = ["check_freeze", "expected_names", "freeze_parameters", "parameter_names"]

_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def parameter_names(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter) of one pipeline stage's GPTModel."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            parts = ["embedding", "word_embeddings", "weight"]
        yield ".".join(parts), parameter


def check_freeze(config: RunConfig) -> None:
    """ConfigError for a pattern of train.freeze that matches nothing in the model, and where nothing would train."""
    patterns = config.train.freeze
    names = expected_names(config)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            remedy = f"{pattern!r} matches no parameter; they have names such as {', '.join(names[:3])}"
            raise ConfigError("train.freeze", list(patterns), remedy)
    if all(_matches(name, patterns) for name in names):
        raise ConfigError("train.freeze", list(patterns), "nothing would train; leave some parameters out")


def expected_names(config: RunConfig) -> list[str]:
    """Names of all parameters of the model that `config` describes, without building it."""
    found = []
    for rule in rules(config.model):
        head, _, name = rule.core.partition("decoder.layers.")
        if head:
            found.append(head)
            continue
        # A checkpoint names a norm as Transformer Engine does, a part of the matrix that follows it.
        name = _LOCAL_NORMS.get(name, name) if config.model.transformer_impl == "local" else name
        found += [f"decoder.layers.{layer}.{name}" for layer in range(config.model.num_layers)]
    if config.attention.key_conv:
        found += [f"decoder.layers.{layer}.{KEY_CONV_PREFIX}weight" for layer in range(config.model.num_layers)]
    return found


def freeze_parameters(models: Sequence[Any], patterns: Sequence[str], recompute: bool) -> None:
    """Freeze what matches any of `patterns` in this rank's GPTModels, before they are wrapped."""
    if not patterns:
        return
    for model in models:
        for name, parameter in parameter_names(model):
            parameter.requires_grad_(not _matches(name, patterns))
    if recompute:
        # Recomputed layers get no gradients at all where none of their inputs asks for one.
        for model in models:
            if model.pre_process:
                model.embedding.register_forward_hook(_require_gradient)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _require_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()
