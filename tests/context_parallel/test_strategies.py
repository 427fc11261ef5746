"""Every strategy against the single-device op, on gloo ranks: picks equal, outputs and gradients to rounding.

One set of processes runs every case and returns errors; the tests read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, moba_attention, select_blocks
from moba_train.context_parallel.layout import balanced, contiguous, zigzag
from moba_train.context_parallel.wrap import wrap
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import TOLERANCE

HEAD_DIM = 8
OPS = {"full": full_attention, "moba": moba_attention}
PREVIOUS, SHARED = {"force_previous_block": True}, {"share_picks_in_group": True}
FIRST = {"force_first_block": True}
# lengths of the documents; heads: "gqa", "mha" or "mqa"; block size; top_k; options of the gate
CASES = {
    "one_document": ([61], "gqa", 8, 3),
    "packed": ([5, 0, 1, 17, 1, 1, 9, 0, 30], "gqa", 4, 2),
    "shorter_than_a_block": ([3] * 20, "gqa", 8, 3),
    "single_tokens": ([1] * 23, "gqa", 4, 2),
    "mostly_padding": ([2, 40], "gqa", 4, 2),
    "one_block": ([40], "gqa", 64, 1),
    "local_only": ([50], "gqa", 7, 1),
    "blocks_of_one": ([29], "gqa", 1, 5),
    "every_block": ([33, 12], "gqa", 8, 16),
    "one_key_head": ([37, 8], "mqa", 8, 3),
    "as_many_key_heads": ([37, 8], "mha", 8, 3),
    "nothing": ([], "gqa", 4, 2),
    "first_forced": ([5, 0, 1, 17, 1, 1, 9, 0, 30], "gqa", 4, 3, FIRST),
    "previous_forced": ([5, 0, 1, 17, 1, 1, 9, 0, 30], "gqa", 4, 3, PREVIOUS),
    "picks_shared": ([37, 8], "gqa", 4, 3, SHARED),
    "picks_shared_by_all_heads": ([37, 8], "mqa", 4, 3, SHARED | PREVIOUS),
}
SETTINGS: dict[str, dict] = {
    "all_gather": {"strategy": "all_gather"},
    "all_gather-streamed": {"strategy": "all_gather", "gather_heads": 2, "layout": balanced},
    "all_gather-contiguous": {"strategy": "all_gather", "layout": contiguous, "gather_heads": 3, "overlap": False},
    "all_to_all": {"strategy": "all_to_all", "layout": balanced},
    "all_to_all-contiguous": {"strategy": "all_to_all", "layout": contiguous, "overlap": False},
    "ring": {"strategy": "ring"},
    "ring-balanced": {"strategy": "ring", "layout": balanced},
    "ring-contiguous": {"strategy": "ring", "layout": contiguous, "overlap": False},
}
HIERARCHICAL: dict[str, dict] = {
    "all_to_all+ring": {"strategy": "ring", "inner": 2, "layout": balanced},
    "all_to_all+all_gather": {"strategy": "all_gather", "inner": 2, "gather_heads": 1},
    "all_to_all+contiguous": {"strategy": "all_gather", "inner": 2, "layout": contiguous},
    "all_to_all-inside-only": {"strategy": "ring", "inner": 4},
}
# Two ranks run every case; more ranks those where a shard, a document or a block changes hands in a new way.
CASES_BY_SIZE = {
    2: tuple(CASES),
    3: ("packed", "mostly_padding"),
    4: ("packed", "single_tokens", "one_key_head", "picks_shared_by_all_heads"),
    8: ("packed",),
}
SETTINGS_BY_SIZE = {
    2: SETTINGS,
    3: SETTINGS,
    4: SETTINGS | HIERARCHICAL,
    8: {name: (SETTINGS | HIERARCHICAL)[name] for name in ("all_gather", "ring", "all_to_all", "all_to_all+ring")},
}
# Starting a process costs more than all its cases: groups of every size among the same eight, side by side.
TEAMS = (((0, 1), ("full",)), ((2, 3), ("moba",)), ((4, 5, 6), OPS), ((4, 5, 6, 7), OPS), (tuple(range(8)), OPS))
# Rounding is no matter of cases: fp64 shows what is computed, one case in fp32 that nothing is lost on the way.
FP32_CASE = "packed"


@dataclass(frozen=True)
class Problem:
    """Global tensors of one case and the single-device answer; the same on every rank."""

    seq: SequenceInfo
    inputs: list[Tensor]  # q, k, v
    grad_outputs: list[Tensor]  # of out and lse
    options: dict
    results: list[Tensor]  # out, lse and the gradients of q, k, v
    picks: Tensor | None


def build(case: str, op_name: str, dtype: torch.dtype, num_ranks: int) -> Problem:
    lengths, kind, block_size, top_k, *gate = CASES[case]
    num_heads = 4 * num_ranks
    num_key_heads = {"gqa": 2 * num_ranks, "mha": num_heads, "mqa": 1}[kind]
    padding = -sum(lengths) % (2 * num_ranks)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)] + [sum(lengths) + padding]
    seq = SequenceInfo(bounds)
    generator = torch.Generator().manual_seed(len(case))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = seq.num_keys
    inputs = [random(rows, heads, HEAD_DIM) for heads in (num_heads, num_key_heads, num_key_heads)]
    wide = torch.promote_types(dtype, torch.float32)
    grad_outputs = [random(rows, num_heads, HEAD_DIM), random(rows, num_heads).to(wide)]
    options: dict = {}
    picks = None
    if op_name == "moba":
        options |= {"block_size": block_size, "top_k": top_k, **(gate[0] if gate else {})}
        picks = select_blocks(inputs[0], inputs[1], seq, **options)
    routed = options if picks is None else options | {"picks": picks}
    results = differentiate(OPS[op_name], inputs, seq, grad_outputs, routed)
    return Problem(seq, inputs, grad_outputs, options, results, picks)


def differentiate(
    op, inputs: list[Tensor], seq: SequenceInfo, grad_outputs: list[Tensor], options: dict
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = op(*leaves, seq, **options)
    grads = [torch.zeros_like(x) for x in leaves]
    pairs = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]  # not of no rows
    if pairs:
        used, weights = zip(*pairs, strict=True)
        grads = torch.autograd.grad(used, leaves, weights, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outputs, *grads)]


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


class Team:
    """Ranks that run cases together. Every process must make every team: groups are made by all."""

    def __init__(self, members: tuple[int, ...]):
        self.members, self.size = members, len(members)
        self._groups = {None: {"group": dist.new_group(list(members))}}
        for inner in {x.get("inner") for x in SETTINGS_BY_SIZE[self.size].values()} - {None}:
            inside = [dist.new_group(list(members[i : i + inner])) for i in range(0, self.size, inner)]
            across = [dist.new_group(list(members[i::inner])) for i in range(inner)]
            if dist.get_rank() in members:
                place = members.index(dist.get_rank())
                self._groups[inner] = {"inner_group": inside[place // inner], "group": across[place % inner]}

    def groups(self, inner: int | None) -> dict[str, dist.ProcessGroup]:
        """What `wrap` takes: all ranks, or neighbours and those that hold the same place among theirs."""
        return self._groups[inner]


def run_case(problem: Problem, op_name: str, settings: dict, team: Team) -> dict[str, float]:
    rank, num_ranks = team.members.index(dist.get_rank()), team.size
    settings = dict(settings)
    inner = settings.pop("inner", None)
    layout = settings.get("layout", zigzag)(problem.seq.num_keys, num_ranks, problem.seq.cu_seqlens.tolist())
    positions = torch.tensor(layout.positions(rank), dtype=torch.int64)
    seen: list[Tensor] = []

    def op(q, k, v, seq, **options):
        if op_name == "moba":
            routing = {name: options[name] for name in problem.options}
            if options.get("picks") is None:
                options["picks"] = select_blocks(q, k, seq, **routing)
            seen.append(options["picks"])
        return OPS[op_name](q, k, v, seq, **options)

    wrapped = wrap(op, **team.groups(inner), **settings)
    seq_local = SequenceInfo(problem.seq.cu_seqlens, q_positions=positions)
    local = [x[positions] for x in problem.inputs]
    got = differentiate(wrapped, local, seq_local, [x[positions] for x in problem.grad_outputs], problem.options)
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    errors = {n: error(x, y[positions]) for n, x, y in zip(names, got, problem.results, strict=True)}
    if op_name == "moba":
        swapped = num_ranks if settings["strategy"] == "all_to_all" else inner or 1  # ranks that swap rows for heads
        rows = layout.across(swapped).positions(rank // swapped)
        expected = problem.picks[rows].unflatten(1, (swapped, -1))[:, rank % swapped]
        calls = num_ranks // swapped if settings["strategy"] == "ring" else 1  # per slice of heads, with the same picks
        made = torch.cat(seen[::calls], 1)[:, : expected.shape[1]]
        errors["picks"] = float(not torch.equal(made, expected))
    return errors


def run_cases(rank: int, world_size: int) -> dict[tuple, dict[str, float]]:
    results = {}
    teams = [(Team(members), ops) for members, ops in TEAMS]
    for team, ops in teams:
        if rank not in team.members:
            continue
        for op_name, case in product(ops, CASES_BY_SIZE[team.size]):
            for dtype in dtypes(case):
                problem = build(case, op_name, dtype, team.size)
                for name, settings in SETTINGS_BY_SIZE[team.size].items():
                    results[team.size, case, name, op_name, dtype] = run_case(problem, op_name, settings, team)
    return results


@pytest.fixture(scope="module")
def errors_of_all_ranks() -> list[dict]:
    return run_distributed(run_cases, 8, timeout=280)


def dtypes(case: str) -> list[torch.dtype]:
    return [torch.float64, torch.float32] if case == FP32_CASE else [torch.float64]


CHECKS = [
    (size, case, setting, op_name)
    for size, cases in CASES_BY_SIZE.items()
    for case, setting, op_name in product(cases, SETTINGS_BY_SIZE[size], OPS)
]


@pytest.mark.parametrize("size, case, setting, op_name", CHECKS)
def test_equals_the_single_device_op(errors_of_all_ranks, size, case, setting, op_name):
    for dtype in dtypes(case):
        key = (size, case, setting, op_name, dtype)
        found = {rank: errors[key] for rank, errors in enumerate(errors_of_all_ranks) if key in errors}
        assert len(found) == size
        for rank, errors in found.items():
            for what, error_found in errors.items():
                limit = 0.0 if what == "picks" else TOLERANCE[dtype]
                assert error_found <= limit, f"{what} of process {rank} in {dtype} is off by {error_found}"
