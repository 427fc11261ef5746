"""Two ranks train as one process does, layout by layout: losses, gradient norms and validation loss in fp32."""

import pytest

from tests.helpers.training import assert_same_training, train_layouts

pytestmark = pytest.mark.timeout(900)  # a spawned run has its own, shorter limit

STEPS = 20
CONTEXT, PIPELINE = ["parallel.context=2"], ["parallel.pipeline=2"]
LAYOUTS = {
    "data, distributed optimizer": [],
    "data, overlapped": ["parallel.overlap_grad_reduce=true"],
    "data, replicated optimizer": ["parallel.distributed_optimizer=false"],
    "tensor": ["parallel.tensor=2"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": PIPELINE,
    "pipeline, interleaved": [*PIPELINE, "parallel.virtual_pipeline=2"],
    "context": CONTEXT,
    "context, ring": [*CONTEXT, "parallel.context_strategy=ring"],
    "context, all to all": [*CONTEXT, "parallel.context_strategy=all_to_all"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("parallel")
    calls = [(1, {"one": []}), (2, LAYOUTS)]
    return {k: v for size, layouts in calls for k, v in train_layouts(root, size, layouts, STEPS, timeout=400).items()}


def test_one_process_learns(results):
    losses = [loss for loss, _ in results["one"][0]]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_reproduces_one_process(results, layout):
    assert_same_training(results[layout], results["one"])
