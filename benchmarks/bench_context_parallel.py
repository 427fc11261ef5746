"""Context parallelism: time against the ideal, peak memory against its formula, balance of layouts, cost on one GPU.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_context_parallel.py plumbing memory balance scaling

scaling: forward and backward of one attention layer under every strategy, with and without overlap. What does not give
one device's results, at the shortest length, is not timed. The ideal is the time of the same rows on one device over
the number of devices, for weak scaling (rows a device held) as for strong (rows in all held): full attention's work
grows with the square of the rows, so time at constant rows a device says nothing by itself. memory: what communication
adds to an op that itself needs nothing but its results. balance: the busiest rank's attention time over the mean, by
layout; one device plays every rank in turn. plumbing: the op wrapped for a group of one rank over the bare op.
Writes context_parallel_<device>_<date>.md, .csv and .png after every measurement; what no longer fits the budget is
left out and said. Runs on CPUs too (gloo, `--quick`), to show that it works, not how fast.

Letters as in moba_train/context_parallel: t rows of a rank, S rows of all, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from context_parallel_check import LIMITS, error_of, results
from context_parallel_memory import peak_of, stand_in
from context_parallel_report import HEADER, Row, line, series, write
from packed import log_normal
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, moba_attention
from moba_train.context_parallel.layout import balanced, zigzag
from moba_train.context_parallel.memory import peak_bytes
from moba_train.context_parallel.wrap import STRATEGIES, wrap

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
LAYOUTS = {"zigzag": zigzag, "balanced": balanced}
K = 1024
UNKNOWN_S = 20.0  # of a first run: kernels are compiled


class Variant(NamedTuple):
    """How an op is shared. gather_heads: of all_gather alone; layout: not of all_to_all, which attends to all rows."""

    strategy: str
    gather_heads: int | None
    overlap: bool
    layout: str

    def __str__(self) -> str:
        heads = "" if self.gather_heads is None else f", {self.gather_heads} heads"
        layout = "" if self.layout == "zigzag" else f", {self.layout}"
        return f"{self.strategy}{heads}{layout}"

    def wrap(self, op: Callable, group: dist.ProcessGroup) -> Callable:
        return wrap(op, group, **self._asdict() | {"layout": LAYOUTS[self.layout]})


class Bench:
    """Options, the results so far, and the time that is left, which all ranks see alike."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.group = dist.group.WORLD
        self.rank, self.size = self.group.rank(), self.group.size()
        self.began = time.monotonic()
        shape = f"{options.heads}/{options.key_heads} heads, head dim {options.head_dim}"
        self.about = f"{shape}, {'bf16' if CUDA else 'fp32'}"
        self.sections: dict[str, list[str]] = {}
        self.rows: list[Row] = []
        self.whole: dict[str, list[Tensor]] = {}  # op -> its results on one device, to check shared ones by

    def left_s(self) -> float:
        left = torch.tensor(self.options.budget - (time.monotonic() - self.began), device=DEVICE)
        dist.broadcast(left, 0)
        return float(left)

    def say(self, section: str, line: str) -> None:
        self.sections.setdefault(section, []).append(line)
        if self.rank == 0:
            print(line, flush=True)
            write(self.rows, self.sections, self.about, self.options.out)

    def once(self, call: Callable[[], object], together: bool) -> float:
        """Seconds of one call; `together`: all ranks start at once, and the slowest counts."""
        if together:
            dist.barrier(self.group)
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds = torch.tensor(time.perf_counter() - start, device=DEVICE)
        if together:
            dist.all_reduce(seconds, dist.ReduceOp.MAX, self.group)
        return float(seconds)

    def timed(self, call: Callable[[], object], expected_s: float | None = None, together: bool = True) -> float:
        """Median seconds of as many calls as fit `--seconds`, one at least, after one that warms up.

        A first call that is long, and no longer than expected, is the measurement itself.
        """
        longest = self.options.seconds
        first = self.once(call, together)
        if expected_s is not None and longest <= first <= 1.25 * expected_s:
            return first
        times = [self.once(call, together)]
        while len(times) < self.options.repeats and sum(times) + times[-1] <= longest:
            times.append(self.once(call, together))
        return statistics.median(times)

    def cost_s(self, expected_s: float | None) -> float:
        """About how long `timed` will take."""
        if expected_s is None:
            return UNKNOWN_S
        if expected_s >= self.options.seconds:
            return expected_s
        return expected_s * (1 + min(self.options.repeats, max(1, self.options.seconds // expected_s)))


class Kernels(logging.Handler):
    """What the package logs, which kernels serve the ops, as a section of the page."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    def emit(self, record: logging.LogRecord) -> None:
        self.bench.say("kernels", f"- {record.getMessage()}")


def main() -> None:
    options = parse()
    backend = "nccl" if CUDA else "gloo"
    if CUDA:
        torch.cuda.set_device(DEVICE)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, device_id=DEVICE if CUDA else None, **alone)
    bench = Bench(options)
    log = logging.getLogger("moba_train")
    log.setLevel(logging.INFO)
    log.addHandler(Kernels(bench))
    for name in options.what:
        MODES[name](bench)
    bench.say("end", f"{time.monotonic() - bench.began:.0f} s in all")
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=MODES)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64 * K, 128 * K, 256 * K, 512 * K], help="rows in all"
    )
    parser.add_argument("--balance-length", type=int, default=128 * K)
    parser.add_argument("--balance-ranks", type=int, nargs="+", default=[2, 8], help="numbers of ranks to play")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gather-heads", type=int, nargs="+", default=[4])
    parser.add_argument("--ops", nargs="+", default=["512x12", "4096x12", "full"], help="full, or block size x top-k")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["zigzag"], help="of MoBA's rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions a measurement")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; what would exceed it is left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="small shapes, whatever else is said")
    options = parser.parse_args()
    if options.quick:
        small = {"lengths": [256, 512], "balance_length": 512, "heads": 4, "key_heads": 2, "head_dim": 16}
        vars(options).update(small, gather_heads=[1], ops=["16x3", "full"], repeats=2, seconds=0.1)
    return options


def op_of(name: str) -> tuple[Callable, dict[str, int]]:
    """The op, and the options of a call."""
    if name == "full":
        return full_attention, {}
    block_size, top_k = map(int, name.split("x"))
    return moba_attention, {"block_size": block_size, "top_k": top_k}


def title(name: str) -> str:
    return name if name == "full" else "MoBA {}, k {}".format(*name.split("x"))


def scaling(bench: Bench) -> None:
    options, size = bench.options, bench.size
    for text in HEADER:
        bench.say("scaling", text)
    one: dict[tuple[str, int], float] = {}
    seen: dict[tuple[str, Variant], bool] = {}  # whether it passed its check
    left_out: list[str] = []
    # What a budget cuts is the end: the longest rows.
    for length, name in itertools.product(sorted(options.lengths), options.ops):
        for rows in sorted({length // size, length}):  # of weak scaling one device's share, too
            if (name, rows) in one:
                continue
            guess = expected(one, name, rows)
            if bench.left_s() < bench.cost_s(guess):
                left_out.append(f"{title(name)}, {rows} rows on one device")
                continue
            one[name, rows] = bench.timed(step(*op_of(name), options, rows, SequenceInfo([0, rows])), guess)
            add(bench, Row(title(name), rows, 1, "", "", False, *[1e3 * one[name, rows]] * 3, 1.0))
        if (name, length) not in one:
            left_out.append(f"{title(name)}, {length} rows: no time of one device to compare with")
            continue
        ideal = one[name, length] / size
        for variant in variants_of(name, options):
            known = (name, variant) in seen
            guess = ideal if known else None
            if bench.left_s() < bench.cost_s(guess):
                left_out.append(f"{title(name)}, {length} rows, {variant}, overlap {variant.overlap}")
                continue
            if not known:
                seen[name, variant] = passes(bench, name, variant)
            if not seen[name, variant]:
                continue
            op, settings = op_of(name)
            seq = SequenceInfo([0, length], LAYOUTS[variant.layout](length, size).positions(bench.rank))
            call = step(variant.wrap(op, bench.group), settings, options, length // size, seq)
            seconds = bench.timed(call, guess)
            times = (1e3 * seconds, 1e3 * one[name, length], 1e3 * ideal)
            row = (title(name), length, size, series(length, size), str(variant), variant.overlap)
            add(bench, Row(*row, *times, ideal / seconds))
    for what in left_out:
        bench.say("left out for want of time", f"- {what}")


def variants_of(name: str, options: argparse.Namespace) -> list[Variant]:
    """All ways to share the op. One document of full attention is balanced by the first layout already."""
    return [
        Variant(strategy, heads, overlap, layout)
        for strategy in options.strategies
        for heads in (options.gather_heads if strategy == "all_gather" else [None])
        for layout in (options.layouts[:1] if strategy == "all_to_all" or name == "full" else options.layouts)
        for overlap in (True, False)
    ]


def passes(bench: Bench, name: str, variant: Variant) -> bool:
    """Whether every row of the shared op's output and gradients is one device's, at the shortest length."""
    (op, settings), length = op_of(name), min(bench.options.lengths)
    torch.manual_seed(0)  # the same rows on all ranks
    whole = [x.detach() for x in tensors(bench.options, length)]
    whole.append(torch.randn_like(whole[0]))
    if name not in bench.whole:
        bench.whole[name] = results(op, settings, whole, SequenceInfo([0, length]))
    positions = LAYOUTS[variant.layout](length, bench.size).positions(bench.rank)
    rows = torch.tensor(positions, device=DEVICE)
    wrapped = variant.wrap(op, bench.group)
    found = results(wrapped, settings, [x[rows] for x in whole], SequenceInfo([0, length], positions))
    error = error_of(found, [x[rows] for x in bench.whole[name]], bench.group)
    passed = error <= LIMITS[whole[0].dtype]
    if not passed:
        what = f"{title(name)}, {variant}, overlap {variant.overlap}"
        bench.say("refused", f"- {what}: a row is off by {error:.2g} of its size from one device's")
    return passed


def expected(one: dict[tuple[str, int], float], name: str, rows: int) -> float | None:
    """Seconds of these rows on one device, from the longest shorter ones; never less than they will take."""
    shorter = [known for op, known in one if op == name and known < rows]
    if not shorter:
        return None
    return one[name, max(shorter)] * (rows / max(shorter)) ** (2 if name == "full" else 1.5)


def add(bench: Bench, row: Row) -> None:
    bench.rows.append(row)
    bench.say("scaling", line(row))


def plumbing(bench: Bench) -> None:
    """Bare and wrapped in turn, so that clocks and temperature are alike."""
    options = bench.options
    mine = [dist.new_group([rank]) for rank in range(bench.size)][bench.rank]
    rows = min(options.lengths) // bench.size
    bench.say("plumbing", "| op | rows | bare ms | wrapped for a group of one, ms | cost |")
    bench.say("plumbing", "|---|---|---|---|---|")
    for name in options.ops:
        op, settings = op_of(name)
        calls = [step(each, settings, options, rows, SequenceInfo([0, rows])) for each in (op, wrap(op, mine))]
        for call in calls:
            first = max(bench.once(call, together=True), bench.once(call, together=True))  # compiles; then as usual
        rounds = max(options.repeats, min(50, int(2 * options.seconds / first)))
        times = [[1e3 * bench.once(call, together=True) for call in calls] for _ in range(rounds)]
        bare, wrapped = map(statistics.median, zip(*times, strict=True))
        cost = f"{100 * (wrapped / bare - 1):+.2f} %"
        bench.say("plumbing", f"| {title(name)} | {rows} | {bare:.3f} | {wrapped:.3f} | {cost} |")


def balance(bench: Bench) -> None:
    options, length = bench.options, bench.options.balance_length
    documents = {"one": [0, length], "log-normal": log_normal(length)}
    cases = list(itertools.product(options.ops, documents, options.balance_ranks))
    found = {}
    for name, kind, size in cases[bench.rank :: bench.size]:
        found[name, kind, size] = []
        keys = tensors(options, length)[1:]
        for rule in LAYOUTS.values():
            layout, times = rule(length, size, documents[kind]), []
            for rank in range(size):
                seq = SequenceInfo(documents[kind], layout.positions(rank))
                leaves = [tensors(options, length // size)[0], *keys]
                call = partial(both_ways, *op_of(name), leaves, torch.randn_like(leaves[0]), seq)
                times.append(bench.timed(call, together=False))
            found[name, kind, size].append(max(times) / statistics.mean(times))
    everyone: list[dict] = [{}] * bench.size
    dist.all_gather_object(everyone, found)
    ratios = {case: ratio for part in everyone for case, ratio in part.items()}
    bench.say("balance", "| op | documents | ranks | " + " | ".join(LAYOUTS) + " |")
    bench.say("balance", "|---|---|---|" + "---|" * len(LAYOUTS))
    for name, kind, size in cases:
        columns = " | ".join(f"{ratio:.3f}" for ratio in ratios[name, kind, size])
        bench.say("balance", f"| {title(name)} | {kind}, {length} rows | {size} | {columns} |")


def memory(bench: Bench) -> None:
    if not CUDA:
        bench.say("memory", "not measured: there is no CUDA allocator here")
        return
    options, group = bench.options, bench.group
    bench.say("memory", "| rows in all | strategy | overlap | forward MiB | formula | backward MiB | formula |")
    bench.say("memory", "|---|---|---|---|---|---|---|")
    shapes = {"heads": options.heads, "key_heads": options.key_heads, "head_dim": options.head_dim}
    for length, strategy, overlap in itertools.product(options.lengths, options.strategies, (True, False)):
        seq = SequenceInfo([0, length], zigzag(length, group.size()).positions(group.rank()))
        sharing = {"gather_heads": options.gather_heads[0], "overlap": overlap}
        wrapped = wrap(stand_in, group, strategy, **sharing)
        leaves = tensors(options, length // group.size())
        forward, (out, _) = peak_of(partial(wrapped, *leaves, seq))
        grad = torch.ones_like(out)
        backward, _ = peak_of(partial(torch.autograd.grad, out, leaves, grad))
        want = peak_bytes(strategy, rows=length, num_ranks=group.size(), **shapes, **sharing)
        numbers = " | ".join(f"{x / 2**20:.0f}" for x in (forward, want.forward, backward, want.backward))
        bench.say("memory", f"| {length} | {strategy} | {'yes' if overlap else 'no'} | {numbers} |")


def tensors(options: argparse.Namespace, rows: int) -> list[Tensor]:
    dtype = torch.bfloat16 if CUDA else torch.float32
    shapes = [(rows, heads, options.head_dim) for heads in (options.heads, options.key_heads, options.key_heads)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def step(
    op: Callable, settings: dict[str, int], options: argparse.Namespace, rows: int, seq: SequenceInfo
) -> Callable[[], None]:
    """Forward and backward of `op` on random rows of this rank."""
    leaves = tensors(options, rows)
    return partial(both_ways, op, settings, leaves, torch.randn_like(leaves[0]), seq)


def both_ways(op: Callable, settings: dict[str, int], leaves: list[Tensor], grad: Tensor, seq: SequenceInfo) -> None:
    out, _ = op(*leaves, seq, **settings)
    torch.autograd.grad(out, leaves, grad)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


MODES: dict[str, Callable[[Bench], None]] = {
    "scaling": scaling,
    "memory": memory,
    "balance": balance,
    "plumbing": plumbing,
}

if __name__ == "__main__":
    main()
