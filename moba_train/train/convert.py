"""Hugging Face folder -> core checkpoint, and core checkpoint -> Hugging Face folder, a tensor at a time.

    hf_to_core   DST/hf/                        config.json, tokenizer, generation and licence files, shards.json
                 DST/checkpoints/step_00000000  the weights in Hugging Face's dtypes: loads in any layout
    core_to_hf   from such a folder, or any run folder; `hf/` beside its checkpoints gives the files and the shards

A folder appears whole or not at all. Tensors of a folder that was not trained come back bit by bit.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moba_train.config.huggingface import export_config, read_config
from moba_train.config.schema import AttentionConfig, ConfigError, ModelConfig, RunConfig, from_dict, to_dict
from moba_train.data.sft import RUN_TOKENIZER
from moba_train.data.tokenizer import load_tokenizer, tokenizer_files
from moba_train.model.convert_hf import Rule, from_core, hf_shapes, rules, to_core
from moba_train.model.hf_folder import HFTensors, load_hf_folder
from moba_train.model.layer_plan import layer_plan
from moba_train.model.rope import describe_rope, fixed_scaling
from moba_train.train import checkpoint_folder
from moba_train.train.core_weights import CoreWeights, write_core_weights

__all__ = ["CARRIED", "Summary", "carry_files", "core_to_hf", "hf_to_core"]

CARRIED = "hf"  # the folder in a run folder that holds what is carried from and to a Hugging Face folder
_SHARDS = "shards.json"
_CONFIG, _GENERATION, _INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
_LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """What was written. rope: the effective base and scale; notes: what a user should know."""

    folder: Path
    model: ModelConfig
    tensors: int
    bytes: int
    files: tuple[str, ...]
    rope: str
    notes: tuple[str, ...] = ()


def hf_to_core(source: str | Path, target: str | Path, progress: Progress | None = None) -> Summary:
    """Write the core checkpoint of a Hugging Face folder. ConfigError where either cannot be used."""
    model, tensors = load_hf_folder(source, "SRC")
    dtypes = {name: _dtype(info.dtype, name) for name, info in tensors.infos.items()}
    for rule in rules(model):
        for layer in range(model.num_layers if rule.per_layer else 1):
            names = rule.hf_names(layer)
            if len({dtypes[name] for name in names}) > 1:
                found = ", ".join(f"{name} {tensors.infos[name].dtype}" for name in names)
                raise ConfigError(
                    "SRC", str(source), f"one matrix here, but of several dtypes: {found}; save it in one"
                )

    def dtype_of(rule: Rule, layer: int) -> torch.dtype:
        return dtypes[rule.hf_names(layer)[0]]

    def tensor_of(rule: Rule, layer: int) -> torch.Tensor:
        if progress is not None:
            progress(rule.hf_names(layer)[0])
        return to_core(rule, model, [tensors.read(name) for name in rule.hf_names(layer)])

    with _whole_folder(Path(target)) as partial:
        carry_files(tensors, partial)
        step = partial / "checkpoints" / "step_00000000"
        step.mkdir(parents=True)
        write_core_weights(step, model, dtype_of, tensor_of)
        tensors.close()
        precision = "fp32" if torch.float32 in dtypes.values() else "bf16"
        attention = AttentionConfig(pattern="full")
        config = RunConfig(recipe="hf-to-core", precision=precision, model=model, attention=attention)
        length = model.max_position_embeddings or config.train.sequence_length
        metadata = checkpoint_folder.Metadata(
            step=0,
            tokens=0,
            data={"consumed_samples": 0},
            config=to_dict(config),
            plan=_carried_plan(read_config(source, "SRC"), model),
            world_size=1,
            manifest=checkpoint_folder.manifest_of(step),
            rope=describe_rope(model, length),
            weights_only=True,
        )
        checkpoint_folder.write_metadata(step, metadata)
        checkpoint_folder.point_latest(step)
    used = hf_shapes(model)
    size = sum(_bytes(used[name], dtypes[name]) for name in used)
    notes = (f"left out {tensors.left_out} rotary tables, which config.json implies",) if tensors.left_out else ()
    return Summary(Path(target), model, len(used), size, ("checkpoints/step_00000000",), metadata.rope, notes)


def carry_files(tensors: HFTensors, run_folder: Path) -> None:
    """Keep what a Hugging Face folder holds beside its weights in `run_folder`/hf, for the way back."""
    kept = run_folder / CARRIED
    kept.mkdir(parents=True, exist_ok=True)
    legal = [file for pattern in _LEGAL for file in tensors.folder.glob(pattern) if file.is_file()]
    named = [tensors.folder / name for name in (_CONFIG, _GENERATION)]
    for file in [*named, *tokenizer_files(tensors.folder), *legal]:
        if file.is_file():
            shutil.copyfile(file, kept / file.name)
    index = tensors.folder / _INDEX
    described = json.loads(index.read_text(encoding="utf-8")).get("metadata") if index.is_file() else None
    shards = {
        "weight_map": {name: info.file for name, info in tensors.infos.items()},
        "indexed": index.is_file(),
        "metadata": described if isinstance(described, dict) else {},
    }
    (kept / _SHARDS).write_text(json.dumps(shards, indent=1), encoding="utf-8")


def core_to_hf(
    source: str | Path, target: str | Path, max_shard_bytes: float = 5e9, progress: Progress | None = None
) -> Summary:
    """Write the Hugging Face folder of a core checkpoint: a run folder (its latest), or one step folder.

    The shards are the imported folder's where there was one, else of at most `max_shard_bytes`. Weights keep the dtype
    they are stored in. ConfigError where something is missing, damaged or has no place in a Hugging Face model.
    """
    step = checkpoint_folder.locate(Path(source), "SRC")
    metadata = checkpoint_folder.read_metadata(step)
    checkpoint_folder.check_files(step, metadata, contents=True)
    model = from_dict(metadata.config["model"], ModelConfig, "SRC: model.")
    weights = CoreWeights(step)
    for problem in weights.problems(model):
        raise ConfigError("SRC", str(step), problem)
    kept = step.parent.parent / CARRIED
    dtypes = {name: weights.dtype(rule) for rule in rules(model) for name in _all_names(rule, model)}
    sizes = {name: _bytes(shape, dtypes[name]) for name, shape in hf_shapes(model).items()}
    shards, described = _shards(kept, sizes, max_shard_bytes)
    if not metadata.weights_only:
        length = metadata.config["train"]["sequence_length"]
        longest = max(model.max_position_embeddings or 0, length)
        model = _with_length(fixed_scaling(model, length), longest)
    notes: list[str] = []
    with _whole_folder(Path(target)) as partial:
        total = _write_shards(partial, weights, model, shards, progress)
        if described is not None:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {**described, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        carried = read_config(kept, "SRC") if kept.is_dir() else None
        if kept.is_dir():
            for file in kept.iterdir():
                if file.name != _SHARDS:
                    shutil.copyfile(file, partial / file.name)
        eos = None
        tuned = step.parent.parent / RUN_TOKENIZER
        if tuned.is_dir():  # its chat template is the one the model has learnt
            for file in tokenizer_files(tuned):
                shutil.copyfile(file, partial / file.name)
            eos = load_tokenizer(tuned).eod
        elif not tokenizer_files(partial):
            eos, note = _tokenizer_of_the_data(metadata, partial)
            notes.append(note)
        dtype = str(dtypes["model.norm.weight"]).removeprefix("torch.")
        config = export_config(model, dtype, metadata.plan, carried, eos)
        if config != carried:
            (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = tuple(sorted(file.name for file in partial.iterdir()))
    length = model.max_position_embeddings or metadata.config["train"]["sequence_length"]
    return Summary(Path(target), model, len(sizes), total, written, describe_rope(model, length), tuple(notes))


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end, and vanishes on any failure."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("DST", str(target), "is there already; name another folder, or remove it first")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("DST", str(target), f"cannot be made ({error.strerror}); choose another") from None
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    folder: Path, weights: CoreWeights, model: ModelConfig, shards: dict[str, list[str]], progress: Progress | None
) -> int:
    """Write every shard; one of them, and the tensors of one core tensor, are in memory. Returns the tensors' bytes."""
    place = {
        name: (rule, layer) for rule in rules(model) for layer in _layers(rule, model) for name in rule.hf_names(layer)
    }
    if model.tie_embeddings:
        place["lm_head.weight"] = place["model.embed_tokens.weight"]
    total = 0
    last: tuple[Any, dict[str, torch.Tensor]] = (None, {})
    for file, names in shards.items():
        if progress is not None:
            progress(file)
        held: dict[str, torch.Tensor] = {}
        for name in names:
            rule, layer = place[name]
            if last[0] != place[name]:
                parts = from_core(rule, model, weights.read(rule, layer))
                last = (place[name], dict(zip(rule.hf_names(layer), parts, strict=True)))
            # Cloned where it would share memory with another of the file, which safetensors refuses.
            part = (
                last[1]["model.embed_tokens.weight"]
                if name == "lm_head.weight" and name not in last[1]
                else last[1][name]
            )
            held[name] = part.clone() if rule.join == "stacked" or name == "lm_head.weight" else part
            total += part.nbytes
        save_file(held, folder / file, metadata={"format": "pt"})
    return total


def _shards(kept: Path, sizes: dict[str, int], limit: float) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """File -> tensor names in the order to write them, as imported or by size; the index's metadata, None: no index."""
    order = {name: at for at, name in enumerate(sizes)}
    if (kept / _SHARDS).is_file():
        values = json.loads((kept / _SHARDS).read_text(encoding="utf-8"))
        shards: dict[str, list[str]] = {}
        for name in sorted(values["weight_map"], key=lambda name: order.get(name, len(order))):
            shards.setdefault(values["weight_map"][name], []).append(name)
        return shards, values.get("metadata", {}) if values["indexed"] else None  # older imports kept none
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}, None
    return {f"model-{at:05d}-of-{len(files):05d}.safetensors": names for at, names in enumerate(files, 1)}, {}


def _tokenizer_of_the_data(metadata: checkpoint_folder.Metadata, folder: Path) -> tuple[int | None, str]:
    """Copy the tokenizer of the data the run was trained on; its end-of-document id, and what to say about it."""
    data = metadata.config["data"]
    source = Path(data["path"] or next(iter(data["blend"] or {}), ""))
    files = tokenizer_files(source / "tokenizer")
    if not files:
        return None, f"no tokenizer: {source}/tokenizer is not there any more; copy one into the folder"
    for file in files:
        shutil.copyfile(file, folder / file.name)
    info = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    return info["eod_id"], f"tokenizer of {source}"


def _carried_plan(values: dict[str, Any], model: ModelConfig) -> list[dict[str, Any]]:
    """The layers that an exported config.json says were MoBA; full attention where it says nothing."""
    section = values.get("moba")
    if section is None:
        return [asdict(layer) for layer in layer_plan(AttentionConfig(pattern="full"), model.num_layers)]
    layers = section.get("layers") if isinstance(section, dict) else None
    if not isinstance(layers, list) or len(layers) != model.num_layers:
        raise ConfigError("SRC: moba", section, f"needs `layers`, a list of {model.num_layers}; or take it out")
    return [dict(layer) for layer in layers]


def _with_length(model: ModelConfig, longest: int) -> ModelConfig:
    return from_dict({**asdict(model), "max_position_embeddings": longest}, ModelConfig)


def _layers(rule: Rule, model: ModelConfig) -> range:
    return range(model.num_layers if rule.per_layer else 1)


def _all_names(rule: Rule, model: ModelConfig) -> list[str]:
    return [name for layer in _layers(rule, model) for name in rule.hf_names(layer)]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _dtype(name: str, tensor: str) -> torch.dtype:
    """torch's dtype by safetensors' name."""
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if name not in known:
        raise ConfigError("SRC", tensor, f"is of type {name}; only {', '.join(known)} are read")
    return known[name]
