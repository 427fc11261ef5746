"""Does MoBA for 90 % of training and full attention for the rest end where full attention ends?

    python experiments/schedule_switch/run.py [--quick] [--steps N] [--out FOLDER] [key=value ...]

Pretrains one small GPT three times on the Python standard library's sources, from the same seed and on the same
batches: full attention (`full`), MoBA (`moba`), and MoBA that switches to full attention at nine tenths (`hybrid`).
Then writes a page and a picture. A finished arm is not run again, a stopped one goes on from its last checkpoint.
`--quick` shows in a minute or two that everything works; its numbers mean nothing and are not put beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from moba_train import device as devices
from moba_train.data.info import dataset_info
from moba_train.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
ARMS = {"full": ["attention=full"], "moba": ["attention=moba"], "hybrid": ["attention=moba_then_full"]}
EIGHTHS = 8
POSITION_BOUND = 0.01  # nats per token, hybrid over full in the last eighth of the context
SPIKE_BOUND = 2.0  # sigmas
NOISE_STEPS = 50  # before the switch, whose step-to-step changes make sigma
AFTER_STEPS = 10  # after the switch, in which a spike is looked for


@dataclass(frozen=True)
class Setting:
    """Model and training of one kind of device; a block is a sixteenth of the context, and three are attended to."""

    steps: int
    sequence_length: int
    batch: int
    overrides: tuple[str, ...] = ()


GPU = Setting(
    steps=600,
    sequence_length=8192,
    batch=4,
    overrides=(
        "precision=bf16",
        "model.num_layers=8",
        "model.hidden_size=256",
        "model.ffn_hidden_size=768",
        "model.head_dim=64",
        "optim.learning_rate=2e-3",
        "optim.min_learning_rate=2e-4",
        "optim.warmup_steps=40",
    ),
)
CPU = Setting(steps=400, sequence_length=1024, batch=4)
QUICK = Setting(
    steps=40,
    sequence_length=256,
    batch=2,
    overrides=("model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=8", "optim.warmup_steps=4"),
)


@dataclass(frozen=True)
class Curve:
    """One arm's records: training loss by step (from 1), validation loss, whole and by eighths of the context."""

    losses: dict[int, float]
    validation: float
    eighths: list[float]
    plans: list[tuple[int, str]]  # (first step, layers)
    tokens_per_second: float


@dataclass(frozen=True)
class Switch:
    """The hybrid's loss around its switch: `step` steps are MoBA. sigma in nats, the others in sigmas."""

    step: int
    before: int
    after: int
    sigma: float
    jump: float
    rise: float
    excess: float
    apart: float  # nats: largest difference between hybrid and MoBA while both are MoBA


def main() -> int:
    args = _arguments()
    quick: bool = args.quick
    setting = QUICK if quick else GPU if torch.cuda.is_available() else CPU
    steps = args.steps or setting.steps
    out = Path(args.out or f"runs/schedule_switch{'_quick' if quick else ''}").absolute()
    data = Path(args.data).absolute()
    if not (data / "dataset.json").exists():
        subprocess.run([sys.executable, "launch/prepare_data.py", "--output", str(data)], cwd=ROOT, check=True)
    common = _overrides(setting, steps, data) + args.overrides
    for arm, overrides in ARMS.items():
        _run_arm(out / arm, [*common, *overrides], steps, args.nproc)
    curves = {arm: read_curve(out / arm) for arm in ARMS}
    switch = around_switch(curves["hybrid"], curves["moba"])
    page = out / "results.md" if quick else Path(__file__).with_name("results.md")
    draw(curves, switch, page.with_suffix(".png"))
    page.write_text(write_page(curves, switch, _provenance(args, steps, common)))
    print(page.read_text(), f"written: {page}", sep="\n")
    return 0


def read_curve(folder: Path) -> Curve:
    """An arm's results from its metrics.jsonl."""
    records = read_metrics(folder)
    train = [record for record in records if "loss" in record]
    (*_, last) = (record for record in records if "validation_loss" in record)
    return Curve(
        losses={record["step"]: record["loss"] for record in train},
        validation=last["validation_loss"],
        eighths=last["validation_loss_by_position"],
        plans=[(record["step"], record["layer_plan"]) for record in train if "layer_plan" in record],
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in train),
    )


def around_switch(hybrid: Curve, moba: Curve) -> Switch:
    """Sizes of the loss's changes at the switch.

    With s the last MoBA step and L_t the training loss of step t: sigma is the sample standard deviation of
    L_t - L_(t-1) over t = s - W + 1 .. s; jump = L_(s+1) - L_s; rise = max of L_(s+1) .. L_(s+K) less the mean of
    L_(s-K+1) .. L_s; excess = max over the same K steps of hybrid's loss less MoBA's, which sees the same batches.
    """
    first = next(step for (_, old), (step, plan) in itertools.pairwise(hybrid.plans) if plan != old)
    losses, step = hybrid.losses, first - 1
    before = min(NOISE_STEPS, step - 1)
    after = min(AFTER_STEPS, max(losses) - step, step)
    sigma = statistics.stdev(losses[t] - losses[t - 1] for t in range(step - before + 1, step + 1))
    later = range(step + 1, step + after + 1)
    level = statistics.fmean(losses[t] for t in range(step - after + 1, step + 1))
    return Switch(
        step=step,
        before=before,
        after=after,
        sigma=sigma,
        jump=(losses[first] - losses[step]) / sigma,
        rise=(max(losses[t] for t in later) - level) / sigma,
        excess=max(losses[t] - moba.losses[t] for t in later) / sigma,
        apart=max(abs(losses[t] - moba.losses[t]) for t in range(1, step + 1)),
    )


def write_page(curves: dict[str, Curve], switch: Switch, provenance: str) -> str:
    """The results page in Markdown."""
    gap = curves["hybrid"].eighths[-1] - curves["full"].eighths[-1]
    largest = max(switch.jump, switch.rise, switch.excess)
    full, moba, hybrid = ([curves[arm].validation, *curves[arm].eighths] for arm in ("full", "moba", "hybrid"))
    after, sigmas = switch.after, "{:+.2f}".format
    parts = [
        "# MoBA, full attention, and MoBA that switches to full attention at nine tenths of training",
        provenance,
        _table(
            ["criterion", "measured", "at most", ""],
            [
                "hybrid less full in the last eighth of the context, nats per token",
                f"{gap:+.4f}",
                POSITION_BOUND,
                _verdict(gap, POSITION_BOUND),
            ],
            [
                "largest rise of the loss at the switch, sigmas",
                sigmas(largest),
                SPIKE_BOUND,
                _verdict(largest, SPIKE_BOUND),
            ],
        ),
        "## Validation loss after training, nats per token, whole and by eighths of the context",
        _table(
            ["arm", "all", *(f"{i}/{EIGHTHS}" for i in range(1, EIGHTHS + 1)), "tokens/s"],
            *(
                [arm, *(f"{loss:.4f}" for loss in losses), f"{curves[arm].tokens_per_second:,.0f}"]
                for arm, losses in (("full", full), ("moba", moba), ("hybrid", hybrid))
            ),
            *(
                [f"{arm} - full", *(f"{loss - base:+.4f}" for loss, base in zip(losses, full, strict=True)), ""]
                for arm, losses in (("moba", moba), ("hybrid", hybrid))
            ),
        ),
        "## The switch",
        _table(
            ["", "sigmas"],
            ["jump: first step of full attention less the step before it", sigmas(switch.jump)],
            [f"rise: highest of the first {after} full steps less the mean of the {after} before", sigmas(switch.rise)],
            [f"excess: highest of hybrid less MoBA on the same batch, of these {after} steps", sigmas(switch.excess)],
        ),
        f"One sigma is {switch.sigma:.4f} nats per token: the sample standard deviation of the changes of the hybrid's "
        f"training loss from step to step, L_t - L_(t-1), over its last {switch.before} steps of MoBA. The criterion "
        "takes the largest of the three. Jump and rise contain the difference between batches. Excess does not: both "
        "arms see the same batches from the same weights, and up to the last step before the switch, "
        f"step {switch.step}, their losses differ by at most {switch.apart:.2g} nats.",
        "![training loss, the same around the switch, and validation loss by position](results.png)",
    ]
    return "\n\n".join(parts) + "\n"


def draw(curves: dict[str, Curve], switch: Switch, path: Path) -> None:
    """Training loss of all arms, the same around the switch, and validation loss by position."""
    figure = Figure(figsize=(15, 4.2), layout="tight")
    whole, near, position = figure.subplots(1, 3)
    window = range(max(1, switch.step - 30), switch.step + 31)
    for arm, style in (("full", "-"), ("hybrid", "-"), ("moba", "--")):  # MoBA lies on the hybrid until the switch
        curve = curves[arm]
        for axes, steps in ((whole, curve.losses), (near, [t for t in window if t in curve.losses])):
            axes.plot(list(steps), [curve.losses[t] for t in steps], style, linewidth=1, label=arm)
        centres = [(i + 0.5) / EIGHTHS for i in range(EIGHTHS)]
        position.plot(centres, curve.eighths, f"o{style}", markersize=4, label=arm)
    for axes, title in ((whole, "training"), (near, "around the switch")):
        axes.axvline(switch.step + 0.5, color="0.4", linestyle="--", linewidth=0.8)
        axes.set(xlabel="step", ylabel="training loss (nats per token)", title=title)
    position.set(xlabel="position in the context", ylabel="validation loss (nats per token)", title="by position")
    for axes in (whole, near, position):
        axes.legend()
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    summary, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: does it work?")
    parser.add_argument("--steps", type=int, help="of each arm; the switch is at nine tenths")
    parser.add_argument("--out", help="of the runs (default: runs/schedule_switch)")
    parser.add_argument("--data", default="data/stdlib", help="prepared folder; prepared now if it is not there")
    parser.add_argument("--nproc", type=int, default=1, help="processes (on GPUs: one each) of an arm (default: 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given to every arm")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 20:
        parser.error("--steps must be at least 20: the last tenth is trained with full attention")
    return args


def _overrides(setting: Setting, steps: int, data: Path) -> list[str]:
    """What all arms share. Validation covers the whole split, with one document a row so that all positions count."""
    rows = math.ceil((dataset_info(data).valid.tokens - 1) / setting.sequence_length)
    return [
        "recipe=tiny",
        f"data.path={data}",
        "data.mode=concatenated",
        f"train.steps={steps}",
        f"train.sequence_length={setting.sequence_length}",
        f"train.global_batch_size={setting.batch}",
        "train.validate_every=0",
        f"train.validation_batches={math.ceil(rows / setting.batch)}",
        f"attention.block_size={setting.sequence_length // 16}",
        "attention.top_k=3",
        "attention.dense_last_layers=0",
        f"metrics.position_buckets={EIGHTHS}",
        f"checkpoint.save_every={max(1, steps // 4)}",
        "checkpoint.keep_last=1",
        *setting.overrides,
    ]


def _run_arm(folder: Path, overrides: list[str], steps: int, processes: int) -> None:
    """Train one arm to its end, unless that was done before."""
    record = folder / "arm.json"
    if record.exists() and (found := json.loads(record.read_text())) != overrides:
        other = ", ".join(sorted(set(found) ^ set(overrides)))
        raise SystemExit(f"{folder} was started with other settings ({other}): choose another --out, or delete it")
    if _finished(folder, steps):
        print(f"{folder.name}: finished before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(overrides, indent=1))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print(f"{folder.name}:", flush=True)
    subprocess.run([*launcher, "launch/pretrain.py", *overrides, f"run.dir={folder}"], cwd=ROOT, check=True)
    if not _finished(folder, steps):
        raise SystemExit(f"{folder.name} was stopped; the same command goes on")


def _finished(folder: Path, steps: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and any(r["step"] == steps and "validation_loss" in r for r in read_metrics(folder))


def _table(head: list[str], *rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _verdict(value: float, bound: float) -> str:
    return "met" if value <= bound else "not met"


def _provenance(args: argparse.Namespace, steps: int, overrides: list[str]) -> str:
    """Device, versions, command and settings, without the names of anybody's folders."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    given = ["--quick"] * args.quick + ([f"--steps {args.steps}"] if args.steps else []) + args.overrides
    command = " ".join(["python experiments/schedule_switch/run.py", *filter(_names_no_folder, given)])
    return "\n".join(
        [
            *(["**A quick run: it shows that the experiment works, and its numbers mean nothing.**", ""] * args.quick),
            f"`{command}`, {args.nproc} process(es) an arm",
            "",
            f"{devices.device_name()}; {versions}, Python {platform.python_version()}; {datetime.date.today()}. "
            f"{steps} steps. Data: the Python standard library's sources. All arms:",
            "",
            "```",
            *filter(_names_no_folder, overrides),
            "```",
        ]
    )


def _names_no_folder(override: str) -> bool:
    return not override.startswith(("data.path=", "data.cache_dir="))


if __name__ == "__main__":
    sys.exit(main())
