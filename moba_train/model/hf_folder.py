"""A local Hugging Face folder of a causal model, read tensor by tensor. Safetensors only: nothing is ever unpickled.

Opening one reads the headers of all shards; every shape is compared with what config.json asks for, so that a
truncated shard, a missing, additional or misshapen tensor is named before anything is built. One shard is mapped at
a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moba_train.config.huggingface import check_rope, parse_config, read_config
from moba_train.config.schema import ConfigError, ModelConfig
from moba_train.model.convert_hf import hf_shapes

__all__ = ["HFTensors", "TensorInfo", "load_hf_folder"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that old checkpoints carry; transformers computes them from config.json too.
_COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard; dtype by safetensors' name, such as BF16."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HFTensors:
    """The tensors of a folder by Hugging Face's names. `read` gives one.

    left_out: how many rotary tables the folder holds besides; they are computed from config.json.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.infos = {name: info for name, info in infos.items() if not name.endswith(_COMPUTED)}
        self.left_out = len(infos) - len(self.infos)
        self._open: tuple[str, Any] | None = None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU and in its stored dtype; a copy, which keeps no shard mapped."""
        file = self.infos[name].file
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = (file, safe_open(self.folder / file, framework="pt"))
        tensor: torch.Tensor = self._open[1].get_tensor(name)
        return tensor.clone()

    def close(self) -> None:
        """Unmap the shard that is open."""
        self._open = None


def load_hf_folder(path: str | Path, key: str = "checkpoint.init_from_hf") -> tuple[ModelConfig, HFTensors]:
    """The model a folder describes, and its tensors, all checked by name, shape and one dtype per joined matrix.

    Raises ConfigError (about `key`) with what is wrong: the field of config.json, the shard or the tensor.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(key, str(path), "no such folder; give a local Hugging Face folder of a causal model")
    model = parse_config(read_config(folder, key), folder.resolve().name, key)
    check_rope(model, f"{key}: rope_parameters")
    tensors = HFTensors(folder, _all_tensors(folder, key))
    _check_tensors(tensors, model, key)
    return model, tensors


def _all_tensors(folder: Path, key: str) -> dict[str, TensorInfo]:
    """Every tensor of every shard by its header; the index, where there is one, must agree."""
    weight_map = _weight_map(folder, key)
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())) or [_SINGLE]:
        for name, info in _shard_tensors(folder, file, key).items():
            if weight_map and weight_map.get(name) != file:
                where = f"{_INDEX} has it in {weight_map[name]}" if name in weight_map else f"{_INDEX} lacks it"
                raise ConfigError(key, str(folder), f"{file} holds the tensor {name}, but {where}; fetch both again")
            infos[name] = info
    for name, file in weight_map.items():
        if name not in infos:
            raise ConfigError(key, str(folder), f"{file} lacks the tensor {name} that {_INDEX} names; fetch it again")
    return infos


def _weight_map(folder: Path, key: str) -> dict[str, str]:
    """Tensor name -> shard by the index; empty where the folder is one file."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(key, str(folder), f"{_INDEX} is damaged ({error!r}); fetch it again") from error
        names = weight_map.values() if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(file, str) for file in names):
            remedy = f"{_INDEX} is damaged: its weight_map must name the file of every tensor; fetch it again"
            raise ConfigError(key, str(folder), remedy)
        if any(Path(file).name != file for file in weight_map.values()):
            raise ConfigError(key, str(folder), f"{_INDEX} names a file outside the folder; fetch it again")
        return weight_map
    if (folder / _SINGLE).is_file():
        return {}
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    remedy = f"has neither {_SINGLE} nor {_INDEX}; fetch the safetensors files"
    if pickled:
        remedy = (
            f"has pickled weights only ({pickled[0]}), and nothing is ever unpickled here: fetch safetensors files, "
            "or write them with transformers' save_pretrained where you trust the folder"
        )
    raise ConfigError(key, str(folder), remedy)


def _shard_tensors(folder: Path, file: str, key: str) -> dict[str, TensorInfo]:
    if not (folder / file).is_file():
        raise ConfigError(key, str(folder), f"the shard {file} is missing; fetch it again")
    try:
        with safe_open(folder / file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: TensorInfo(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        size = (folder / file).stat().st_size
        what = f"the shard {file} ({size} bytes) is truncated or corrupt ({error}); fetch it again"
        raise ConfigError(key, str(folder), what) from error


def _check_tensors(tensors: HFTensors, model: ModelConfig, key: str) -> None:
    expected, infos, folder = hf_shapes(model), tensors.infos, str(tensors.folder)
    for name, shape in expected.items():
        if name not in infos:
            raise ConfigError(key, folder, f"the tensor {name} is missing; fetch the folder again")
        if infos[name].shape != shape:
            found = list(infos[name].shape)
            raise ConfigError(
                key, folder, f"the tensor {name} in {infos[name].file} is {found}, config.json asks for {list(shape)}"
            )
    extra = sorted(set(infos) - set(expected))
    if model.tie_embeddings and extra == ["lm_head.weight"]:
        if torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
            return
        what = "tie_word_embeddings=true, but lm_head.weight differs from model.embed_tokens.weight"
        raise ConfigError(key, folder, f"{what}: correct config.json or take the tensor out")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ConfigError(key, folder, f"the tensor {extra[0]}{more} has no place in a {model.name} of config.json")
