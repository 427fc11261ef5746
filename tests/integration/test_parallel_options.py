"""Layouts of four ranks, and options of two: the same losses, gradient norms and validation loss as one process's."""

import pytest

from tests.helpers.training import assert_same_training, train_layouts

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS = 4
SEQUENCE, PIPELINE = ["parallel.tensor=2", "parallel.sequence=true"], ["parallel.pipeline=2"]
CONTEXT, FOUR = ["parallel.context=2"], ["parallel.context=4"]
RING, ALL_TO_ALL = ["parallel.context_strategy=ring"], ["parallel.context_strategy=all_to_all"]
# The options of the gate, one of which has weights; they start from a checkpoint without them.
FORCED = ["attention.force_first_block=true", "attention.force_previous_block=true", "attention.top_k=4"]
GATE = [*FORCED, "attention.share_picks_in_group=true", "attention.key_conv=3"]
# Lengths that no layout here divides; of the short one the last of four context ranks holds padding alone.
ODD = ["train.sequence_length=121"]
SHORT = ["train.sequence_length=17", "attention.block_size=2", "attention.key_conv=3"]
# Query and key norms, an output layer of its own: what Qwen3 has and Llama has not.
QWEN3 = ("model.qk_norm=true", "model.tie_embeddings=false")

# One process, by what a layout's name begins with; "plain" for all others.
ONE = {
    "plain": [],
    "concatenated rows": ["data.mode=concatenated"],
    "gate options": GATE,
    "odd rows": ODD,
    "short rows": SHORT,
}
ONE_OF_QWEN3 = {"qwen3": []}
TWO_RANKS = {
    "context, balanced by document": [*CONTEXT, "parallel.context_layout=balanced", "parallel.gather_heads=1"],
    "concatenated rows, context": ["data.mode=concatenated", *CONTEXT, "parallel.full_context_strategy=ring"],
    "pipeline, overlapped": [*PIPELINE, "parallel.overlap_grad_reduce=true", "parallel.recompute=selective"],
    "gate options, tensor and sequence": [*GATE, *SEQUENCE],
    "odd rows, context": [*ODD, *CONTEXT],
    "odd rows, context, ring": [*ODD, *CONTEXT, *RING],
    "odd rows, context, all to all": [*ODD, *CONTEXT, *ALL_TO_ALL, "parallel.context_layout=balanced"],
    "odd rows, tensor and sequence": [*ODD, *SEQUENCE],
}
TWO_RANKS_OF_QWEN3 = {"qwen3, tensor and sequence": SEQUENCE, "qwen3, pipeline": PIPELINE}
FOUR_RANKS = {
    "tensor, pipeline interleaved": ["parallel.tensor=2", *PIPELINE, "parallel.virtual_pipeline=2"],
    "gate options, context of four": [*GATE, *FOUR, *ALL_TO_ALL, "parallel.recompute=full"],
    "context of four, full by ring": [*FOUR, "parallel.gather_heads=1", "parallel.full_context_strategy=ring"],
    "data, context, ring": [*CONTEXT, *RING],
    "odd rows, tensor, sequence, context": [*ODD, *SEQUENCE, *CONTEXT],
    "odd rows, tensor, sequence, pipeline interleaved": [*ODD, *SEQUENCE, *PIPELINE, "parallel.virtual_pipeline=2"],
    "odd rows, pipeline, context": [*ODD, *PIPELINE, *CONTEXT, *ALL_TO_ALL, "parallel.context_overlap=false"],
    "short rows, context of four, ring": [*SHORT, *FOUR, *RING, "parallel.context_layout=contiguous"],
    "gate options, context of two by two, ring across": [*GATE, *FOUR, "parallel.context_inner=2", *RING],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    calls = [
        (1, ONE, ()),
        (1, ONE_OF_QWEN3, QWEN3),
        (2, TWO_RANKS, ()),
        (2, TWO_RANKS_OF_QWEN3, QWEN3),
        (4, FOUR_RANKS, ()),
    ]
    found = {}
    for world_size, layouts, model in calls:
        found |= train_layouts(root, world_size, layouts, STEPS, model, timeout=400)
    return found


def test_gate_options_change_what_is_learnt(results):
    (plain, _), (options, _) = results["plain"], results["gate options"]
    assert options[-1][0] < options[0][0]
    assert abs(options[-1][0] - plain[-1][0]) > 1e-4


@pytest.mark.parametrize("layout", [*TWO_RANKS, *TWO_RANKS_OF_QWEN3, *FOUR_RANKS])
def test_layout_reproduces_one_process(results, layout):
    own = layout.partition(",")[0]
    companion = own if own in (ONE | ONE_OF_QWEN3) else "plain"
    assert_same_training(results[layout], results[companion])
