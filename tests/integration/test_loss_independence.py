"""Loss and gradients do not depend on packing, on how a batch is split, or on data and context parallelism.

Eight documents with one of several loss masks are one global batch, whatever rows they are packed into.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train.data.bins import pack
from moba_train.data.packing import pack_documents
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import INDEPENDENCE_RTOL
from tests.helpers.training import corpus, small_config

S, BATCH = 128, 8  # BATCH rows a step: documents that need fewer are followed by empty rows
MASKS = ("random", "weighted", "single token", "none")
PACKINGS = ("none", "sequential", "first_fit_decreasing", "reversed")
LAYOUTS = {
    "data": [],
    "gather": ["parallel.context=2"],
    "ring": ["parallel.context=2", "parallel.context_strategy=ring"],
}


class _Packed:
    """BATCH rows that hold the documents, packed in one way."""

    def __init__(self, mask: str, packing: str) -> None:
        documents = list(_documents(mask))
        sizes = [len(tokens) - 1 for tokens, _ in documents]
        if packing == "reversed":
            bins = pack(sizes[::-1], S, "sequential")
            documents.reverse()
        else:
            bins = pack(sizes, S, packing)
        self.rows = [[documents[item] for item in items] for items in bins]

    def __len__(self) -> int:
        return BATCH

    def __getitem__(self, index: int) -> Any:
        return pack_documents(self.rows[index] if index < len(self.rows) else [], S)


def _documents(mask: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)
    for number, size in enumerate((129, 40, 81, 17, 2, 60, 100, 33)):
        tokens = torch.randint(0, 384, (size,), generator=random)
        chosen = (torch.rand(size, generator=random) < 0.3).float()
        weights = {
            "random": chosen,
            "weighted": chosen / max(1.0, float(chosen[1:].sum())),
            "single token": torch.arange(size).eq(70).float() if number == 6 else torch.zeros(size),
            "none": torch.zeros(size),
        }[mask]
        yield tokens, weights


def _measure(
    rank: int, world_size: int, data: Path, root: Path, layouts: dict[str, list[str]], packings: list[str]
) -> dict[tuple[str, str, str], tuple[float, dict[str, torch.Tensor]]]:
    """Per layout, packing and mask: the loss and the gradient of every parameter, by name."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from moba_train.data.loader import Loader
    from moba_train.model.freeze import parameter_names
    from moba_train.train import checkpoint
    from moba_train.train.setup import setup
    from moba_train.train.step import train_step

    fixed = [f"train.global_batch_size={BATCH}", "optim.clip_grad=0", "parallel.distributed_optimizer=false"]
    if world_size == 1:
        run = setup(small_config(data, root / "initial", *fixed))
        checkpoint.save(run)
        parallel_state.destroy_model_parallel()
    fixed += [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]
    found = {}
    for layout, overrides in layouts.items():
        run = setup(small_config(data, root / f"{world_size}-{layout}", *fixed, *overrides))
        named = [pair for chunk in run.chunks for pair in parameter_names(unwrap_model(chunk))]
        initial = [parameter.detach().clone() for _, parameter in named]
        for packing in packings:
            for mask in MASKS:
                run.loader = Loader(
                    _Packed(mask, packing),
                    global_batch_size=BATCH,
                    dp_rank=run.groups.data.rank,
                    dp_size=run.groups.data.size,
                )
                result = train_step(run, stop_requested=False)
                gradients = {name: parameter.main_grad.clone() for name, parameter in named}
                found[layout, packing, mask] = (result.loss, gradients)
                with torch.no_grad():
                    for (_, parameter), value in zip(named, initial, strict=True):
                        parameter.copy_(value)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The measurements of one process and of the first of two."""
    root = tmp_path_factory.mktemp("independence")
    data = corpus(root / "data")
    (alone,) = run_distributed(_measure, 1, data, root, {"alone": []}, list(PACKINGS))
    return alone | run_distributed(_measure, 2, data, root, LAYOUTS, ["sequential"])[0]


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
def test_packing_changes_nothing(found: dict, packing: str, mask: str) -> None:
    _assert_same(found["alone", packing, mask], found["alone", "none", mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_nothing(found: dict, layout: str, mask: str) -> None:
    _assert_same(found[layout, "sequential", mask], found["alone", "none", mask])


@pytest.mark.parametrize("key", [("alone", packing) for packing in PACKINGS] + [(x, "sequential") for x in LAYOUTS])
def test_a_batch_without_loss_has_loss_and_gradient_zero(found: dict, key: tuple[str, str]) -> None:
    loss, gradients = found[*key, "none"]
    assert loss == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_every_other_mask_reaches_every_parameter(found: dict) -> None:
    for mask in ("random", "weighted", "single token"):
        loss, gradients = found["alone", "none", mask]
        assert loss > 1.0
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values()), mask


def test_weights_matter(found: dict) -> None:
    assert found["alone", "none", "random"][0] != pytest.approx(found["alone", "none", "weighted"][0], rel=1e-4)
