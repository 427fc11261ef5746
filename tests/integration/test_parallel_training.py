"""Any layout trains as one process does: the same losses, gradient norms and validation loss in fp32."""

import pytest

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, losses_of_layouts

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS, FEW_STEPS = 20, 6
TENSOR, SEQUENCE = ["parallel.tensor=2"], ["parallel.tensor=2", "parallel.sequence=true"]
PIPELINE, INTERLEAVED = ["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
CONTEXT = ["parallel.context=2"]
RING, ALL_TO_ALL = ["parallel.context_strategy=ring"], ["parallel.context_strategy=all_to_all"]
# The options of the gate, one of which has weights; they start from a checkpoint without them.
GATE = ["attention.force_previous_block=true", "attention.share_picks_in_group=true", "attention.key_conv=3"]
# Query and key norms, an output layer of its own: what Qwen3 has and Llama has not.
QWEN3 = ("model.qk_norm=true", "model.tie_embeddings=false")

TWO_RANKS = {
    "data, distributed optimizer": [],
    "data, overlapped": ["parallel.overlap_grad_reduce=true"],
    "data, replicated optimizer": ["parallel.distributed_optimizer=false"],
    "tensor": TENSOR,
    "tensor and sequence": SEQUENCE,
    "pipeline": PIPELINE,
    "pipeline, interleaved": INTERLEAVED,
    "context": CONTEXT,
    "context, ring": [*CONTEXT, *RING],
    "context, all to all": [*CONTEXT, *ALL_TO_ALL],
}
TWO_RANKS_FEW_STEPS = {
    "context, a key head at a time": [*CONTEXT, "parallel.gather_heads=1"],
    "context, balanced by document": [*CONTEXT, "parallel.context_layout=balanced"],
    "context, ring for full layers": [*CONTEXT, "parallel.full_context_strategy=ring"],
    "concatenated rows, context": ["data.mode=concatenated", *CONTEXT],
    "full recomputation": ["parallel.recompute=full"],
    "selective recomputation": ["parallel.recompute=selective"],
    "pipeline, overlapped": [*PIPELINE, "parallel.overlap_grad_reduce=true"],
    "gate options, context, balanced": [*GATE, *CONTEXT, "parallel.context_layout=balanced"],
    "gate options, tensor and sequence": [*GATE, *SEQUENCE],
}
TWO_RANKS_OF_QWEN3 = {"qwen3, tensor and sequence": SEQUENCE, "qwen3, pipeline": PIPELINE}
FOUR_RANKS = {
    "tensor, sequence, context": [*SEQUENCE, *CONTEXT],
    "pipeline, context": [*PIPELINE, *CONTEXT],
    "tensor, pipeline interleaved": [*TENSOR, *INTERLEAVED],
    "context, data": CONTEXT,
    "context of four, all to all": ["parallel.context=4", *ALL_TO_ALL],
    "context of two by two, ring across": ["parallel.context=4", "parallel.context_inner=2", *RING],
    "context of two by two, gather across": ["parallel.context=4", "parallel.context_inner=2"],
    "gate options, context of two by two": [*GATE, "parallel.context=4", "parallel.context_inner=2", *RING],
    "gate options, context of four": [*GATE, "parallel.context=4", *ALL_TO_ALL, "parallel.recompute=full"],
}
# One process, by what a layout's name begins with; "few" are the first steps of "one".
ONE = {"one": []}
ONE_FEW_STEPS = {"few": [], "concatenated rows": ["data.mode=concatenated"], "gate options": GATE}
ONE_OF_QWEN3 = {"qwen3": []}
CALLS = [
    (1, ONE, STEPS, ()),
    (1, ONE_FEW_STEPS, FEW_STEPS, ()),
    (1, ONE_OF_QWEN3, FEW_STEPS, QWEN3),
    (2, TWO_RANKS, STEPS, ()),
    (2, TWO_RANKS_FEW_STEPS, FEW_STEPS, ()),
    (2, TWO_RANKS_OF_QWEN3, FEW_STEPS, QWEN3),
    (4, FOUR_RANKS, FEW_STEPS, ()),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Per layout its (loss, gradient norm) of every step, and the validation loss after the last."""
    root = tmp_path_factory.mktemp("parallel")
    data = corpus(root / "data")
    found = {}
    for world_size, layouts, steps, model in CALLS:
        by_rank = run_distributed(losses_of_layouts, world_size, data, root, layouts, steps, model, timeout=400)
        assert all(result == by_rank[0] for result in by_rank), "ranks disagree about a loss or gradient norm"
        found |= by_rank[0]
    return found


def test_one_process_learns(results):
    losses = [loss for loss, _ in results["one"][0]]
    assert losses[-1] < losses[0] - 0.3


def test_gate_options_change_what_is_learnt(results):
    (plain, _), (options, _) = results["few"], results["gate options"]
    assert options[-1][0] < options[0][0]
    assert abs(options[-1][0] - plain[-1][0]) > 1e-4


@pytest.mark.parametrize("layout", [*TWO_RANKS, *TWO_RANKS_FEW_STEPS, *TWO_RANKS_OF_QWEN3, *FOUR_RANKS])
def test_layout_reproduces_one_process(results, layout):
    own = layout.partition(",")[0]
    companion = "one" if layout in TWO_RANKS else own if own in (ONE_FEW_STEPS | ONE_OF_QWEN3) else "few"
    (curve, validation), (expected, expected_validation) = results[layout], results[companion]
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=GRAD_NORM_RTOL)
    assert validation == pytest.approx(expected_validation, rel=LOSS_RTOL)
