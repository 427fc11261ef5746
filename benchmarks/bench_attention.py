"""Time MoBA's attention, gate and routing included, against the dense kernels of the machine.

    python benchmarks/bench_attention.py [--settings small ...] [--lengths 8192 ...] [--budget 420] [--out FOLDER]

Every backend is first held to fp64 on a small case of its setting, and one that fails is not timed; these checks run
side by side, which also compiles the kernels. Rows of deterministic gradients come at `--deterministic` lengths, those
of every kernel captured into CUDA graphs (no host to wait for) at `--graphs` lengths. Last come decoding and chunked
prefill over `--serving` keys, and full attention of `--documents` queries to packed documents and by a context rank.
`--budget` (seconds, checks included, the last tables not) takes repetitions away where time is short, never rows. A row
that runs out of memory says so. Writes attention_<device>_<date>.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attention_documents import documents
from attention_report import Row, line, write
from attention_serving import serving
from attention_shapes import (
    DENSE,
    GRAPH,
    LIMIT,
    MOBA,
    SETTINGS,
    Attention,
    K,
    Setting,
    error_of,
    inputs,
    is_moba,
    kernel,
    median_ms,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_FORWARD_ONLY = 1024 * K  # from here on dense backward takes a minute
_LONGEST = {"FlashAttention 2": 256 * K}  # half as fast as the others at every length: a minute for nothing
_TFLOPS = 450e12  # for guesses of how long a row takes


def main() -> None:
    options = _options()
    # Compiled kernels of FlashAttention 4 pass from the checks to the timing through its cache on disk.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    if options.check:
        print(json.dumps(_check(*options.check.split(":"), bool(options.deterministic))))
        return
    deadline = time.monotonic() + options.budget
    errors = _check_all(options)
    plan = [
        (name, length)
        for name in options.settings
        for length in options.lengths or SETTINGS[name].lengths
        if length >= SETTINGS[name].block_size
    ]
    bench = Bench(options, errors, deadline, plan)
    rows: list[Row] = []
    sections = [_errors_section(errors)]
    for name, length in plan:
        measured = bench.rows(name, length)
        print("\n".join(map(line, measured)), flush=True)
        rows += measured
        sections = [_errors_section(errors), *bench.sections()]
        write(rows, sections, options.out)
    for name in options.settings if options.serving else []:
        served = serving(name, bench.moba[name], options.serving)
        print(served, flush=True)
        sections.append(served)
        write(rows, sections, options.out)
    if options.documents:
        sections.append(documents(bench.full_backends(), options.documents))
        print(sections[-1], flush=True)
        write(rows, sections, options.out)
    print("\n\n".join(bench.sections()))


class Bench:
    """Timings of one run; dense kernels are timed once for each shape of heads and length."""

    def __init__(
        self, options: argparse.Namespace, errors: dict[str, float], deadline: float, plan: list[tuple[str, int]]
    ) -> None:
        self.options, self.deadline, self.plan = options, deadline, plan
        self.moba = {name: [b for b in options.backends if errors.get(f"{name}:{b}", 99) <= LIMIT] for name in SETTINGS}
        self.timed: dict[tuple, tuple] = {}
        self.breakdowns: list[str] = []
        self.waiting = {self._key(*row, k): self._guess(*row, k) for row in plan for k in self._kernels(*row)}
        self.copy_bandwidth = _copy_bandwidth()

    def rows(self, name: str, length: int) -> list[Row]:
        """Rows of all dense kernels and of MoBA at one length."""
        setting, rows = SETTINGS[name], []
        for kernel_name in self._kernels(name, length):
            key = self._key(name, length, kernel_name)
            if key not in self.timed:
                self.timed[key] = self._time(name, length, kernel_name)
        times = {k: self.timed[self._key(name, length, k)] for k in self._kernels(name, length)}
        lean = [times[k][2] for k in DENSE if k in times and "Flash" in k and times[k][2] is not None]
        for kernel_name, (forward_ms, both_ms, gib, count, note) in times.items():
            moba, bare, graph = is_moba(kernel_name), kernel_name.removesuffix(GRAPH), kernel_name.endswith(GRAPH)
            # Against the fastest dense kernel, in a graph against the fastest in a graph.
            dense = [row for k, row in times.items() if not is_moba(k) and k.endswith(GRAPH) == graph]
            forward, both, memory = (min((t[i] for t in dense if t[i] is not None), default=None) for i in range(3))
            # Dense kernels that ran forward alone say nothing of a training step's memory, nor do a graph's pools.
            alike = not graph and (both is not None or both_ms is None)
            rows.append(
                Row(
                    name,
                    length,
                    f"moba {kernel_name}" if moba else kernel_name,
                    forward_ms,
                    both_ms,
                    gib,
                    _ratio(gib, min(lean, default=memory)) if alike else None,
                    _ratio(forward, forward_ms),
                    _ratio(both, both_ms),
                    setting.ratio(length) if moba else None,
                    setting.goals.get(length) if bare in MOBA else None,
                    setting.forward_goals.get(length) if bare in MOBA else None,
                    count,
                    note,
                )
            )
        return rows

    def full_backends(self) -> list[str]:
        """Of full attention: those whose checks passed, and PyTorch's."""
        return [b for b in ("flash", "triton") if any(b in found for found in self.moba.values())] + ["sdpa"]

    def sections(self) -> list[str]:
        """Markdown after the table: rates of the kernels alone."""
        if not self.breakdowns:
            return self._choices()
        head = (
            f"## The attention kernels alone\n\nCopy bandwidth {self.copy_bandwidth / 1e12:.2f} TB/s (read and write). "
            "Device time of one forward and backward by kernel (profiler), ms; TFLOP/s: those with a star.\n\n"
            "| setting | length | backend | forward TFLOP/s | backward TFLOP/s | of cuDNN's | pairs, TB/s | kernels |\n"
            "|---|---|---|---|---|---|---|---|\n"
        )
        return [head + "\n".join(self.breakdowns), *self._choices()]

    def _choices(self) -> list[str]:
        lines = {}
        for name, length in self.plan:
            setting = SETTINGS[name]
            times = [self.timed.get(self._key(name, length, k), (None, None))[:2] for k in ("triton", "flash")]
            numbers = [ms for forward, both in times if both for ms in (forward, both - forward)]
            if len(numbers) == 4 and setting.head_dim == 128 and setting.top_k * setting.block_size < length:
                numbers_text = ", ".join(f"{ms:.1f}" for ms in numbers)
                text = f"    Measured({setting.block_size}, {length}, {numbers_text}),"
                lines.setdefault((setting.block_size, length), text)  # of settings alike, the first
        head = "## For moba_train/attention/choice.py\n\nForward and backward of triton, then of flash.\n\n```\n"
        return [head + "\n".join(lines.values()) + "\n```"] if lines else []

    def _kernels(self, name: str, length: int) -> list[str]:
        dense = [k for k in self.options.dense if length <= min(self.options.dense_to, _LONGEST.get(k, length))]
        deterministic = [f"{k} deterministic" for k in ("triton", "flash") if length in self.options.deterministic]
        moba = [k for k in (*MOBA, *deterministic) if k.partition(" ")[0] in self.moba[name]]
        graphs = [k + GRAPH for k in dense + moba if length in self.options.graphs and k not in deterministic]
        return dense + moba + graphs

    def _key(self, name: str, length: int, kernel_name: str) -> tuple:
        setting = SETTINGS[name]
        return (kernel_name, length, *setting[: 5 if is_moba(kernel_name) else 3])

    def _guess(self, name: str, length: int, kernel_name: str) -> float:
        setting = SETTINGS[name]
        pairs = setting.moba_pairs(length) if is_moba(kernel_name) else setting.dense_pairs(length)
        slow = 2.0 if is_moba(kernel_name) or kernel_name == "FlashAttention 2" else 1.0
        steps = 1 if self._forward_only(length, kernel_name) else 3.5
        return slow * steps * setting.flops(pairs, backward=False) / _TFLOPS

    def _forward_only(self, length: int, kernel_name: str) -> bool:
        return kernel_name in DENSE and length >= _FORWARD_ONLY

    def _time(self, name: str, length: int, kernel_name: str) -> tuple:
        """(forward ms, forward and backward ms, peak GiB, runs, note)."""
        setting, key = SETTINGS[name], self._key(name, length, kernel_name)
        guess = self.waiting.pop(key, 0.0)
        attend = kernel(kernel_name, setting, length)
        if attend is None:
            return None, None, None, 0, "not installed"
        # What rows still to come need at least, once each; the rest is shared for repetitions.
        spare = (self.deadline - time.monotonic() - 2 * guess - sum(self.waiting.values())) / (1 + len(self.waiting))
        passes = (False,) if self._forward_only(length, kernel_name) else (True, False)
        result: tuple = (None, None, None, 0, "out of memory")
        for backward in passes:
            try:
                # Compiles and warms up. A dense row of seconds needs neither: its kernels ran at shorter lengths.
                warm = guess < 2.0 or is_moba(kernel_name)
                graph = kernel_name.endswith(GRAPH)
                result = _measure(attend, setting, length, warm, spare, backward=backward, graph=graph)
                break
            except torch.OutOfMemoryError:
                pass
            torch.cuda.empty_cache()
        if result[1] is None and len(passes) == 2 and result[3]:
            result = (*result[:4], "backward out of memory")
        if kernel_name in MOBA and length in self.options.break_down and result[1] is not None:
            self.breakdowns.append(self._break_down(name, length, kernel_name, attend))
        torch.cuda.empty_cache()
        return result

    def _break_down(self, name: str, length: int, backend: str, attend: Attention) -> str:
        setting = SETTINGS[name]
        q, k, v = inputs(length, setting)
        dout = torch.randn_like(q)
        steps = []
        for backward in (False, True):
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                out = attend(q, k, v)
                if backward:
                    out.backward(dout)
                torch.cuda.synchronize()
            times: dict[str, float] = {}
            for event in trace.events():
                if event.device_type == DeviceType.CUDA:
                    label = _label(event.name)
                    times[label] = times.get(label, 0.0) + event.time_range.elapsed_us() / 1e3
            steps.append(times)
        forward = steps[0]
        after = {label: ms - forward.get(label, 0.0) for label, ms in steps[1].items()}
        after = {label: ms for label, ms in after.items() if ms > 0.005}
        rates, shares = [], []
        dense = self.timed.get(self._key(name, length, "cuDNN"), (None, None))
        for backward, times in ((False, forward), (True, after)):
            attention = sum(ms for label, ms in times.items() if label.startswith("*"))
            rate = setting.flops(setting.moba_pairs(length), backward=backward) / max(attention, 1e-9) * 1e3
            rates.append(f"{rate / 1e12:.0f}")
            cudnn = dense[0] if not backward else (dense[1] or 0) - (dense[0] or 0)
            if cudnn:
                work = setting.flops(setting.dense_pairs(length), backward=backward)
                shares.append(f"{rate * cudnn / 1e3 / work:.0%}")
        pairs = (
            setting.moba_pairs(length) - setting.dense_pairs(setting.block_size) * (length // setting.block_size)
        ) * (setting.heads / setting.block_size)
        row_bytes = 2 * setting.head_dim
        moved = [("*pairs", forward, 2 * row_bytes + 8), ("*key_gradient", after, 4 * row_bytes + 16)]
        speeds = [f"{pairs * size / times[n] / 1e9:.2f}" for n, times, size in moved if n in times]
        parts = " · ".join(f"{t}: " + ", ".join(_top(times)) for t, times in (("fwd", forward), ("bwd", after)))
        cells = [name, f"{length // K}K", backend, *rates, " / ".join(shares), " / ".join(speeds), parts]
        return "| " + " | ".join(cells) + " |"


def _label(name: str) -> str:
    """A kernel's short name, with a star where the rate of attention counts it: not of gate, routing, PyTorch's own."""
    if "FlashAttention" in name or "flash" in name:
        for part in ("Preprocess", "Postprocess", "Forward", "Backward"):
            if part in name or part.lower() in name:
                return f"*fa4 {part.lower()}"
    found = re.match(r"_?(resident_)?(pairs|own|merge|row_terms|key_gradient|gather|pad|sum)_kernel", name)
    if found:
        return "*" + found[2]
    return re.sub(r"[<(].*", "", name.removeprefix("void ")).split("::")[-1].strip()[:40]


def _top(times: dict[str, float]) -> list[str]:
    ranked = sorted(times.items(), key=lambda item: -item[1])
    rest = sum(ms for _, ms in ranked[9:])
    return [f"{label} {ms:.2f}" for label, ms in ranked[:9]] + ([f"other {rest:.2f}"] if rest > 0.01 else [])


def _measure(
    attend: Attention, setting: Setting, length: int, warm: bool, spare: float, *, backward: bool, graph: bool
) -> tuple[float, float | None, float, int, str]:
    q, k, v = inputs(length, setting)
    dout = torch.randn_like(q)
    if graph:
        gc.collect()  # an earlier row's graph, freed while this one records, would spoil the recording
        attend = torch.cuda.make_graphed_callables(attend, (q, k, v))

    def step() -> tuple[float, float]:
        q.grad = k.grad = v.grad = None
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        with contextlib.nullcontext() if backward else torch.no_grad():
            marks[0].record()
            out = attend(q, k, v)
            marks[1].record()
            if backward:
                out.backward(dout)
            marks[2].record()
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2])

    if warm:
        step()
    torch.cuda.reset_peak_memory_stats()
    times = [step()]
    peak = torch.cuda.max_memory_allocated() / 2**30
    count = 1 + int(min(max(spare, 0.0), 0.6) * 1e3 / times[0][1])
    times += [step() for _ in range(min(count, 20) - 1)]
    forward_ms, both_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return forward_ms, both_ms if backward else None, peak, len(times), ""


def _check_all(options: argparse.Namespace) -> dict[str, float]:
    """The error of every backend at every setting, each in a process of its own, which fills the compilers' caches."""
    jobs = [f"{name}:{backend}" for name in options.settings for backend in options.backends]
    if "FlashAttention 4" in options.dense:  # compiled once for each shape of heads
        jobs += [
            f"{name}:FlashAttention 4" for name in {SETTINGS[name][:3]: name for name in options.settings}.values()
        ]
    start = time.monotonic()
    end = start + max(60.0, options.budget / 2)
    running = {job: _process(job, options) for job in jobs}
    errors: dict[str, float] = {}
    for job, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        if process.returncode == 0:
            found = json.loads(output.strip().splitlines()[-1])
        else:
            found = {"error": float("inf"), "why": output[-1500:]}
        if job.split(":")[1] in MOBA:
            errors[job] = found["error"]
        verdict = "" if found["error"] <= LIMIT else f" FAILED, not timed {found.get('why', '')}"
        print(
            f"check {job}: {found['error']:.2f} x torch's error, {found.get('seconds', 0):.0f} s{verdict}", flush=True
        )
    print(f"checks: {time.monotonic() - start:.0f} s", flush=True)
    return errors


def _process(job: str, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--check", job, "--deterministic", *map(str, options.deterministic)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def _check(name: str, kernel_name: str, deterministic: bool) -> dict[str, float]:
    start, setting = time.monotonic(), SETTINGS[name]
    error = error_of(kernel_name, setting) if kernel_name in MOBA else 0.0
    if error <= LIMIT:
        both = deterministic and kernel_name in ("triton", "flash")
        names = [kernel_name, f"{kernel_name} deterministic"] if both else [kernel_name]
        for variant, length in itertools.product(names, (max(8 * K, 2 * setting.block_size), 32 * K)):
            attend = kernel(variant, setting, length)
            if attend is not None:
                q, k, v = inputs(length, setting)
                attend(q, k, v).sum().backward()
        torch.cuda.synchronize()
    return {"error": error, "seconds": time.monotonic() - start}


def _errors_section(errors: dict[str, float]) -> str:
    rows = [f"| {job.replace(':', ' | ')} | {error:.2f} |" for job, error in errors.items()]
    head = "## Errors against fp64\n\nThe largest of out's (times 1.5) and the gradients', in multiples of same-dtype "
    return head + "torch's; 3 is the limit.\n\n| setting | backend | error |\n|---|---|---|\n" + "\n".join(rows)


def _copy_bandwidth() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--lengths", nargs="+", type=int, help="instead of each setting's own")
    parser.add_argument("--backends", nargs="+", choices=MOBA, default=list(MOBA))
    parser.add_argument("--dense", nargs="*", choices=DENSE, default=list(DENSE))
    parser.add_argument("--dense-to", type=int, default=1 << 20, help="longest length at which dense kernels run")
    parser.add_argument("--break-down", nargs="*", type=int, default=[8 * K, 32 * K, 128 * K], help="profiled lengths")
    parser.add_argument("--deterministic", nargs="*", type=int, default=[32 * K, 128 * K], help="lengths of its rows")
    parser.add_argument("--graphs", nargs="*", type=int, default=[8 * K], help="lengths of rows in CUDA graphs")
    parser.add_argument("--serving", type=int, default=128 * K, help="keys of decoding and chunked prefill; 0: none")
    parser.add_argument("--documents", type=int, default=64 * K, help="queries of full attention by batch; 0: none")
    parser.add_argument("--budget", type=float, default=420, help="seconds in all, checks included")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
