"""Every strategy against the single-device op, on gloo ranks: picks equal, outputs and gradients to rounding.

One set of processes runs every case and returns errors; the tests read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, moba_attention, select_blocks
from moba_train.context_parallel.layout import balanced, contiguous, zigzag
from moba_train.context_parallel.wrap import STRATEGIES, wrap
from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.spawn import run_distributed
from tests.helpers.tolerance import TOLERANCE

OPS = {"full": full_attention, "moba": moba_attention}
# A strategy shares all rows: queries that are some of them are its own business.
CASES = {
    case.name: case
    for case in (
        *(case for case in cases.CASES if case.q_positions is None),
        Case("mostly-padding", (0, 2, 42), block_size=4, top_k=2),
        Case("one-block", (0, 40), block_size=64, top_k=1),
        Case("picks-shared-by-all-heads", (0, 37, 45), key_heads=1, block_size=4, force_previous_block=True,
             share_picks_in_group=True),
    )
}  # fmt: skip
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
VARIANTS = [[name for name in SETTINGS if SETTINGS[name]["strategy"] == strategy] for strategy in STRATEGIES]
HIERARCHICAL: dict[str, dict] = {
    "all_to_all+ring": {"strategy": "ring", "inner": 2, "layout": balanced},
    "all_to_all+all_gather": {"strategy": "all_gather", "inner": 2, "gather_heads": 1},
    "all_to_all+contiguous": {"strategy": "all_gather", "inner": 2, "layout": contiguous, "overlap": False},
    "all_to_all-inside-only": {"strategy": "ring", "inner": 4},
}
# Where a shard, a document, a block or a head changes hands in a new way: under every setting.
THOROUGH = {
    2: ("packed", "single-tokens", "mqa"),
    3: ("packed", "mostly-padding"),
    4: ("packed", "single-tokens", "picks-shared-by-all-heads"),
    8: ("packed",),
}
THOROUGH_SETTINGS = {
    2: list(SETTINGS),
    3: list(SETTINGS),
    4: list(SETTINGS | HIERARCHICAL),
    8: ["all_gather", "ring", "all_to_all", "all_to_all+ring"],
}


def plan(size: int, op_name: str) -> dict[str, list[str]]:
    """Settings of each case: two ranks run all cases under each strategy, three, four and eight share them.

    Which variant of a strategy it is (layout, slices, overlap) goes round. The gate is no matter of full attention.
    """
    planned = {}
    gated = ("force_first_block", "force_previous_block", "share_picks_in_group")
    for i, (name, case) in enumerate(CASES.items()):
        if op_name == "full" and any(case.routing[option] for option in gated):
            continue
        if name in THOROUGH[size]:
            planned[name] = THOROUGH_SETTINGS[size]
        elif size in (2, (3, 4, 3, 4, 8)[i % 5]):
            planned[name] = [names[i % len(names)] for names in VARIANTS]
    return planned


# Starting a process costs more than all its cases: groups of every size among the same eight, side by side.
TEAMS = (((0, 1), ("full",)), ((2, 3), ("moba",)), ((4, 5, 6), OPS), ((4, 5, 6, 7), OPS), (tuple(range(8)), OPS))
# Rounding is no matter of cases: fp64 shows what is computed, one case in fp32 that nothing is lost on the way.
FP32_CASE = "packed"


@dataclass(frozen=True)
class Problem:
    """Global tensors of one case and the single-device answer; the same on every rank."""

    case: Case
    seq: SequenceInfo
    inputs: list[Tensor]  # q, k, v
    grad_outputs: list[Tensor]  # of out and lse
    options: dict
    results: list[Tensor]  # out, lse and the gradients of q, k, v
    picks: Tensor | None


def build(name: str, op_name: str, dtype: torch.dtype, num_ranks: int) -> Problem:
    case = CASES[name]
    padding = -case.cu_seqlens[-1] % (2 * num_ranks)
    heads = {"heads": num_ranks * case.heads, "key_heads": num_ranks * case.key_heads if case.key_heads > 1 else 1}
    case = replace(case, cu_seqlens=(*case.cu_seqlens, case.cu_seqlens[-1] + padding), **heads)
    seq, (*inputs, grad_out, grad_lse) = case.sequence(), case.inputs(dtype)
    options: dict = {}
    picks = None
    if op_name == "moba":
        options |= case.routing
        picks = select_blocks(inputs[0], inputs[1], seq, **options)
    routed = options if picks is None else options | {"picks": picks}
    results = differentiate(OPS[op_name], inputs, seq, [grad_out, grad_lse], routed)
    return Problem(case, seq, inputs, [grad_out, grad_lse], options, results, picks)


def differentiate(
    op, inputs: list[Tensor], seq: SequenceInfo, grad_outputs: list[Tensor], options: dict
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
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
        for inner in {(SETTINGS | HIERARCHICAL)[name].get("inner") for name in THOROUGH_SETTINGS[self.size]} - {None}:
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
    key_heads = set()

    def op(q, k, v, seq, **options):
        key_heads.add(k.shape[1])
        if op_name == "moba":
            routing = {name: options[name] for name in problem.options}
            if options.get("picks") is None:
                options["picks"] = select_blocks(q, k, seq, **routing)
            seen.append(options["picks"])
        return OPS[op_name](q, k, v, seq, **options)

    wrapped = wrap(op, **team.groups(inner), **settings)
    seq_local = SequenceInfo(problem.seq.cu_seqlens, q_positions=positions)
    local = [x.detach()[positions] for x in problem.inputs]
    if problem.case.strided:
        local = [x.repeat_interleave(2, -1)[..., ::2] for x in local]
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
    if inner is not None and settings["strategy"] == "all_gather":
        errors["key heads"] = float(key_heads != {1})  # with overlap or without: memory is bounded by it
    return errors


def run_cases(rank: int, world_size: int) -> dict[tuple, dict[str, float]]:
    results = {}
    teams = [(Team(members), ops) for members, ops in TEAMS]
    for team, ops in teams:
        if rank not in team.members:
            continue
        planned = [(op_name, *item) for op_name in ops for item in plan(team.size, op_name).items()]
        for op_name, case, names in planned:
            for dtype in dtypes(case):
                problem = build(case, op_name, dtype, team.size)
                for name in names:
                    settings = (SETTINGS | HIERARCHICAL)[name]
                    results[team.size, case, name, op_name, dtype] = run_case(problem, op_name, settings, team)
    return results


@pytest.fixture(scope="module")
def errors_of_all_ranks() -> list[dict]:
    return run_distributed(run_cases, 8, timeout=280)


def dtypes(case: str) -> list[torch.dtype]:
    return [torch.float64, torch.float32] if case == FP32_CASE else [torch.float64]


CHECKS = [
    (size, case, setting, op_name)
    for size, op_name in product(THOROUGH, OPS)
    for case, settings in plan(size, op_name).items()
    for setting in settings
]


@pytest.mark.parametrize("size, case, setting, op_name", CHECKS)
def test_equals_the_single_device_op(errors_of_all_ranks, size, case, setting, op_name):
    for dtype in dtypes(case):
        key = (size, case, setting, op_name, dtype)
        found = {rank: errors[key] for rank, errors in enumerate(errors_of_all_ranks) if key in errors}
        assert len(found) == size
        for rank, errors in found.items():
            for what, error_found in errors.items():
                limit = 0.0 if what in ("picks", "key heads") else TOLERANCE[dtype]
                assert error_found <= limit, f"{what} of process {rank} in {dtype} is off by {error_found}"
