"""With few loss tokens, how many full layers at the end does a MoBA model need to learn as a full one does?

    python experiments/sparse_loss_sft/run.py [--quick] [--hf FOLDER] [--layers 0 1 2 4] [key=value ...]

Pretrains one small MoBA model on the Python standard library's sources (or takes `--hf`'s), makes chat rows with
about 1 % loss tokens (build.py), and fine-tunes the same checkpoint on the same rows with the last 0, 1, 2, 4, ... and
all layers full. Then writes a page and a picture. A finished arm is not run again, a stopped one goes on from its last
checkpoint. `--quick` shows in a few minutes that everything works; its numbers mean nothing.
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
from moba_train.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
GAP_BOUND = 0.9  # of the gap between no full layer and all, closed by half of them


@dataclass(frozen=True)
class Setting:
    """Model, context, and lengths of the runs of one kind of device. characters: of a source document in a row."""

    pretrain_steps: int
    steps: int
    sequence_length: int
    characters: int
    block_size: int
    batch: int
    rows: int = 4000
    overrides: tuple[str, ...] = ()


GPU = Setting(
    pretrain_steps=3000,
    steps=600,
    sequence_length=8192,
    characters=22000,
    block_size=256,
    batch=8,
    overrides=(
        "precision=bf16",
        "model.num_layers=8",
        "model.hidden_size=512",
        "model.ffn_hidden_size=1536",
        "model.head_dim=64",
        "model.num_attention_heads=8",
        "model.num_key_value_heads=4",
    ),
)
CPU = Setting(pretrain_steps=800, steps=200, sequence_length=1024, characters=2400, block_size=64, batch=4)
QUICK = Setting(
    pretrain_steps=6,
    steps=4,
    sequence_length=512,
    characters=1000,
    block_size=32,
    batch=2,
    rows=60,
    overrides=("model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=8", "optim.warmup_steps=1"),
)


@dataclass(frozen=True)
class Arm:
    """One fine-tuning with the last `layers` layers full. density: of each layer, if it was measured."""

    layers: int
    seed: int
    validation: float
    losses: list[tuple[int, float]]
    density: list[float] | None


def main() -> int:
    args = _arguments()
    setting = QUICK if args.quick else GPU if torch.cuda.is_available() else CPU
    out = Path(args.out or f"runs/sparse_loss_sft{'_quick' if args.quick else ''}").absolute()
    questions = _questions(out / "questions", setting)
    common = [*_shape(setting, own_model=args.hf is None), *args.overrides]
    start, depth = _hf_start(args.hf) if args.hf else _pretrained(args, setting, out / "pretrained", common)
    steps = args.steps or setting.steps
    arms = []
    for layers, seed in itertools.product(args.layers or _doublings(depth), range(args.seeds)):
        overrides = [
            "recipe=sft_tiny",
            f"sft.path={questions / 'train.jsonl'}",
            f"sft.valid_path={questions / 'valid.jsonl'}",
            *start,
            f"attention.dense_last_layers={layers}",
            f"metrics.gate_every={max(1, steps // 2)}",
            f"data.seed={1234 + seed}",
            f"train.steps={steps}",
            "train.validation_batches=64",
            f"train.validate_every={max(1, steps // 4)}",
            f"checkpoint.save_every={max(1, steps // 2)}",
            *common,
        ]
        folder = out / f"full_{layers}_seed_{seed}"
        _train_once("launch/sft.py", folder, overrides, steps, args.nproc)
        arms.append(read_arm(folder, layers, seed))
    page = out / "results.md" if args.quick else Path(__file__).with_name("results.md")
    draw(arms, page.with_suffix(".png"))
    page.write_text(write_page(arms, depth, _provenance(setting, common, args.quick)))
    print(page.read_text(), f"written: {page}", sep="\n")
    return 0


def read_arm(folder: Path, layers: int, seed: int) -> Arm:
    """An arm's results from its metrics.jsonl."""
    records = read_metrics(folder)
    density: list[list[float]] = [r["gradient_density/positions"] for r in records if "gradient_density/positions" in r]
    return Arm(
        layers=layers,
        seed=seed,
        validation=next(r["validation_loss"] for r in reversed(records) if "validation_loss" in r),
        losses=[(r["step"], r["loss"]) for r in records if "loss" in r],
        density=density[-1] if density else None,
    )


def mean_losses(arms: list[Arm]) -> dict[int, tuple[float, float]]:
    """Final validation loss by number of full layers: mean over seeds, and its standard error (nan of one seed)."""
    found = {}
    for layers in sorted({arm.layers for arm in arms}):
        values = [arm.validation for arm in arms if arm.layers == layers]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        found[layers] = (statistics.fmean(values), error)
    return found


def gap_closed(losses: dict[int, tuple[float, float]], layers: int) -> float:
    """(loss of none - loss of `layers`) / (loss of none - loss of all); nan where there is no gap to close."""
    first, last = losses[min(losses)][0], losses[max(losses)][0]
    return (first - losses[layers][0]) / (first - last) if first > last else math.nan


def write_page(arms: list[Arm], depth: int, provenance: str) -> str:
    """The results page in Markdown."""
    losses = mean_losses(arms)
    half = max((layers for layers in losses if layers <= depth // 2), default=0)
    closed = gap_closed(losses, half)
    falls = all(b <= a for (a, _), (b, _) in itertools.pairwise(losses.values()))
    density = {arm.layers: arm.density for arm in arms if arm.density is not None}
    head = ["full layers at the end", "validation loss, nats per loss token", "standard error", "gap closed"]
    parts = [
        "# Full layers at the end, for fine-tuning with few loss tokens",
        provenance,
        _table(
            ["criterion", "measured", "asked", ""],
            ["loss falls with every full layer added", "yes" if falls else "no", "yes", "met" if falls else "not met"],
            [
                f"share of the gap closed by {half} of {depth} layers",
                f"{closed:.2f}",
                f">= {GAP_BOUND}",
                "met" if closed >= GAP_BOUND else "not met",
            ],
        ),
        _table(
            [*head, *(["mean gradient density"] if density else [])],
            *(
                [
                    layers,
                    f"{mean:.4f}",
                    "" if math.isnan(error) else f"{error:.4f}",
                    f"{gap_closed(losses, layers):.2f}",
                    *([_mean(density.get(layers))] if density else []),
                ]
                for layers, (mean, error) in losses.items()
            ),
        ),
    ]
    if density:
        rows = [[layers, *(f"{share:.3f}" for share in shares)] for layers, shares in sorted(density.items())]
        parts += [
            "## Gradient density of each layer: the share of positions that the loss tokens reach",
            _table(["full layers", *range(depth)], *rows),
        ]
    parts.append("![validation loss by number of full layers, training loss](results.png)")
    return "\n\n".join(parts) + "\n"


def draw(arms: list[Arm], path: Path) -> None:
    """Final validation loss by number of full layers, and the training losses, smoothed over a tenth of the run."""
    figure = Figure(figsize=(11, 4.2), layout="tight")
    final, training = figure.subplots(1, 2)
    losses = mean_losses(arms)
    final.errorbar(
        list(losses), [m for m, _ in losses.values()], [0 if math.isnan(e) else e for _, e in losses.values()], fmt="o-"
    )
    final.set(xlabel="full layers at the end", ylabel="validation loss (nats per loss token)")
    for arm in (arm for arm in arms if arm.seed == 0):
        steps, values = zip(*arm.losses, strict=True)
        window = max(1, len(values) // 10)
        smooth = [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]
        training.plot(steps, smooth, linewidth=1, label=f"{arm.layers} full")
    training.set(xlabel="step", ylabel="training loss (nats per loss token)")
    training.legend()
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    summary, _, text = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model and few steps: does it work?")
    add("--hf", metavar="FOLDER", help="fine-tune this Hugging Face folder's model, with its tokenizer and template")
    add("--layers", type=int, nargs="+", metavar="N", help="numbers of full layers (default: 0, 1, 2, 4, ..., all)")
    add("--seeds", type=int, default=1, metavar="K", help="orders of the data for each number (default: 1)")
    add("--steps", type=int, help="of each fine-tuning")
    add("--out", help="of the runs (default: runs/sparse_loss_sft)")
    add("--data", default="data/stdlib", help="prepared folder; prepared now if it is not there")
    add("--nproc", type=int, default=1, help="processes (on GPUs: one each) of an arm (default: 1)")
    add("overrides", nargs="*", metavar="key=value", help="given to the pretraining and to every arm")
    return parser.parse_args()


def _pretrained(args: argparse.Namespace, setting: Setting, folder: Path, common: list[str]) -> tuple[list[str], int]:
    """Pretrain the small model, unless that was done before: what its fine-tuning starts from, and its layers."""
    data = Path(args.data).absolute()
    if not (data / "dataset.json").exists():
        _run([sys.executable, "launch/prepare_data.py", "--output", str(data)])
    steps = setting.pretrain_steps
    overrides = [
        "recipe=tiny",
        f"data.path={data}",
        f"train.steps={steps}",
        f"checkpoint.save_every={max(1, steps // 4)}",
        "attention.dense_last_layers=0",
        *common,
    ]
    _train_once("launch/pretrain.py", folder, overrides, steps, args.nproc)
    (*_, record) = sorted(folder.rglob("moba_train.json"))
    depth = int(json.loads(record.read_text())["config"]["model"]["num_layers"])
    load = [f"checkpoint.load={folder}", "checkpoint.load_weights_only=true"]
    return [*load, f"sft.tokenizer={data / 'tokenizer'}"], depth


def _hf_start(folder: str) -> tuple[list[str], int]:
    """What fine-tuning of a Hugging Face folder starts from, and its layers."""
    place = Path(folder).absolute()
    depth = int(json.loads((place / "config.json").read_text())["num_hidden_layers"])
    return [f"checkpoint.init_from_hf={place}", f"sft.tokenizer={place}"], depth


def _shape(setting: Setting, own_model: bool) -> list[str]:
    """What pretraining and all arms share. A model of one's own also has its shape here."""
    overrides = [key for key in setting.overrides if own_model or not key.startswith("model.")]
    return [
        f"train.sequence_length={setting.sequence_length}",
        f"train.global_batch_size={setting.batch}",
        "attention.pattern=moba",
        f"attention.block_size={setting.block_size}",
        "attention.top_k=3",
        "checkpoint.keep_last=1",
        *overrides,
    ]


def _questions(folder: Path, setting: Setting) -> Path:
    """The chat rows, made once."""
    if not (folder / "valid.jsonl").exists():
        size = ["--characters", str(setting.characters), "--rows", str(setting.rows)]
        _run([sys.executable, "experiments/sparse_loss_sft/build.py", "--output", str(folder), *size])
    return folder


def _doublings(depth: int) -> list[int]:
    """0, 1, 2, 4, ..., and half and all of the layers."""
    powers = itertools.takewhile(lambda n: n < depth, (2**i for i in range(depth)))
    return sorted({0, *powers, depth // 2, depth})


def _train_once(script: str, folder: Path, overrides: list[str], steps: int, processes: int) -> None:
    """Train one arm to its end, unless that was done before."""
    record = folder / "arm.json"
    if record.exists() and (found := json.loads(record.read_text())) != overrides:
        other = ", ".join(sorted(set(found) ^ set(overrides)))
        raise SystemExit(f"{folder} was started with other settings ({other}): choose another --out, or delete it")
    if (folder / "metrics.jsonl").exists() and steps in [
        r["step"] for r in read_metrics(folder) if "validation_loss" in r
    ]:
        print(f"{folder.name}: finished before", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(overrides, indent=1))
    print(f"{folder.name}:", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    _run([*launcher, script, *overrides, f"run.dir={folder}"])


def _run(command: list[str]) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _table(head: list[Any], *rows: list[Any]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _mean(values: list[float] | None) -> str:
    return "" if not values else f"{statistics.fmean(values):.3f}"


def _provenance(setting: Setting, overrides: list[str], quick: bool) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    return "\n".join(
        [
            *(["**A quick run: it shows that the experiment works, and its numbers mean nothing.**", ""] * quick),
            f"`{' '.join(['python experiments/sparse_loss_sft/run.py', *sys.argv[1:]])}`",
            "",
            f"{devices.device_name()}; {versions}, Python {platform.python_version()}; {datetime.date.today()}. "
            f"Documents of up to {setting.characters:,} characters. Pretraining and all arms:",
            "",
            "```",
            *overrides,
            "```",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
