"""The gate and gradient density of a real model: the same on every layout, true to autograd, no effect on training;
and dense_last_layers=auto, from measuring to resuming."""

import dataclasses

import pytest
import torch

from moba_train.config.schema import AttentionPhase
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import TOLERANCE
from tests.helpers.training import corpus, log_messages, small_config

SPARSE = ["attention.pattern=moba", "attention.block_size=8", "attention.top_k=2", "metrics.gate_per_head=true"]
ALONE = "rows apart"
LAYOUTS = {
    "tensor, sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "context balanced, ring": [
        "parallel.context=2",
        "parallel.context_layout=balanced",
        "parallel.context_strategy=ring",
    ],
    "pipeline interleaved, overlapped": [
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "parallel.overlap_grad_reduce=true",
    ],
}
# A length that no layout here divides, and blocks so small that padding would have queries with a choice.
PADDED = ["train.sequence_length=17", "attention.block_size=2"]
PADDED_LAYOUTS = {
    "context of four, a rank of padding": ["parallel.context=4", "parallel.context_layout=contiguous"],
    "tensor and sequence, data": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline interleaved, context": ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.context=2"],
    "tensor, sequence, context": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
}


class _OneToken:
    """Rows in which the label of a single token counts."""

    def __init__(self, rows):
        self.rows, self.num_rows = rows, len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        keep = torch.zeros_like(row.loss_mask)
        keep[-(index % 4) - 2] = 1
        return dataclasses.replace(row, loss_mask=keep)


def _setup(data, folder, *overrides):
    """A run whose rows carry loss on one token."""
    from moba_train.data.loader import Loader
    from moba_train.train import dense_layers
    from moba_train.train.setup import preflight, setup

    config = small_config(data, folder, *SPARSE, *overrides)
    preflight(config)
    run = setup(config)
    dense_layers._SAMPLED_ROWS = 4  # the process is this test's own
    run.data = dataclasses.replace(run.data, train=_OneToken(run.data.train), valid=_OneToken(run.data.valid))
    run.loader = Loader(run.data.train, global_batch_size=4, dp_rank=run.groups.data.rank, dp_size=run.groups.data.size)
    return run


def _autograd_counts(run):
    """Over this rank's validation rows: per layer and key head, how many values have a non-zero gradient."""
    from moba_train.model.core_attention import CoreAttention
    from moba_train.train.observe import sample_rows
    from moba_train.train.step import to_row

    values = {}
    layers = [module for module in run.chunks[0].modules() if isinstance(module, CoreAttention)]
    ops = [layer.ops for layer in layers]
    for layer in layers:  # v has no rotation: it is handed to the op as it comes

        def kept(q, k, v, *args, op=layer.ops[layer.layer.kind], number=layer.layer_number, **options):
            v.retain_grad()
            values[number] = v
            return op(q, k, v, *args, **options)

        layer.ops = dict.fromkeys(layer.ops, kept)
    counts = 0
    inner = run.chunks[0].module  # not through data parallelism, which would add up gradients
    for (batch,) in sample_rows(run, run.data.valid, 4):
        params = to_row(run, batch).params
        losses = inner(
            batch.tokens[None], batch.positions[None], None, labels=batch.labels[None], packed_seq_params=params
        )
        (losses.reshape(-1) * batch.loss_mask).sum().backward()
        counts += torch.stack([(values[number].grad != 0).any(-1).sum(0) for number in sorted(values)])
    inner.zero_grad()
    for layer, op in zip(layers, ops, strict=True):
        layer.ops = op
    return counts


def _records(run):
    """The same model under two plans: all layers sparse, and a full one among them."""
    from moba_train.train.gate_metrics import gate_record

    found = []
    for pattern in ("moba*2,full,moba", "moba"):
        attention = dataclasses.replace(run.config.attention, pattern=pattern, dense_last_layers=0)
        run.config = dataclasses.replace(run.config, attention=attention)
        found.append(gate_record(run, rows=4))
    return found


def _auto(run, target=None, **attention):
    from moba_train.train.dense_layers import resolve_dense_layers

    before = run.config
    plan = dataclasses.replace(before.attention, dense_last_layers="auto", dense_target=target, **attention)
    run.config = dataclasses.replace(before, attention=plan)
    resolve_dense_layers(run)
    number = run.config.attention.dense_last_layers
    run.config = before.with_dense_last_layers(number)
    return number


def _look(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.train import checkpoint, loop
    from moba_train.train.gate_metrics import gate_record
    from moba_train.train.metrics import read_metrics
    from moba_train.train.step import train_step

    with log_messages() as messages:
        run = _setup(data, root / "initial", "metrics.gate_every=1")
        found = {"records": {ALONE: _records(run)}, "autograd": _autograd_counts(run), "auto": {ALONE: _auto(run)}}
    found["messages"] = [message for message in messages if "dense_last_layers" in message]
    found["sparse from step 5"] = _auto(run, pattern="full", schedule=(AttentionPhase(step=5, pattern="moba"),))
    found["full"] = _auto(run, pattern="full")
    found["low target"] = _auto(run, 0.01)
    sparse, run.data = run.data, dataclasses.replace(run.data, train=run.data.train.rows)
    found["every token"] = _auto(run, 1.0)
    run.data = sparse
    found["high target"] = _auto(run, 0.9)
    checkpoint.save(run)
    found["looked"] = [(train_step(run, stop_requested=False).loss, gate_record(run))[0] for _ in range(2)]
    parallel_state.destroy_model_parallel()

    # The same folder again: the number is the checkpoint's, and so are the steps, without a look this time.
    run = _setup(data, root / "initial", "metrics.gate_every=1", "attention.dense_last_layers=auto")
    found["resumed"] = run.config.attention.dense_last_layers
    found["not looked"] = [train_step(run, stop_requested=False).loss for _ in range(2)]
    # A run that has no step left to do is looked at all the same, and validated where it was not.
    run.stage = dataclasses.replace(run.stage, end=run.step)
    for _ in range(2):
        loop._train(run, loop._StopSignal())
    found["at the end"] = read_metrics(run.folder) if rank == 0 else []
    parallel_state.destroy_model_parallel()

    start = [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]
    for name, overrides in LAYOUTS.items():
        run = _setup(data, root / name, *start, "metrics.gate_every=1", *overrides)
        found["records"][name] = _records(run)
        found["auto"][name] = _auto(run)
        parallel_state.destroy_model_parallel()
    return found


def _look_at_padded(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.train import checkpoint

    start, found = [], {}
    for name, overrides in ({ALONE: []} | PADDED_LAYOUTS).items():
        run = _setup(data, root / name, *PADDED, *start, "metrics.gate_every=1", *overrides)
        if name == ALONE:
            checkpoint.save(run)
            start = [f"checkpoint.load={root / ALONE}", "checkpoint.load_weights_only=true"]
        found[name] = _records(run)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def found_of_padded(tmp_path_factory):
    root = tmp_path_factory.mktemp("padded")
    return run_distributed(_look_at_padded, 4, corpus(root / "data"), root)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("observation")
    return run_distributed(_look, 2, corpus(root / "data"), root, timeout=280)


def numbers(value):
    """All numbers of nested lists and None, flat."""
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value if value is not None else -1.0]


def test_density_counts_the_values_that_autograd_reaches(found):
    rows = 4 * 128
    counts = torch.stack([rank["autograd"] for rank in found]).sum(0)
    assert 0 < counts.min() < counts.max() < rows
    record = found[0]["records"][ALONE][1]
    assert record["gradient_density/loss"] == pytest.approx(4 / rows, abs=1e-6)
    assert torch.tensor(record["gradient_density/pairs_by_head"]).mul(rows).round().int().tolist() == counts.tolist()


def assert_same_record(record, expected):
    assert record.keys() == expected.keys()
    for key in expected.keys() - {"gate/seconds"}:
        assert numbers(record[key]) == pytest.approx(numbers(expected[key]), abs=TOLERANCE[torch.float32]), key


@pytest.mark.parametrize("plan", [0, 1], ids=["hybrid", "sparse"])
@pytest.mark.parametrize("layout", [ALONE, *LAYOUTS])
def test_every_layout_and_rank_sees_the_same(found, layout, plan):
    for rank in found:
        assert_same_record(rank["records"][layout][plan], found[0]["records"][ALONE][plan])


@pytest.mark.parametrize("plan", [0, 1], ids=["hybrid", "sparse"])
@pytest.mark.parametrize("layout", [ALONE, *PADDED_LAYOUTS])
def test_padding_is_never_seen(found_of_padded, layout, plan):
    expected = found_of_padded[0][ALONE][plan]
    assert 0 < expected["gate/choice"][0] < 1
    for rank in found_of_padded:
        assert_same_record(rank[layout][plan], expected)


def test_full_layers_have_a_density_but_no_gate(found):
    record = found[0]["records"][ALONE][0]
    for key, value in record.items():
        if key.startswith("gate/") and isinstance(value, list):
            assert [x is None for x in value] == [False, False, True, False], key
    direct = record["gradient_density/direct"]
    assert direct[2] > max(direct[0], direct[1], direct[3])
    assert len(record["gate/sink_share_by_head"][0]) == 4


def test_looking_does_not_touch_training(found):
    for rank in found:
        assert rank["looked"] == rank["not looked"]
        assert rank["looked"][0] != rank["looked"][1]


def test_a_finished_run_is_looked_at_once_more_and_validated_if_it_was_not(found):
    validation, look = found[0]["at the end"]  # of two starts
    assert validation["step"] == look["step"] == 2
    assert "validation_loss" in validation
    assert {"gate/sink_share", "gradient_density/direct"} <= look.keys()


def test_auto_chooses_alike_everywhere_and_says_why(found):
    number = found[0]["auto"][ALONE]
    assert {n for rank in found for n in rank["auto"].values()} == {number}
    assert 0 < number < 4
    assert (found[0]["sparse from step 5"], found[0]["full"]) == (number, 0)
    (message,) = found[0]["messages"]
    assert "0.78% of the labels of 4 rows carry loss" in message
    assert f"chose {number}" in message


def test_auto_follows_its_target_is_kept_on_resume_and_is_0_for_pretraining(found):
    for rank in found:
        assert rank["high target"] > rank["auto"][ALONE]
        assert rank["resumed"] == rank["high target"]
        assert rank["low target"] == rank["every token"] == 0
