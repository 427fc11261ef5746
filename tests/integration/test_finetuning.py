"""Fine-tuning over layouts: loss weights, frozen parameters, chat rows, resuming. One spawn of one rank, one of two.

- loss and gradients do not depend on packing, on how a batch is split, or on data and context parallelism
- what is frozen stays to the bit, and the rest trains as it would
- a run on chat rows starts from a checkpoint, in any layout, and resumes bit by bit
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train.config.compose import compose
from moba_train.config.schema import ConfigError, RunConfig
from moba_train.data.bins import pack
from moba_train.data.packing import pack_documents
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import INDEPENDENCE_RTOL, LOSS_RTOL
from tests.helpers.training import SMALL, corpus, losses, small_config

S, BATCH = 127, 8  # no layout here divides S; BATCH rows a step: documents that need fewer are followed by empty rows
MASKS = ("random", "weighted", "single token", "none")
PACKINGS = ("none", "sequential", "first_fit_decreasing", "reversed")
LAYOUTS = {
    "data": [],
    "gather": ["parallel.context=2"],
    "ring": ["parallel.context=2", "parallel.context_strategy=ring"],
    "swap": ["parallel.context=2", "parallel.context_strategy=all_to_all"],
}

PATTERNS = ["embedding.*", "decoder.layers.[03].*", "*.input_layernorm.weight"]
FREEZE = "train.freeze=[" + ",".join(f'"{pattern}"' for pattern in PATTERNS) + "]"
FROZEN_ALONE = {"alone": [], "recompute": ["parallel.recompute=full"]}
FROZEN_PAIRS = {"data": [], "pipeline": ["parallel.pipeline=2"], "overlap": ["parallel.overlap_grad_reduce=true"]}
FROZEN_RESUMED = ("data",)

ROWS_PAIRS = {"data": [], "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"]}


def _measure(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    if world_size == 1:
        losses(small_config(root / "data", root / "initial"), 0, save=True)
        return {
            "gradients": _gradients(root, {"alone": []}, PACKINGS),
            "frozen": _frozen(root, world_size, FROZEN_ALONE),
            "rows": _rows_alone(root),
        }
    # A cache of their own: rank 0 tokenises, the other waits for it.
    cache = f"data.cache_dir={root / 'cache-of-two'}"
    return {
        "gradients": _gradients(root, LAYOUTS, ("sequential",)),
        "frozen": _frozen(root, world_size, FROZEN_PAIRS),
        "rows": {name: losses(_rows_config(root, name, cache, *options), 4) for name, options in ROWS_PAIRS.items()},
    }


def _start(root: Path) -> list[str]:
    return [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: what one rank measured, and what the two did."""
    root = tmp_path_factory.mktemp("finetuning")
    corpus(root / "data")
    _write_rows(root / "rows.jsonl")
    return {
        "alone": run_distributed(_measure, 1, root)[0],
        "pair": run_distributed(_measure, 2, root, timeout=240),
    }


class _Packed:
    """BATCH rows that hold the documents, packed in one way."""

    def __init__(self, mask: str, packing: str) -> None:
        documents = list(_documents(mask))
        if packing == "reversed":
            documents, packing = documents[::-1], "sequential"
        bins = pack([len(tokens) - 1 for tokens, _ in documents], S, packing)
        self.rows = [[documents[item] for item in items] for items in bins]

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, index: int) -> Any:
        return pack_documents(self.rows[index] if index < len(self.rows) else [], S)


def _documents(mask: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)
    for number, size in enumerate((S + 1, 40, 81, 17, 2, 60, 100, 33)):
        tokens = torch.randint(0, 384, (size,), generator=random)
        chosen = (torch.rand(size, generator=random) < 0.3).float()
        weights = {
            "random": chosen,
            "weighted": chosen / max(1.0, float(chosen[1:].sum())),
            "single token": torch.arange(size).eq(70).float() if number == 6 else torch.zeros(size),
            "none": torch.zeros(size),
        }[mask]
        yield tokens, weights


def _gradients(root: Path, layouts: dict[str, list[str]], packings: tuple[str, ...]) -> dict[tuple[str, str, str], Any]:
    """Per layout, packing and mask: the loss and the gradient of every parameter, by name."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from moba_train.data.loader import Loader
    from moba_train.model.freeze import parameter_names
    from moba_train.train.setup import setup
    from moba_train.train.step import train_step

    fixed = [
        f"train.sequence_length={S}",
        f"train.global_batch_size={BATCH}",
        "optim.clip_grad=0",
        "parallel.distributed_optimizer=false",
    ]
    found = {}
    for layout, overrides in layouts.items():
        run = setup(small_config(root / "data", root / f"gradients-{layout}", *_start(root), *fixed, *overrides))
        named = [pair for chunk in run.chunks for pair in parameter_names(unwrap_model(chunk))]
        initial = [parameter.detach().clone() for _, parameter in named]
        place = {"dp_rank": run.groups.data.rank, "dp_size": run.groups.data.size}
        for packing in packings:
            for mask in MASKS:
                run.loader = Loader(_Packed(mask, packing), global_batch_size=BATCH, **place)
                result = train_step(run, stop_requested=False)
                found[layout, packing, mask] = (result.loss, {name: p.main_grad.clone() for name, p in named})
                with torch.no_grad():
                    for (_, parameter), value in zip(named, initial, strict=True):
                        parameter.copy_(value)
        parallel_state.destroy_model_parallel()
    return found


def _frozen(root: Path, world_size: int, layouts: dict[str, list[str]]) -> dict[str, Any]:
    """Per layout: the losses of three steps, the names that changed, and the losses of a run stopped after two."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from moba_train.model.freeze import parameter_names
    from moba_train.train import checkpoint
    from moba_train.train.setup import preflight, setup
    from moba_train.train.step import train_step

    def steps(folder: str, count: int, *options: str, save: bool = False) -> tuple[list[float], dict[str, bool]]:
        config = small_config(root / "data", root / folder, *_start(root), *options)
        preflight(config)
        try:
            run = setup(config)
            named = dict(pair for chunk in run.chunks for pair in parameter_names(unwrap_model(chunk)))
            before = {name: parameter.detach().clone() for name, parameter in named.items()}
            curve = [train_step(run, stop_requested=False).loss for _ in range(count)]
            if save:
                checkpoint.save(run)
            return curve, {name: not torch.equal(named[name], value) for name, value in before.items()}
        finally:
            parallel_state.destroy_model_parallel()

    found: dict[str, Any] = {}
    for layout, overrides in layouts.items():
        options = [FREEZE, *overrides]
        straight, changed = steps(f"frozen-{world_size}-{layout}", 3, *options)
        found[layout] = (straight, changed)
        if layout in FROZEN_RESUMED and world_size == 2:
            folder = f"stopped-{world_size}-{layout}"
            halves = steps(folder, 2, *options, save=True)[0] + steps(folder, 1, *options)[0]
            found[layout] = (straight, changed, halves)
    if world_size == 2:
        try:
            steps("stopped-2-data", 0, "train.freeze=[]")
        except ConfigError as error:
            found["error"] = str(error)
    return found


def _write_rows(file: Path) -> None:
    """Questions of one or two turns, of different lengths, some longer than the context."""
    rows = []
    for i in range(40):
        turns = [("user", f"def f{i}(x): return x + {i}\n" * (1 + i % 12)), ("assistant", f"x + {i}")]
        turns += [("user", "and again?"), ("assistant", f"f{i}")] * (i % 2)
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows_config(root: Path, run: str, *overrides: str, load: bool = True) -> RunConfig:
    rows = [f"sft.path={root / 'rows.jsonl'}", f"sft.tokenizer={root / 'data' / 'tokenizer'}", "sft.overlong=truncate"]
    start = _start(root) if load else []
    return compose([*SMALL, "data.path=null", *rows, f"run.dir={root / f'rows-{run}'}", *start, *overrides])


def _rows_alone(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"straight": losses(_rows_config(root, "straight"), 4)}
    found["halves"] = losses(_rows_config(root, "halves"), 2, save=True) + losses(_rows_config(root, "halves"), 2)
    found["other seed"] = losses(_rows_config(root, "scratch", "train.seed=7", load=False), 1)
    for name in ("sample", "document"):
        found[name] = losses(_rows_config(root, name, f"sft.loss_weighting={name}"), 1)
    found["refused"] = {}
    for name, overrides in {
        "packing": ["sft.packing=none"],
        "last turn": ["sft.last_turn_only=true"],
        "pretraining": ["checkpoint.load_weights_only=false", "run.dir=null"],
    }.items():
        try:
            losses(_rows_config(root, "halves", *overrides), 0)
        except ConfigError as error:
            found["refused"][name] = str(error)
    return found


def _assert_same(measured: tuple, expected: tuple) -> None:
    loss, gradients = measured
    expected_loss, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, rel=INDEPENDENCE_RTOL)
    assert gradients.keys() == expected_gradients.keys()
    error, size = (
        torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()
        for tensors in (
            [gradients[name].double() - expected_gradients[name].double() for name in gradients],
            list(expected_gradients.values()),
        )
    )
    assert error <= INDEPENDENCE_RTOL * size, float(error / size)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("packing", PACKINGS[1:])
def test_packing_changes_no_gradient(found: dict, packing: str, mask: str) -> None:
    gradients = found["alone"]["gradients"]
    _assert_same(gradients["alone", packing, mask], gradients["alone", "none", mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_gradient(found: dict, layout: str, mask: str) -> None:
    for rank in found["pair"]:
        _assert_same(rank["gradients"][layout, "sequential", mask], found["alone"]["gradients"]["alone", "none", mask])


def test_a_batch_without_loss_has_loss_and_gradient_zero(found: dict) -> None:
    for measured in (found["alone"], *found["pair"]):
        for loss, gradients in (value for key, value in measured["gradients"].items() if key[2] == "none"):
            assert loss == 0.0
            assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_every_other_mask_reaches_every_parameter(found: dict) -> None:
    gradients = found["alone"]["gradients"]
    for mask in ("random", "weighted", "single token"):
        loss, by_name = gradients["alone", "none", mask]
        assert loss > 1.0
        assert all(gradient.isfinite().all() and gradient.any() for gradient in by_name.values()), mask
    random, weighted = (gradients["alone", "none", mask][0] for mask in ("random", "weighted"))
    assert abs(random - weighted) > 1e-4


@pytest.mark.parametrize("layout", [*FROZEN_ALONE, *FROZEN_PAIRS])
def test_what_is_frozen_stays_and_the_rest_trains(found: dict, layout: str) -> None:
    ranks = [found["alone"]] if layout in FROZEN_ALONE else found["pair"]
    changed = {name: value for rank in ranks for name, value in rank["frozen"][layout][1].items()}
    assert len(changed) == 2 + 4 * 6  # embedding, last norm; of each layer two norms and four matrices
    for name, value in changed.items():
        frozen = name.startswith(("embedding.", "decoder.layers.0.", "decoder.layers.3.")) or "input_layernorm" in name
        assert value != frozen, name


@pytest.mark.parametrize("layout", [*list(FROZEN_ALONE)[1:], *FROZEN_PAIRS])
def test_with_frozen_parameters_every_layout_learns_the_same(found: dict, layout: str) -> None:
    for rank in [found["alone"]] if layout in FROZEN_ALONE else found["pair"]:
        assert rank["frozen"][layout][0] == pytest.approx(found["alone"]["frozen"]["alone"][0], rel=LOSS_RTOL)


@pytest.mark.parametrize("layout", FROZEN_RESUMED)
def test_with_frozen_parameters_a_stopped_run_resumes_bit_by_bit(found: dict, layout: str) -> None:
    for rank in found["pair"]:
        straight, _, halves = rank["frozen"][layout]
        assert halves == straight


def test_what_is_frozen_may_not_change_on_resume(found: dict) -> None:
    for rank in found["pair"]:
        assert rank["frozen"]["error"].startswith("train.freeze=")


def test_chat_rows_resume_bit_by_bit(found: dict) -> None:
    rows = found["alone"]["rows"]
    assert rows["halves"] == rows["straight"]


@pytest.mark.parametrize("layout", ROWS_PAIRS)
def test_every_layout_learns_the_same_from_chat_rows(found: dict, layout: str) -> None:
    expected = [loss for loss, _ in found["alone"]["rows"]["straight"]]
    for rank in found["pair"]:
        assert [loss for loss, _ in rank["rows"][layout]] == pytest.approx(expected, rel=LOSS_RTOL)


def test_it_starts_from_the_checkpoint_and_rows_are_weighed(found: dict) -> None:
    rows = found["alone"]["rows"]
    assert len({rows[name][0][0] for name in ("straight", "other seed", "sample")}) == 3
    assert rows["document"][0] == rows["sample"][0]  # every row is its own source


def test_what_the_order_of_rows_depends_on_may_not_change(found: dict) -> None:
    refused = found["alone"]["rows"]["refused"]
    assert refused["packing"].startswith("sft.packing='none'")
    assert refused["last turn"].startswith("sft.last_turn_only=True")
    assert "was trained on plain text" in refused["pretraining"]
