"""Loss tokens may be anywhere: none on a rank, none at all, a single one; gradients do not depend on the layout."""

import dataclasses

import pytest
import torch

from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import GRAD_NORM_RTOL, LOSS_RTOL
from tests.helpers.training import corpus, small_config

MASKS = ("one token", "none", "first half of each row", "one row")
LAYOUTS = {"pipeline": ["parallel.pipeline=2"]}  # data and context ranks: test_finetuning.py


class _Masked:
    """Rows whose loss mask is cut down to what `mask` names; sample numbers decide which row."""

    def __init__(self, rows, mask):
        self.rows, self.mask = rows, mask

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        keep = torch.zeros_like(row.loss_mask)
        if (self.mask == "one token" and index % 4 == 3) or (self.mask == "one row" and index % 4 == 0):
            keep[row.loss_mask.nonzero()[-1] if self.mask == "one token" else slice(None)] = 1
        elif self.mask == "first half of each row":
            keep[: len(keep) // 2] = 1
        return dataclasses.replace(row, loss_mask=row.loss_mask * keep)


def _two_steps(rank, world_size, data, root, layouts):
    """Per layout and mask: (loss, gradient norm) of two steps from the same weights."""
    from megatron.core import parallel_state

    from moba_train.data.loader import Loader
    from moba_train.train import checkpoint
    from moba_train.train.setup import setup
    from moba_train.train.step import train_step

    if world_size == 1:
        run = setup(small_config(data, root / "initial"))
        checkpoint.save(run)
        parallel_state.destroy_model_parallel()
    start = [f"checkpoint.load={root / 'initial'}", "checkpoint.load_weights_only=true"]
    found = {}
    for layout, overrides in layouts.items():
        for mask in MASKS:
            run = setup(small_config(data, root / f"{world_size}-{layout}-{mask}", *start, *overrides))
            masked = _Masked(run.data.train, mask)
            run.loader = Loader(masked, global_batch_size=4, dp_rank=run.groups.data.rank, dp_size=run.groups.data.size)
            results = [train_step(run, stop_requested=False) for _ in range(2)]
            found[layout, mask] = [(result.loss, result.grad_norm) for result in results]
            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    data = corpus(root / "data")
    (alone,) = run_distributed(_two_steps, 1, data, root, {"alone": []})
    return alone | run_distributed(_two_steps, 2, data, root, LAYOUTS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_two_ranks_learn_what_one_learns(found, layout, mask):
    for (loss, norm), (expected_loss, expected_norm) in zip(found[layout, mask], found["alone", mask], strict=True):
        assert loss == pytest.approx(expected_loss, rel=LOSS_RTOL)
        assert norm == pytest.approx(expected_norm, rel=GRAD_NORM_RTOL)


def test_a_batch_without_loss_tokens_has_loss_and_gradient_zero(found):
    assert found["alone", "none"] == [(0.0, 0.0), (0.0, 0.0)]


def test_a_single_token_has_a_gradient_of_its_own_size(found):
    loss, norm = found["alone", "one token"][0]
    assert 3.0 < loss < 12.0
    assert norm > 0.1
