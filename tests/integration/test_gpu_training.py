"""Two GPUs train as one does, over NCCL: to rounding in fp32, and as near as bf16 allows with the kernels."""

import pytest
import torch

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import BF16_LOSS_RTOL, GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, losses_of_layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]

STEPS = 6
LAYOUTS = {
    "data": ["parallel.overlap_grad_reduce=true"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline, interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2"],
    "context, ring": ["parallel.context=2", "parallel.context_strategy=ring"],
    "context, all to all": ["parallel.context=2", "parallel.context_strategy=all_to_all"],
}
EXACT = ["attention.backend=portable", "attention.full_backend=sdpa"]
# Heads that the kernels take, and weights of their own.
KERNELS = ("model.hidden_size=256", "model.head_dim=64", "precision=bf16")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Per (kind, layout) the (loss, gradient norm) of every step, and the validation loss after the last."""
    root = tmp_path_factory.mktemp("gpus")
    data = corpus(root / "data")
    found = {}
    for kind, model, more in (("exact", (), EXACT), ("kernels", KERNELS, [])):
        for world_size, layouts in ((1, {"one": []}), (2, LAYOUTS)):
            wanted = {f"{kind}, {name}": [*overrides, *more] for name, overrides in layouts.items()}
            arguments = (data, root, wanted, STEPS, model)
            found |= run_distributed(losses_of_layouts, world_size, *arguments, timeout=150, backend="nccl")[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_reproduce_one(results, layout):
    (curve, validation), (expected, expected_validation) = results[f"exact, {layout}"], results["exact, one"]
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=LOSS_RTOL)
    assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in expected], rel=GRAD_NORM_RTOL)
    assert validation == pytest.approx(expected_validation, rel=LOSS_RTOL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_train_alike_on_two_gpus(results, layout):
    (curve, validation), (expected, expected_validation) = results[f"kernels, {layout}"], results["kernels, one"]
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=BF16_LOSS_RTOL)
    assert validation == pytest.approx(expected_validation, rel=BF16_LOSS_RTOL)
