"""Checkpoint folders without their tensors: what is in one, which one a run starts from, and what is refused before.

    run.dir/checkpoints/step_00000100/   sharded weights, optimizer, schedule, random state; moba_train.json beside them
    run.dir/checkpoints/latest           name of the newest complete checkpoint, written last and atomically

moba_train.json holds the resolved configuration, the layer plan, the step and the data position, and a manifest (size
and CRC-32 of every file), so that a truncated or altered file is named before anything is loaded from it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moba_train.config.schema import ConfigError, ModelConfig, RunConfig, to_dict
from moba_train.config.validate import padded_vocab_size
from moba_train.train.files import checksum, write_durably

__all__ = [
    "MODEL_SHAPE",
    "CheckpointError",
    "Metadata",
    "begins_stage",
    "check",
    "check_content",
    "check_files",
    "complete_checkpoints",
    "corrupt",
    "data_key",
    "find_start",
    "is_own",
    "key_conv_width",
    "latest_checkpoint",
    "loads_weights_only",
    "locate",
    "manifest_of",
    "outdated",
    "point_latest",
    "read_metadata",
    "write_metadata",
]

_METADATA = "moba_train.json"
# What must be equal for a checkpoint's weights to fit; rope, init and implementation may change.
MODEL_SHAPE = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "qk_norm",
    "qkv_bias",
    "tie_embeddings",
]

# What optimizer state and data position depend on: it stays, or the weights alone are loaded.
_POSITION = {
    "parallel": ("distributed_optimizer",),
    "train": ("global_batch_size", "sequence_length", "freeze"),
    "data": ("mode",),
    "sft": ("packing", "overlong", "last_turn_only", "valid_fraction"),
}
_DEFAULTS = to_dict(RunConfig())


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read: which file, and where else to start from."""


@dataclass(frozen=True)
class Metadata:
    """What moba_train.json says. manifest: file name -> [size in bytes, CRC-32]."""

    step: int
    tokens: int
    data: dict[str, Any]
    config: dict[str, Any]
    plan: list[dict[str, Any]]
    world_size: int
    manifest: dict[str, list[int]]
    rope: str = ""  # the effective base and scale, as the log says them
    content: str = ""  # hash of what it was trained on; empty: not known
    weights_only: bool = False  # no optimizer, schedule or data position: a converted checkpoint


def find_start(config: RunConfig) -> Path | None:
    """The checkpoint this run starts from: its own latest when resuming, else `checkpoint.load`, else none."""
    if config.checkpoint.resume and config.run.dir is not None:
        own = latest_checkpoint(Path(config.run.dir) / "checkpoints")
        if own is not None:
            return own
    if config.checkpoint.load is None:
        return None
    return locate(Path(config.checkpoint.load), "checkpoint.load")


def locate(path: Path, key: str) -> Path:
    """The step folder that `path` means: itself, or the latest of a run or checkpoints folder; else ConfigError."""
    for folder in (path / "checkpoints", path):
        if (found := latest_checkpoint(folder)) is not None:
            return found
    if (path / _METADATA).is_file():
        return path
    raise ConfigError(
        key, str(path), "no checkpoint there; give a run folder, its checkpoints folder, or one step folder"
    )


def latest_checkpoint(root: Path) -> Path | None:
    """The step folder that `latest` in a checkpoints folder names; None where nothing was saved.

    Raises CheckpointError when it is gone, or when `latest` names none or is missing beside several: to begin anew
    would write over them.
    """
    marker = root / "latest"
    if not marker.is_file():
        saved = complete_checkpoints(root)
        if len(saved) > 1:
            raise corrupt(marker, "it is missing, and there are saved steps")
        return saved[0] if saved else None  # the first is whole before it is named
    name = marker.read_text(errors="replace").strip()
    if not name.startswith("step_"):
        raise corrupt(marker, "it does not name a saved step")
    path = root / name
    if not path.is_dir():
        raise corrupt(path, "the folder that `latest` names is missing")
    return path


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints of a checkpoints folder, oldest first."""
    return sorted(path for path in root.glob("step_*") if path.suffix != ".partial")


def outdated(newest: Path, keep_last: int, kept: Collection[str] = ()) -> list[Path]:
    """The checkpoints that go when `newest` and the last before it stay, `keep_last` in all; those named in `kept` stay
    as well. Later ones than `newest` are not touched."""
    older = [path for path in complete_checkpoints(newest.parent) if path.name < newest.name and path.name not in kept]
    return older[: max(0, len(older) + 1 - keep_last)]


def check(config: RunConfig, stage_start: int = 0) -> None:
    """Refuse a start that cannot work, without a process group: unreadable, truncated, or of another model shape.

    stage_start: steps before the stage that `config` is of; a checkpoint at that very step is of the stage before.
    """
    path = find_start(config)
    if path is None:
        return
    metadata = read_metadata(path)
    check_files(path, metadata)
    _check_position(config, path, metadata, stage_start)
    _check_key_conv(config, path, metadata)
    _check_padding(config, path, metadata)
    for key in MODEL_SHAPE:
        # A checkpoint from before a key existed has its default.
        theirs = metadata.config["model"].get(key, getattr(ModelConfig, key))
        ours = getattr(config.model, key)
        if theirs != ours:
            raise ConfigError(
                f"model.{key}",
                ours,
                f"the checkpoint {path} has {theirs}; choose the same model, or another checkpoint",
            )


def check_content(config: RunConfig, content: str, stage_start: int = 0) -> None:
    """Refuse to resume a run on other data, or in another order of them, than it began with: `content` is their hash.

    Another run may go on from the checkpoint with data of its own; `restore` says so then.
    """
    path = find_start(config)
    if path is None or not is_own(config, path) or loads_weights_only(config, path):
        return
    metadata = read_metadata(path)
    if begins_stage(config, path, metadata, stage_start):
        return
    remedy = f"or go on in another run.dir with checkpoint.load={path}"
    seed = metadata.config["data"]["seed"]
    if seed != config.data.seed:
        what = f"the checkpoint {path} has a position in the order of data.seed={seed}; use that"
        raise ConfigError("data.seed", config.data.seed, f"{what}, {remedy}")
    if metadata.content not in ("", content):
        key, value = data_key(config)
        what = f"what it gives to train on is not what it was at the checkpoint {path}; bring that back"
        raise ConfigError(key, value, f"{what}, {remedy}")


def data_key(config: RunConfig) -> tuple[str, Any]:
    """The key that says what the run trains on, and its value."""
    if config.sft.path is not None:
        return "sft.path", config.sft.path
    if config.data.path is not None:
        return "data.path", config.data.path
    return "data.blend", config.data.blend


def _check_padding(config: RunConfig, path: Path, metadata: Metadata) -> None:
    """Optimizer state is stored with the padding of the vocabulary; weights alone load with any."""
    theirs, ours = metadata.config["parallel"]["tensor"], config.parallel.tensor
    was, now = (padded_vocab_size(config.model.vocab_size, size) for size in (theirs, ours))
    if was != now and not loads_weights_only(config, path):
        what = f"the vocabulary of {config.model.vocab_size} is padded to {now}, and to {was} in the checkpoint {path}"
        raise ConfigError("parallel.tensor", ours, f"{what}; use {theirs}, or checkpoint.load_weights_only=true")


def check_files(path: Path, metadata: Metadata, contents: bool = False) -> None:
    """CheckpointError for the first file that is missing or of another size; with `contents`, of another checksum."""
    for name, saved in metadata.manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != saved[0]:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise corrupt(path, f"{name} should have {saved[0]} bytes and is {found}")
        if contents and checksum(file) != saved:
            raise corrupt(path, f"{name} is not the file that was saved (its checksum differs)")


def read_metadata(path: Path) -> Metadata:
    """moba_train.json of a checkpoint folder; CheckpointError when it is missing or damaged."""
    try:
        metadata = Metadata(**json.loads((path / _METADATA).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise corrupt(path, f"{_METADATA}: {error}") from None
    expected = {"step": int, "config": dict, "manifest": dict}
    wrong = [name for name, kind in expected.items() if not isinstance(getattr(metadata, name), kind)]
    wrong += [name for name in ("config", "manifest") if not getattr(metadata, name)]
    if wrong:
        raise corrupt(path, f"{_METADATA}: its {wrong[0]} is {getattr(metadata, wrong[0])!r}")
    return metadata


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write moba_train.json of a checkpoint folder, whole or not at all."""
    write_durably(folder / _METADATA, json.dumps(asdict(metadata), indent=1))


def manifest_of(folder: Path) -> dict[str, list[int]]:
    """[size, CRC-32] of every file in `folder`."""
    return {file.name: checksum(file) for file in sorted(folder.iterdir())}


def point_latest(folder: Path) -> None:
    """Make the step folder the latest of its checkpoints folder."""
    write_durably(folder.parent / "latest", folder.name)


def loads_weights_only(config: RunConfig, path: Path) -> bool:
    """Whether the run takes only the weights of `path`: never of a checkpoint of its own that it resumes from."""
    return config.checkpoint.load_weights_only and not (config.checkpoint.resume and is_own(config, path))


def key_conv_width(metadata: Metadata) -> int:
    """Width of the key convolution that a checkpoint was trained with; 0: none."""
    return metadata.config["attention"].get("key_conv", 0)


def corrupt(path: Path, what: str) -> CheckpointError:
    """The error for a damaged checkpoint, naming another one to start from."""
    others = [other.name for other in complete_checkpoints(path.parent) if other != path]
    instead = (
        f"start from another: checkpoint.resume=false checkpoint.load={path.parent / others[-1]}"
        if others
        else "there is no other one beside it"
    )
    return CheckpointError("checkpoint", str(path), f"corrupt: {what}; {instead}")


def _check_position(config: RunConfig, path: Path, metadata: Metadata, stage_start: int) -> None:
    """A full load takes over optimizer and data position: what they depend on must be the checkpoint's."""
    if metadata.weights_only and not loads_weights_only(config, path):
        what = f"{path} was converted and holds weights alone: "
        raise ConfigError(
            "checkpoint.load_weights_only", False, what + "set it to true, with checkpoint.load, in another run.dir"
        )
    if loads_weights_only(config, path):
        return
    fresh = "use it, or start from the weights alone: checkpoint.load_weights_only=true with checkpoint.load"
    theirs, ours = ({**_DEFAULTS, **values} for values in (metadata.config, to_dict(config)))
    if (theirs["sft"]["path"] is None) != (ours["sft"]["path"] is None):
        what = "on chat rows" if ours["sft"]["path"] is None else "on plain text"
        raise ConfigError("sft.path", ours["sft"]["path"], f"the checkpoint {path} was trained {what}; {fresh}")
    if not is_own(config, path) and metadata.step >= config.train.steps:
        more = f"the checkpoint {path} is at step {metadata.step} already; ask for more steps"
        raise ConfigError("train.steps", config.train.steps, more)
    begins = begins_stage(config, path, metadata, stage_start)
    if stage_start and not begins:
        _check_rows(config, path, metadata, stage_start)
    for section, names in _POSITION.items():
        for name in names:
            if begins and name in ("global_batch_size", "sequence_length"):
                continue
            # JSON knows lists only, and older checkpoints lack newer keys.
            was, now = (values[section].get(name, _DEFAULTS[section][name]) for values in (theirs, ours))
            was, now = (list(value) if isinstance(value, tuple) else value for value in (was, now))
            if was != now:
                raise ConfigError(f"{section}.{name}", now, f"the checkpoint {path} was trained with {was}; {fresh}")


def begins_stage(config: RunConfig, path: Path, metadata: Metadata, stage_start: int) -> bool:
    """Whether a stage after the first begins from this checkpoint, with rows of its own."""
    return stage_start > 0 and metadata.step == stage_start and not loads_weights_only(config, path)


def _check_rows(config: RunConfig, path: Path, metadata: Metadata, stage_start: int) -> None:
    """A checkpoint within a stage: it has taken the rows of the stage's steps so far, if these began where they do."""
    taken, wanted = metadata.data["consumed_samples"], (metadata.step - stage_start) * config.train.global_batch_size
    if taken != wanted:
        remedy = f"its stages began at other steps ({taken} rows of this one are taken, not {wanted}); use those"
        raise ConfigError("stages", str(path), remedy)


def _check_key_conv(config: RunConfig, path: Path, metadata: Metadata) -> None:
    """Learned convolutions are never dropped; missing ones start as the identity, with a fresh optimizer."""
    theirs, ours = key_conv_width(metadata), config.attention.key_conv
    if theirs not in (0, ours):
        raise ConfigError("attention.key_conv", ours, f"the checkpoint {path} was trained with {theirs}; use it")
    if theirs != ours and not loads_weights_only(config, path):
        remedy = (
            f"the checkpoint {path} has none; begin with its weights, the convolution as identity, in a new run: "
            "checkpoint.load_weights_only=true with checkpoint.load"
        )
        raise ConfigError("attention.key_conv", ours, remedy)


def is_own(config: RunConfig, path: Path) -> bool:
    """Whether a checkpoint is one that this very run wrote."""
    return config.run.dir is not None and path.resolve().is_relative_to(Path(config.run.dir).resolve())
