"""Any layout trains as one process does: the same losses and gradient norms in fp32, step by step."""

import pytest

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, losses_of_layouts

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS = 20
STEPS_OF_FEW = 6
TWO_RANKS = {
    "data, distributed optimizer": [],
    "data, overlapped": ["parallel.overlap_grad_reduce=true"],
    "data, replicated optimizer": ["parallel.distributed_optimizer=false"],
    "tensor": ["parallel.tensor=2"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "pipeline, interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2"],
    "context, a key head at a time": ["parallel.context=2", "parallel.gather_heads=1"],
    "context, balanced by document": ["parallel.context=2", "parallel.context_layout=balanced"],
    "context, ring": ["parallel.context=2", "parallel.context_strategy=ring"],
    "context, all to all": ["parallel.context=2", "parallel.context_strategy=all_to_all"],
    "context, ring for full layers": ["parallel.context=2", "parallel.full_context_strategy=ring"],
    "context, one document a row": ["parallel.context=2", "data.mode=concatenated"],
    "full recomputation": ["parallel.recompute=full"],
    "selective recomputation": ["parallel.recompute=selective"],
    "pipeline, overlapped": ["parallel.pipeline=2", "parallel.overlap_grad_reduce=true"],
}
# Query and key norms, an output layer of its own: what Qwen3 has and Llama has not.
QWEN3 = ("model.qk_norm=true", "model.tie_embeddings=false")
TWO_RANKS_OF_QWEN3 = {
    "tensor and sequence, qwen3": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline, qwen3": ["parallel.pipeline=2"],
}
FOUR_RANKS = {
    "tensor, sequence, context": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
    "pipeline, context": ["parallel.pipeline=2", "parallel.context=2"],
    "tensor, pipeline interleaved": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context, data": ["parallel.context=2"],
    "context of four, all to all": ["parallel.context=4", "parallel.context_strategy=all_to_all"],
}
CALLS = [
    (2, TWO_RANKS, STEPS, ()),
    (2, TWO_RANKS_OF_QWEN3, STEPS_OF_FEW, QWEN3),
    (4, FOUR_RANKS, STEPS_OF_FEW, ()),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Per layout (losses and gradient norms, validation loss); one process under each of its names."""
    root = tmp_path_factory.mktemp("parallel")
    data = corpus(root / "data")
    alone = {"one process": [], "one process, concatenated": ["data.mode=concatenated"]}
    (found,) = run_distributed(losses_of_layouts, 1, data, root, alone, STEPS)
    # The validation loss is of the weights after the last step, so shorter runs have a companion.
    (few,) = run_distributed(losses_of_layouts, 1, data, root, {"one process, few steps": []}, STEPS_OF_FEW)
    alone_of_qwen3 = {"one process, qwen3": []}
    (qwen3,) = run_distributed(losses_of_layouts, 1, data, root, alone_of_qwen3, STEPS_OF_FEW, QWEN3)
    found |= few | qwen3
    for world_size, layouts, steps, model in CALLS:
        by_rank = run_distributed(losses_of_layouts, world_size, data, root, layouts, steps, model, timeout=400)
        assert all(result == by_rank[0] for result in by_rank), "ranks disagree about a loss or gradient norm"
        found |= by_rank[0]
    return found


def _companion(layout):
    if layout in TWO_RANKS_OF_QWEN3:
        return "one process, qwen3"
    if layout in FOUR_RANKS:
        return "one process, few steps"
    return "one process, concatenated" if layout == "context, one document a row" else "one process"


def test_one_process_learns(results):
    losses = [loss for loss, _ in results["one process"][0]]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("layout", [*TWO_RANKS, *TWO_RANKS_OF_QWEN3, *FOUR_RANKS])
def test_layout_reproduces_one_process(results, layout):
    (curve, validation), (expected, expected_validation) = results[layout], results[_companion(layout)]
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=GRAD_NORM_RTOL)
    assert validation == pytest.approx(expected_validation, rel=LOSS_RTOL)
