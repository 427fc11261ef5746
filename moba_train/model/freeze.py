"""Parameters that do not train, by shell patterns over their names.

Names are those of the whole model on one rank: layers are numbered from 0 over all pipeline stages, and tied output
weights go by the embedding's name. `decoder.layers.3.mlp.linear_fc1.weight` matches `decoder.layers.3.*` and `*.mlp.*`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from moba_train.config.schema import ConfigError

__all__ = ["freeze_parameters", "parameter_names"]


def parameter_names(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in the whole model, parameter) of one pipeline stage's GPTModel."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            parts = ["embedding", "word_embeddings", "weight"]
        yield ".".join(parts), parameter


def freeze_parameters(models: Sequence[Any], patterns: Sequence[str], recompute: bool) -> None:
    """Freeze what matches any of `patterns` in this rank's GPTModels, before they are wrapped; called by all ranks.

    Raises ConfigError, on all ranks alike, for a pattern that matches nothing anywhere and where nothing would train.
    """
    if not patterns:
        return
    matched: set[str] = set()
    trains = False
    for model in models:
        for name, parameter in parameter_names(model):
            hits = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
            matched |= hits
            parameter.requires_grad_(not hits)
            trains = trains or not hits
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (matched, trains))
    for pattern in patterns:
        if not any(pattern in theirs for theirs, _ in found):
            names = sorted(name for model in models for name, _ in parameter_names(model))
            remedy = f"{pattern!r} matches no parameter; they have names such as {', '.join(names[:3])}"
            raise ConfigError("train.freeze", list(patterns), remedy)
    if not any(theirs for _, theirs in found):
        raise ConfigError("train.freeze", list(patterns), "nothing would train; leave some parameters out")
    if recompute:
        # Recomputed layers get no gradients at all where none of their inputs asks for one.
        for model in models:
            if model.pre_process:
                model.embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.requires_grad_()
