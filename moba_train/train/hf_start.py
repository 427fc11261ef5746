"""Starting a run from a Hugging Face folder (`checkpoint.init_from_hf`): checks before the launch, weights after."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from moba_train.config.schema import ConfigError, RunConfig
from moba_train.data.info import dataset_info
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.validate import weighted_folders
from moba_train.model.convert_hf import fill_model
from moba_train.model.hf_folder import load_hf_folder
from moba_train.train.checkpoint_folder import MODEL_SHAPE, find_start
from moba_train.train.convert import CARRIED, carry_files

if TYPE_CHECKING:
    from moba_train.train.setup import Run

__all__ = ["carry_over", "check_hf_start", "load_hf_start"]

_KEY = "checkpoint.init_from_hf"


def check_hf_start(config: RunConfig) -> None:
    """Refuse a folder that is damaged, of another model than model.*, or of another tokenizer than the data's.

    A run that goes on from its own checkpoint no longer needs the folder.
    """
    folder = config.checkpoint.init_from_hf
    if folder is None or find_start(config) is not None:
        return
    theirs, _ = load_hf_folder(folder, _KEY)
    for key in (*MODEL_SHAPE, "norm_epsilon"):
        ours, value = getattr(config.model, key), getattr(theirs, key)
        if ours != value:
            raise ConfigError(f"model.{key}", ours, f"{folder} has {value}; leave model=... out, and it is taken over")
    if config.data.path is None and not config.data.blend and config.sft.path is None:
        return
    tokenizer = load_tokenizer(folder, key=_KEY)
    if config.sft.path is not None:
        given = config.sft.tokenizer
        if given is not None and load_tokenizer(given, key="sft.tokenizer").sha256 != tokenizer.sha256:
            raise ConfigError("sft.tokenizer", given, f"not the tokenizer of the model: sft.tokenizer={folder}")
        return
    for data, _ in weighted_folders(config.data):
        if dataset_info(data).tokenizer_sha256 != tokenizer.sha256:
            remedy = (
                f"was prepared with another tokenizer than {folder} has: "
                f"python launch/prepare_data.py --tokenizer {folder} --output ..."
            )
            raise ConfigError("data.path", str(data), remedy)


def load_hf_start(run: Run) -> None:
    """Give the run's model the folder's weights; every rank reads its own slice. Rank 0 keeps the other files."""
    folder = run.config.checkpoint.init_from_hf
    assert folder is not None
    model, tensors = load_hf_folder(folder, _KEY)
    fill_model(run.chunks, model, tensors.read)
    run.optimizer.reload_model_params()
    if dist.get_rank() == 0:
        carry_files(tensors, run.folder)
    tensors.close()
    dist.barrier()


def carry_over(run: Run) -> None:
    """Keep the Hugging Face files of the run whose checkpoint this one started from, if it has any."""
    start = find_start(run.config)
    if start is None or dist.get_rank() != 0:
        return
    theirs, ours = start.parent.parent / CARRIED, run.folder / CARRIED
    if theirs.is_dir() and not ours.exists():
        partial = Path(f"{ours}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(theirs, partial)
        partial.rename(ours)
