"""Two GPUs train as one does, over NCCL: a small model to rounding in fp32, a billion parameters as bf16 allows.

`-s` prints the curves of the large model.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from experiments.roundtrip_1b.run import GPU
from moba_train.config.compose import compose
from tests.helpers.hf import write_folder
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import BF16_LAYOUT_LOSS_RTOL, BF16_LAYOUT_NORM_RTOL
from tests.helpers.training import Trained, assert_same_training, losses, train_layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

STEPS = 5
CONTEXT = "parallel.context=2"
LAYOUTS = {
    "context, all_gather": [CONTEXT, "parallel.gather_heads=2"],
    "context, all_to_all": [CONTEXT, "parallel.context_strategy=all_to_all"],
    "context, ring": [CONTEXT, "parallel.context_strategy=ring"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline, interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "data, overlapped": ["parallel.overlap_grad_reduce=true"],
}
EXACT = ["attention.backend=portable", "attention.full_backend=sdpa"]
# The shape of recipe 8k, with a full layer at the end; two rows a step.
SHAPE = {
    **GPU.shape,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
RECIPE = [
    "recipe=8k",
    "attention.dense_last_layers=1",
    "train.global_batch_size=2",
    f"train.steps={STEPS}",
    "train.validate_every=0",
    "train.validation_batches=1",
    "optim.warmup_steps=2",
    "checkpoint.save_every=0",
]


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("gpus")
    found: dict[str, Trained] = {}
    for world_size, layouts in ((1, {"one": []}), (2, LAYOUTS)):
        wanted = {name: [*overrides, *EXACT] for name, overrides in layouts.items()}
        found |= train_layouts(root, world_size, wanted, STEPS, timeout=150, backend="nccl")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_reproduce_one(exact: dict[str, Trained], layout: str) -> None:
    assert_same_training(exact[layout], exact["one"])


def _curves(
    rank: int, world_size: int, root: Path, layouts: dict[str, list[str]], backend: str
) -> dict[str, list[tuple[float, float]]]:
    start = [f"data.path={root / 'data'}", f"checkpoint.init_from_hf={root / 'model'}", f"attention.backend={backend}"]
    found = {}
    for name, overrides in layouts.items():
        run = f"run.dir={root / f'{backend}, {name}'.replace(', ', '-').replace(' ', '-')}"
        found[name] = losses(compose([*RECIPE, *start, run, *overrides]), STEPS)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ of the standard library's sources, and model/: random weights, with the data's tokenizer."""
    from moba_train.data.prepare import PrepareArguments, prepare

    folder = tmp_path_factory.mktemp("layouts")
    prepare(PrepareArguments(inputs=(), output=str(folder / "data"), vocab_size=4096, max_megabytes=2))
    with torch.device("cuda"):
        write_folder(folder / "model", "llama", torch.bfloat16, **SHAPE)
    torch.cuda.empty_cache()
    for file in (folder / "data" / "tokenizer").iterdir():
        shutil.copyfile(file, folder / "model" / file.name)
    return folder


@pytest.fixture(scope="module", params=["portable", "triton"])
def curves(request: pytest.FixtureRequest, root: Path) -> dict[str, list[tuple[float, float]]]:
    """Per layout the (loss, gradient norm) of every step; the one GPU's beside the two's."""
    calls = [(1, {"one": []}), (2, LAYOUTS)]
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(run_distributed, _curves, n, root, layouts, request.param, timeout=400, backend="nccl")
            for n, layouts in calls
        ]
        one, two = [call.result() for call in started]
    assert all(curves == two[0] for curves in two), "ranks disagree about a loss or gradient norm"
    found = one[0] | two[0]
    for name, curve in found.items():
        print(f"{request.param:>8} {name:<22}", *(f"{loss:.5f}/{norm:.4f}" for loss, norm in curve), flush=True)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_billion_parameters_train_alike_on_two_gpus(curves: dict, layout: str) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(curves[layout], curves["one"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=BF16_LAYOUT_LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=BF16_LAYOUT_NORM_RTOL)


def test_one_gpu_learns(curves: dict) -> None:
    assert curves["one"][-1][0] < curves["one"][0][0]
