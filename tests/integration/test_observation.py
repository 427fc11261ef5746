"""The gate and gradient density of a real model: the same on every layout, true to autograd, without effect on training;
and dense_last_layers=auto, from measuring to resuming."""

import dataclasses
import logging

import pytest
import torch

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import TOLERANCE
from tests.helpers.training import corpus, small_config

SPARSE = ["attention.pattern=moba", "attention.block_size=8", "attention.top_k=2", "metrics.gate_per_head=true"]
ALONE = "a row each"
LAYOUTS = {
    ALONE: [],
    "tensor, sequence, context": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
    "pipeline, ring": ["parallel.pipeline=2", "parallel.context=2", "parallel.context_strategy=ring"],
    "interleaved, overlapped": [
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "parallel.overlap_grad_reduce=true",
    ],
    "context of four, balanced": ["parallel.context=4", "parallel.context_layout=balanced"],
}


class _OneToken:
    """Rows in which the label of a single token counts."""

    def __init__(self, rows):
        self.rows = rows

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
    from moba_train.train.setup import preflight, setup

    config = small_config(data, folder, *SPARSE, *overrides)
    preflight(config)
    run = setup(config)
    run.data = dataclasses.replace(run.data, train=_OneToken(run.data.train), valid=_OneToken(run.data.valid))
    run.loader = Loader(run.data.train, global_batch_size=4, dp_rank=run.groups.data.rank, dp_size=run.groups.data.size)
    return run


def _autograd_counts(run):
    """Over this rank's validation row: per layer and key head, how many values have a non-zero gradient."""
    from moba_train.model.core_attention import CoreAttention, set_layer_plan
    from moba_train.model.layer_plan import layer_plan
    from moba_train.train.observe import sample_rows
    from moba_train.train.step import _to_row

    values = {}
    layers = [module for module in run.chunks[0].modules() if isinstance(module, CoreAttention)]
    for layer in layers:  # v has no rotation: it is handed to the op as it comes

        def kept(q, k, v, *args, op=layer.ops[layer.layer.kind], number=layer.layer_number, **options):
            v.retain_grad()
            values[number] = v
            return op(q, k, v, *args, **options)

        layer.ops = dict.fromkeys(layer.ops, kept)
    set_layer_plan(run.chunks, layer_plan(run.config.attention, run.config.model.num_layers))
    ((batch,),) = sample_rows(run, run.data.valid, 4)
    row = _to_row(run, batch)
    inner = run.chunks[0].module  # not through data parallelism, which would add up gradients
    losses = inner(
        batch.tokens[None], batch.positions[None], None, labels=batch.labels[None], packed_seq_params=row.params
    )
    (losses.reshape(-1) * batch.loss_mask).sum().backward()
    return [(values[number].grad != 0).any(-1).sum(0).tolist() for number in sorted(values)]


def _look(rank, world_size, data, root):
    from megatron.core import parallel_state

    from moba_train.train import checkpoint
    from moba_train.train.dense_layers import resolve_dense_layers
    from moba_train.train.gate_metrics import gate_record
    from moba_train.train.step import train_step

    logging.getLogger("moba_train").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("moba_train").addHandler(handler)
    found = {"records": {}, "hybrid": {}, "auto": {}}
    start = [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]
    run = _setup(data, root / "initial", "metrics.gate_every=1")
    checkpoint.save(run)
    found["autograd"] = _autograd_counts(run)
    parallel_state.destroy_model_parallel()
    for name, overrides in LAYOUTS.items():
        run = _setup(data, root / name, *start, "attention.dense_last_layers=auto", "metrics.gate_every=1", *overrides)
        resolve_dense_layers(run)
        found["auto"][name] = run.config.attention.dense_last_layers
        # The same model under two plans: all layers sparse, and a full one among them.
        for kind, pattern in (("records", "moba"), ("hybrid", "moba*2,full,moba")):
            attention = dataclasses.replace(run.config.attention, pattern=pattern, dense_last_layers=0)
            run.config = dataclasses.replace(run.config, attention=attention)
            found[kind][name] = gate_record(run, rows=4)
        parallel_state.destroy_model_parallel()
    found["message"] = messages[0] if messages else None

    curves = []
    for look in (False, True):
        run = _setup(data, root / f"look {look}", *start, "metrics.gate_every=1", "parallel.tensor=2")
        curves.append([])
        for _ in range(2):
            curves[-1].append((train_step(run, stop_requested=False).loss, gate_record(run) if look else None))
        parallel_state.destroy_model_parallel()
    found["curves"] = [[loss for loss, _ in curve] for curve in curves]

    def number(folder, *overrides, resume=False):
        run = _setup(data, folder, "attention.dense_last_layers=auto", "metrics.gate_every=1", *start, *overrides)
        if "dense" not in str(folder):
            run.data = dataclasses.replace(run.data, train=run.data.train.rows)
        resolve_dense_layers(run)
        if not resume:
            checkpoint.save(run)
        parallel_state.destroy_model_parallel()
        return run.config.attention.dense_last_layers

    found["target of 0.9"] = number(root / "dense", "attention.dense_target=0.9")
    found["resumed"] = number(root / "dense", "attention.dense_target=0.01", resume=True)
    found["target of 0.01"] = number(root / "dense low", "attention.dense_target=0.01")
    found["pretraining"] = number(root / "every token", "attention.dense_target=1.0")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("observation")
    return run_distributed(_look, 4, corpus(root / "data"), root, timeout=280)


def numbers(value):
    """All numbers of nested lists and None, flat."""
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value if value is not None else -1.0]


def test_density_counts_the_values_that_autograd_reaches(found):
    rows = 4 * 128
    counts = torch.tensor([rank["autograd"] for rank in found]).sum(0)
    assert 0 < counts.min() < counts.max() < rows
    record = found[0]["records"][ALONE]
    assert record["gradient_density/loss"] == pytest.approx(4 / rows, abs=1e-6)
    assert torch.tensor(record["gradient_density/pairs_by_head"]).mul(rows).round().int().tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["records", "hybrid"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_rank_sees_the_same(found, layout, kind):
    expected = found[0][kind][ALONE]
    for rank in found:
        record = rank[kind][layout]
        assert record.keys() == expected.keys()
        for key in expected.keys() - {"gate/seconds"}:
            assert numbers(record[key]) == pytest.approx(numbers(expected[key]), abs=TOLERANCE[torch.float32]), key


def test_full_layers_have_a_density_but_no_gate(found):
    record = found[0]["hybrid"][ALONE]
    for key, value in record.items():
        if key.startswith("gate/") and isinstance(value, list):
            assert [x is None for x in value] == [False, False, True, False], key
    assert record["gradient_density/direct"][2] > max(record["gradient_density/direct"][layer] for layer in (0, 1, 3))
    assert len(record["gate/sink_share_by_head"][0]) == 4


def test_looking_does_not_touch_training(found):
    without, looked = found[0]["curves"]
    assert without == looked


def test_auto_chooses_alike_everywhere_and_says_why(found):
    assert {n for rank in found for n in rank["auto"].values()} == {found[0]["auto"][ALONE]}
    assert 0 < found[0]["auto"][ALONE] < 4
    assert "0.78% of the labels of 16 rows carry loss" in found[0]["message"]
    assert f"chose {found[0]['auto'][ALONE]}" in found[0]["message"]
    assert all(rank["message"] is None for rank in found[1:])


def test_auto_follows_its_target_is_kept_on_resume_and_is_0_for_pretraining(found):
    for rank in found:
        assert rank["target of 0.9"] > rank["auto"][ALONE]
        assert rank["resumed"] == rank["target of 0.9"]
        assert rank["target of 0.01"] == rank["pretraining"] == 0
