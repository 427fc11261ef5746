"""Any layout trains as one process does: the same losses and gradient norms in fp32, step by step."""

import pytest

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, losses_of_layouts

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS = 20
# The options of the gate, one of which has weights; they start from a checkpoint without them.
GATE = ["attention.force_previous_block=true", "attention.share_picks_in_group=true", "attention.key_conv=3"]
STEPS_OF_FOUR = 6
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
    "gate options, context, balanced": [*GATE, "parallel.context=2", "parallel.context_layout=balanced"],
    "gate options, tensor and sequence": [*GATE, "parallel.tensor=2", "parallel.sequence=true"],
}
FOUR_RANKS = {
    "tensor, sequence, context": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
    "pipeline, context": ["parallel.pipeline=2", "parallel.context=2"],
    "tensor, pipeline interleaved": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context, data": ["parallel.context=2"],
    "context of four, all to all": ["parallel.context=4", "parallel.context_strategy=all_to_all"],
    "gate options, context of four, all to all": [
        *GATE,
        "parallel.context=4",
        "parallel.context_strategy=all_to_all",
        "parallel.recompute=full",
    ],
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """(one process, one process on concatenated rows, all layouts) as lists of (loss, gradient norm)."""
    root = tmp_path_factory.mktemp("parallel")
    data = corpus(root / "data")
    alone = {
        "one process": [],
        "one process, concatenated": ["data.mode=concatenated"],
        "one process, gate options": GATE,
    }
    (found,) = run_distributed(losses_of_layouts, 1, data, root, alone, STEPS)
    for world_size, layouts, steps in ((2, TWO_RANKS, STEPS), (4, FOUR_RANKS, STEPS_OF_FOUR)):
        by_rank = run_distributed(losses_of_layouts, world_size, data, root, layouts, steps, timeout=400)
        assert all(result == by_rank[0] for result in by_rank), "ranks disagree about loss or gradient norm"
        found |= by_rank[0]
    return found


def test_one_process_learns(curves):
    losses = [loss for loss, _ in curves["one process"]]
    assert losses[-1] < losses[0] - 0.3


def test_gate_options_change_what_is_learnt(curves):
    plain, options = curves["one process"], curves["one process, gate options"]
    assert options[-1][0] < options[0][0] - 0.3
    assert abs(options[-1][0] - plain[-1][0]) > 1e-3


def _reference(layout: str) -> str:
    if layout.startswith("gate options"):
        return "one process, gate options"
    return "one process, concatenated" if layout == "context, one document a row" else "one process"


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS])
def test_layout_reproduces_one_process(curves, layout):
    expected = curves[_reference(layout)]
    steps = STEPS if layout in TWO_RANKS else STEPS_OF_FOUR
    for (loss, norm), (expected_loss, expected_norm) in zip(curves[layout], expected[:steps], strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=GRAD_NORM_RTOL)
