"""Memory of the CPU paths: linear in the picked pairs, no tensor over all queries and all keys or blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moba_train.attention import SequenceInfo, full_attention, gate, moba_attention, portable
from tests.helpers.cases import zigzag_positions
from tests.helpers.tolerance import assert_close

HEADS, KEY_HEADS, HEAD_DIM, BLOCK, TOP_K = 4, 2, 8, 4, 3


class LargestStorage(TorchDispatchMode):
    """Remembers the most elements in one storage that any operator returned (an expanded view costs nothing)."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


def largest(op: Callable[..., tuple[torch.Tensor, torch.Tensor]], seq: SequenceInfo) -> int:
    shapes = ((seq.num_queries, HEADS), (seq.num_keys, KEY_HEADS), (seq.num_keys, KEY_HEADS))
    tensors = [torch.randn(*shape, HEAD_DIM, requires_grad=True) for shape in shapes]
    with LargestStorage() as mode:
        out, lse = op(*tensors, seq)
        torch.autograd.grad((out, lse), tensors, (torch.randn_like(out), torch.randn_like(lse)))
    return mode.elements


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small against these shapes as the real ones are against long contexts."""
    monkeypatch.setitem(gate._CHUNK_ELEMENTS, "cpu", 2**15)
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 2**12)


def test_moba_is_linear_in_the_pairs() -> None:
    moba = partial(moba_attention, block_size=BLOCK, top_k=TOP_K, backend="portable")
    sizes = [largest(moba, SequenceInfo([0, tokens])) for tokens in (512, 1024)]
    for tokens, size in zip((512, 1024), sizes, strict=True):
        partials = tokens * HEADS * TOP_K * HEAD_DIM
        padding = 2 * KEY_HEADS * (tokens // BLOCK) * portable._TILES[0] * HEAD_DIM
        assert size <= partials + padding
        assert size < tokens * HEADS * (tokens // BLOCK) // 2, "as large as [N, H, T]"
    assert sizes[1] <= 2.1 * sizes[0]


def test_slices_bound_the_partials(monkeypatch: pytest.MonkeyPatch) -> None:
    moba = partial(moba_attention, block_size=BLOCK, top_k=16, backend="portable")
    whole = largest(moba, SequenceInfo([0, 512]))
    monkeypatch.setitem(portable._SLICE_ELEMENTS, "cpu", 2**15)
    assert largest(moba, SequenceInfo([0, 512])) < whole / 4


@pytest.mark.parametrize("rank", [0, 1])
def test_full_attention_of_a_shard_makes_no_mask(rank: int) -> None:
    tokens = 1024
    seq = SequenceInfo([0, 700, tokens], zigzag_positions(tokens, rank, 2))
    assert largest(full_attention, seq) <= 2 * tokens * HEADS * HEAD_DIM < tokens * tokens // 8


def test_slices_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    seq = SequenceInfo([0, 300, 512])
    tensors = [torch.randn(512, heads, HEAD_DIM, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]

    def run() -> list[torch.Tensor]:
        out, lse = moba_attention(*tensors, seq, block_size=BLOCK, top_k=TOP_K, backend="portable")
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), tensors)]

    expected = run()
    monkeypatch.setitem(portable._SLICE_ELEMENTS, "cpu", 2**12)
    monkeypatch.setitem(portable._CHUNK_ELEMENTS, "cpu", 2**8)
    for got, want in zip(run(), expected, strict=True):
        assert_close(got, want, torch.float64)


def test_uninitialised_memory_is_poisoned() -> None:
    """tests/conftest.py: what attention forgets to write is NaN, or an index out of every range."""
    module = {"__name__": "moba_train.attention.example", "torch": torch}
    exec("a = torch.empty(3); b = a.new_empty(2, dtype=torch.int64); c = torch.empty_like(a)", module)
    assert module["a"].isnan().all()
    assert module["c"].isnan().all()
    assert (module["b"] == torch.iinfo(torch.int64).max).all()
