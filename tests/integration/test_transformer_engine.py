"""Transformer Engine's layers on one GPU: the same model as the local layers, in bf16 and in fp8."""

import importlib.util
import shutil

import pytest
import torch

from moba_train.config.compose import compose
from tests.helpers.hf import write_folder
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import BF16_LOSS_RTOL, FP8_LOSS_RTOL
from tests.helpers.training import SMALL, corpus, shape_overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no transformer-engine"),
]

# Rows of no multiple of the 16 that fp8 multiplies, so they are padded. The model comes from a Hugging Face folder
# whose norms are far from one, so that a weight in the wrong place shows in the loss.
RECIPE = [
    *(override for override in SMALL if not override.startswith("model.")),
    "train.sequence_length=509",
    "attention.block_size=64",
    "precision=bf16",
]
FOLDER = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
}
TE = "model.transformer_impl=transformer_engine"
ARMS = {"local": [], "te": [TE], "fp8": [TE, "precision=fp8"]}
STEPS = 4


def _all(rank, world_size, data, root, folders):
    """Per family and arm: losses from the folder with a checkpoint before the last; the last step again after a
    resume; losses from the local arm's checkpoint."""
    return {
        (family, name): _arm(data, root, family, folder, name) for family, folder in folders.items() for name in ARMS
    }


def _arm(data, root, family, folder, name):
    from megatron.core import parallel_state

    from moba_train.train import checkpoint
    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import train_step

    def start(place, *overrides):
        config = compose([*RECIPE, f"data.path={data}", f"run.dir={root / family / place}", *ARMS[name], *overrides])
        preflight(config)
        return setup(config)

    def steps(run, number):
        return [train_step(run, stop_requested=False).loss for _ in range(number)]

    from_hf = f"checkpoint.init_from_hf={folder}"
    run = start(name, from_hf)
    straight = steps(run, STEPS - 1)
    checkpoint.save(run)
    straight += steps(run, 1)
    parallel_state.destroy_model_parallel()
    resumed = steps(start(name, from_hf), 1)
    parallel_state.destroy_model_parallel()
    load = [f"checkpoint.load={root / family / 'local'}", "checkpoint.load_weights_only=true"]
    shape = shape_overrides(compose([*RECIPE, from_hf]).model)
    from_local = steps(start(f"{name}-from-local", *load, *shape), 1)
    parallel_state.destroy_model_parallel()
    return {"straight": straight, "resumed": resumed, "from local": from_local}


FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("te")
    data = corpus(root / "data")
    folders = {family: write_folder(root / f"hf-{family}", family, **FOLDER) for family in FAMILIES}
    for folder in folders.values():
        shutil.copytree(data / "tokenizer", folder, dirs_exist_ok=True)
    return run_distributed(_all, 1, data, root, folders, timeout=240, backend="nccl")[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("arm", "tolerance"), [("te", BF16_LOSS_RTOL), ("fp8", FP8_LOSS_RTOL)])
def test_losses_are_those_of_the_local_layers(found, family, arm, tolerance):
    local, other = found[family, "local"], found[family, arm]
    for start in ("straight", "from local"):
        assert other[start] == pytest.approx(local[start], rel=tolerance), start


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_not_bf16(found, family):
    assert found[family, "fp8"]["straight"] != found[family, "te"]["straight"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_goes_on_bit_identically(found, family, arm):
    """The step after a checkpoint, whose loss comes before any sum of the backward pass that has no fixed order."""
    assert found[family, arm]["resumed"] == found[family, arm]["straight"][-1:]
