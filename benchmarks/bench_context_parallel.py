"""Context parallelism: time against the ideal, peak memory against its formula, balance of layouts.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_context_parallel.py scaling --output FILE.md
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_context_parallel.py memory
    python benchmarks/bench_context_parallel.py balance          # one device plays every rank in turn
    python benchmarks/bench_context_parallel.py sink --picks PICKS.pt --picture sink.png

scaling: forward and backward of one attention layer under every strategy, with and without overlap. The ideal is the
time of the same rows on one device divided by the ranks. memory: what communication adds to an op that itself needs
nothing but its results. balance: the busiest rank's attention time over the mean, by layout. sink: the work of each
rank had queries been sent to the owners of their picked blocks, from the picks of a trained model, saved as
{"picks": [T, H, K], "cu_seqlens", "block_size"}. Runs on CPUs too (gloo, `--lengths 4096 --repeats 1`), to show that it
works, not how fast.

Letters as in moba_train/context_parallel: t rows of a rank, S rows of all, H query heads, G key heads, D head dim.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.attention import SequenceInfo, full_attention, moba_attention
from moba_train.context_parallel.layout import LayoutRule, balanced, contiguous, zigzag
from moba_train.context_parallel.memory import peak_bytes
from moba_train.context_parallel.wrap import STRATEGIES, wrap

CUDA = torch.cuda.is_available()
OPS: dict[str, tuple[Callable, dict]] = {
    "full": (full_attention, {}),
    "moba 4096 k12": (moba_attention, {"block_size": 4096, "top_k": 12}),
    "moba 512 k12": (moba_attention, {"block_size": 512, "top_k": 12}),
}
LAYOUTS: dict[str, LayoutRule] = {"zigzag": zigzag, "balanced": balanced, "contiguous": contiguous}


def main() -> None:
    options = parse()
    if "RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
        if CUDA:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if CUDA else "gloo", device_id=device if CUDA else None)
    lines = list(MODES[options.what](options))
    if not dist.is_initialized() or dist.get_rank() == 0:
        report(options, lines)
    if dist.is_initialized():
        dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=MODES)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[65536, 131072, 262144, 524288], help="all ranks' rows"
    )
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gather-heads", type=int, default=2)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="balance: ranks to play")
    parser.add_argument("--picks", type=Path, help="sink: file of picks")
    parser.add_argument("--picture", type=Path, help="sink: draw the load here")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table here")
    return parser.parse_args()


def scaling(options: argparse.Namespace) -> Iterable[str]:
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    yield "| op | rows in all | strategy | overlap | ms, slowest rank | ideal ms | of ideal |"
    yield "|---|---|---|---|---|---|---|"
    for name, length in itertools.product(options.ops, options.lengths):
        op, settings = OPS[name]
        alone = timed(op, tensors(options, length), SequenceInfo([0, length]), settings, options.repeats)
        ideal = slowest(alone, group) / size
        seq = SequenceInfo([0, length], zigzag(length, size).positions(rank))
        for strategy, overlap in itertools.product(options.strategies, (True, False)):
            wrapped = wrap(op, group, strategy, gather_heads=options.gather_heads, overlap=overlap)
            mine = timed(wrapped, tensors(options, length // size), seq, settings, options.repeats, group)
            ms = slowest(mine, group)
            share = f"{100 * ideal / ms:.1f} %"
            with_overlap = "yes" if overlap else "no"
            yield f"| {name} | {length} | {strategy} | {with_overlap} | {ms:.2f} | {ideal:.2f} | {share} |"


def memory(options: argparse.Namespace) -> Iterable[str]:
    if not CUDA:
        raise SystemExit("memory is measured by the CUDA allocator: run this on GPUs")
    group = dist.group.WORLD
    yield "| rows in all | strategy | overlap | forward MiB | formula | backward MiB | formula |"
    yield "|---|---|---|---|---|---|---|"
    for length in options.lengths:
        seq = SequenceInfo([0, length], zigzag(length, group.size()).positions(group.rank()))
        for strategy, overlap in itertools.product(options.strategies, (True, False)):
            wrapped = wrap(stand_in, group, strategy, gather_heads=options.gather_heads, overlap=overlap)
            leaves = tensors(options, length // group.size())
            forward, (out, _) = peak_of(partial(wrapped, *leaves, seq))
            grad = torch.ones_like(out)
            backward, _ = peak_of(partial(torch.autograd.grad, out, leaves, grad))
            want = peak_bytes(
                strategy,
                rows=length,
                num_ranks=group.size(),
                heads=options.heads,
                key_heads=options.key_heads,
                head_dim=options.head_dim,
                gather_heads=options.gather_heads,
                overlap=overlap,
            )
            row = (f"{x / 2**20:.0f}" for x in (forward, want[0], backward, want[1]))
            yield f"| {length} | {strategy} | {'yes' if overlap else 'no'} | {' | '.join(row)} |"


class _StandIn(torch.autograd.Function):
    """Saves and returns what attention does, computes nothing: all memory above it is communication's."""

    @staticmethod
    def forward(ctx, q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor):
        out, lse = torch.empty_like(q_THD), q_THD.new_zeros(q_THD.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_THD, k_SGD, v_SGD, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
        q_THD, k_SGD, v_SGD, _, _ = ctx.saved_tensors
        return torch.empty_like(q_THD), torch.empty_like(k_SGD), torch.empty_like(v_SGD)


def stand_in(q_THD: Tensor, k_SGD: Tensor, v_SGD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Tensor]:
    return _StandIn.apply(q_THD, k_SGD, v_SGD)


def balance(options: argparse.Namespace) -> Iterable[str]:
    yield "| op | documents | ranks | " + " | ".join(LAYOUTS) + " |"
    yield "|---|---|---|" + "---|" * len(LAYOUTS)
    for length, (kind, bounds) in itertools.product(options.lengths, (("one", None), ("log-normal", "draw"))):
        bounds = [0, length] if bounds is None else log_normal(length)
        keys = tensors(options, length)[1:]
        for name, size in itertools.product(options.ops, options.ranks):
            op, settings = OPS[name]
            ratios = []
            for rule in LAYOUTS.values():
                layout = rule(length, size, bounds)
                times = []
                for rank in range(size):
                    seq = SequenceInfo(bounds, layout.positions(rank))
                    inputs = [tensors(options, length // size)[0], *keys]
                    times.append(timed(op, inputs, seq, settings, options.repeats))
                ratios.append(f"{max(times) / statistics.mean(times):.3f}")
            yield f"| {name} | {kind}, {length} rows | {size} | {' | '.join(ratios)} |"


def sink(options: argparse.Namespace) -> Iterable[str]:
    saved = torch.load(options.picks)
    seq = SequenceInfo(saved["cu_seqlens"])
    yield "| ranks | pairs of the busiest rank over the mean: queries sent to block owners | queries stay (zigzag) |"
    yield "|---|---|---|"
    for size in options.ranks:
        sent, stay = pair_loads(saved["picks"], seq, saved["block_size"], size)
        yield f"| {size} | {max(sent) / statistics.mean(sent):.2f} | {max(stay) / statistics.mean(stay):.2f} |"
        if options.picture and size == max(options.ranks):
            draw(options.picture, sent, stay)


def pair_loads(picks_THK: Tensor, seq: SequenceInfo, block_size: int, size: int) -> tuple[list[float], list[float]]:
    """(query, key) pairs by rank: if a block's owner (contiguous shards) did its work, and if the query's rank does."""
    table = seq.blocks(block_size)
    picked = picks_THK >= 0
    blocks = picks_THK.long().clamp(min=0)
    rows_T = torch.arange(seq.num_keys)
    seen = torch.minimum(rows_T[:, None, None] + 1, table.end_N[blocks]) - table.start_N[blocks]
    pairs_THK = seen * picked
    owner = table.start_N[blocks] * size // seq.num_keys
    sent = torch.zeros(size, dtype=torch.int64).index_add_(0, owner.flatten(), pairs_THK.flatten())
    own_T, layout = pairs_THK.sum((1, 2)), zigzag(seq.num_keys, size)
    return sent.tolist(), [int(own_T[layout.positions(rank)].sum()) for rank in range(size)]


def draw(path: Path, sent: list[float], stay: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    for shift, (label, load) in enumerate((("queries sent to block owners", sent), ("queries stay (zigzag)", stay))):
        mean = statistics.mean(load)
        axes.bar([rank + 0.4 * shift for rank in range(len(load))], [x / mean for x in load], 0.4, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="context rank", ylabel="work / mean")
    axes.legend()
    figure.savefig(path, dpi=150)


def log_normal(length: int, mean: float = 8192, sigma: float = 1.5) -> list[int]:
    """Bounds of packed documents of log-normal lengths."""
    generator = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < length:
        document = (torch.randn((), generator=generator) * sigma + math.log(mean) - sigma**2 / 2).exp()
        bounds.append(min(length, bounds[-1] + max(1, int(document))))
    return bounds


def tensors(options: argparse.Namespace, rows: int) -> list[Tensor]:
    device = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
    dtype = torch.bfloat16 if CUDA else torch.float32
    shapes = [(rows, heads, options.head_dim) for heads in (options.heads, options.key_heads, options.key_heads)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def timed(
    op: Callable,
    leaves: list[Tensor],
    seq: SequenceInfo,
    settings: dict,
    repeats: int,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Median milliseconds of forward and backward; the ranks of `group` start together."""
    grad, times = torch.randn_like(leaves[0]), []
    for _ in range(repeats + 1):  # the first warms up
        if group is not None:
            dist.barrier(group)
        synchronize()
        start = time.perf_counter()
        out, _ = op(*leaves, seq, **settings)
        torch.autograd.grad(out, leaves, grad)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def slowest(ms: float, group: dist.ProcessGroup) -> float:
    times = torch.tensor(ms, device="cuda" if CUDA else "cpu")
    dist.all_reduce(times, dist.ReduceOp.MAX, group)
    return float(times)


def peak_of(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes that `call` had allocated at its peak above those before, and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def report(options: argparse.Namespace, lines: list[str]) -> None:
    device = torch.cuda.get_device_name() if CUDA else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    shape = (
        f"{options.heads}/{options.key_heads} heads, head dim {options.head_dim}, gather_heads {options.gather_heads}"
    )
    head = [f"{device}; torch {torch.__version__}, CUDA {torch.version.cuda}; {shape}; {' '.join(sys.argv)}", ""]
    text = "\n".join([*head, *lines])
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


MODES: dict[str, Callable[[argparse.Namespace], Iterable[str]]] = {
    "scaling": scaling,
    "memory": memory,
    "balance": balance,
    "sink": sink,
}

if __name__ == "__main__":
    main()
