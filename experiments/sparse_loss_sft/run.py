"""With few loss tokens, how many full layers at the end does a MoBA model need to learn as a full one does?

    python -m experiments.sparse_loss_sft.run [--quick] [--hf FOLDER] [--layers 0 1 2 4] [key=value ...]

Pretrains one small MoBA model on Python sources (or takes `--hf`'s), makes chat rows with about 1 % loss tokens
(build.py: questions about a long piece of source code), and fine-tunes the same checkpoint on the same rows in the same
order with the last 0, 1, 2, 4, ..., half and all layers full. Then writes results_NAME.json, and README.md with
pictures from all of these beside it. A finished training is not run again, a stopped one goes on from its last
checkpoint. `--quick` shows in a few minutes that everything works; its numbers mean nothing and are not put beside
this file. `--page` writes the page again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.common import Training, environment, inputs, prepared, run, train_all
from experiments.sparse_loss_sft.page import OWN, publish, read_arm
from moba_train import device as devices
from moba_train.config.arguments import argument_parser
from moba_train.config.compose import compose


@dataclass(frozen=True)
class Setting:
    """Lengths and model of one kind of device. characters: of a source document in a row.

    at_once: fine-tunings side by side; packages: whose sources are read. `overrides` are of all trainings,
    `pretraining` and `tuning` of one kind.
    """

    steps: int
    sequence_length: int
    characters: int
    block_size: int
    batch: int
    seeds: int
    at_once: int
    rows: int = 4000
    pretrain_steps: int = 0
    packages: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()


GPU = Setting(
    pretrain_steps=1000,
    steps=200,
    sequence_length=8192,
    characters=12000,
    block_size=64,
    batch=4,
    seeds=2,
    at_once=10,
    packages=("torch", "numpy"),
    overrides=(
        "precision=bf16",
        "model.num_layers=8",
        "model.hidden_size=256",
        "model.ffn_hidden_size=768",
        "model.head_dim=64",
    ),
    pretraining=(
        "train.global_batch_size=2",
        "optim.learning_rate=2e-3",
        "optim.min_learning_rate=2e-4",
        "optim.warmup_steps=40",
    ),
)
GPU_HF = Setting(
    steps=60,
    sequence_length=8192,
    characters=22000,
    block_size=128,
    batch=4,
    seeds=1,
    at_once=5,
    packages=("torch", "numpy"),
    overrides=("precision=bf16",),
    tuning=("optim.learning_rate=3e-4", "optim.min_learning_rate=3e-5", "optim.warmup_steps=5"),
)
CPU = Setting(
    pretrain_steps=800,
    steps=200,
    sequence_length=2048,
    characters=5600,
    block_size=32,
    batch=4,
    seeds=1,
    at_once=2,
)
QUICK = Setting(
    pretrain_steps=6,
    steps=4,
    sequence_length=512,
    characters=1000,
    block_size=32,
    batch=2,
    seeds=1,
    at_once=2,
    rows=60,
    overrides=("model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=8", "optim.warmup_steps=1"),
)
QUICK_HF = dataclasses.replace(QUICK, pretrain_steps=0, overrides=("optim.warmup_steps=1",))


def main() -> int:
    args = _arguments()
    out = Path(args.out or f"runs/sparse_loss_sft{'_quick' if args.quick else ''}").absolute()
    page = out if args.quick else Path(__file__).parent
    if not args.page:
        results = train(args, out)
        (page / f"results_{results['name']}.json").write_text(json.dumps(results) + "\n")
    publish(page)
    print((page / "README.md").read_text(), f"written: {page / 'README.md'}", sep="\n")
    return 0


def train(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """All trainings of one start: what results_NAME.json holds."""
    devices.quiet_imports()
    from moba_train.train.setup import preflight

    setting = _setting(args)
    name = Path(args.hf).absolute().name if args.hf else OWN
    questions = _questions(out / f"questions_{setting.characters}", setting)
    common = [*_common(setting), *args.overrides]
    start, depth = _hf_start(args.hf) if args.hf else _pretrained(args, setting, out / "pretrained", common)
    steps = args.steps or setting.steps
    # The first 64 or so rows: few loss tokens each, so many rows for a mean that can be told apart.
    tuning = [
        f"train.steps={steps}",
        f"train.validation_batches={max(1, 64 // setting.batch)}",
        f"train.validate_every={steps}",
        f"metrics.gate_every={steps}",
        f"checkpoint.save_every={max(1, steps // 2)}",
        *common,
        *setting.tuning,
    ]
    trainings = {
        (layers, seed): Training(
            out / f"{name}_full_{layers}_seed_{seed}",
            "launch/sft.py",
            [
                "recipe=sft_tiny",
                f"sft.path={questions / 'train.jsonl'}",
                f"sft.valid_path={questions / 'valid.jsonl'}",
                *start,
                *tuning,
                f"attention.dense_last_layers={layers}",
                f"data.seed={1234 + seed}",
            ],
            steps,
        )
        for seed, layers in itertools.product(range(args.seeds or setting.seeds), args.layers or _doublings(depth))
    }
    preflight(compose(next(iter(trainings.values())).overrides))  # tokenises the rows, once for all
    train_all(list(trainings.values()), args.at_once or setting.at_once, args.nproc)
    return {
        "name": name,
        "depth": depth,
        "characters": setting.characters,
        "pretrain_steps": (args.pretrain_steps or setting.pretrain_steps) if name == OWN else 0,
        "environment": environment(setting.packages, tuning, args.quick, _other_data(args, setting.packages)),
        "arms": [dataclasses.asdict(read_arm(each.folder, *key)) for key, each in trainings.items()],
    }


def _other_data(args: argparse.Namespace, packages: Sequence[str]) -> str | None:
    """For the page: the data, where the small model was pretrained on another folder than the questions' sources."""
    if args.hf or not args.data:
        return None
    sources = ", ".join(packages) or "the standard library"
    return f"questions on the Python sources of {sources}, pretraining on the folder {Path(args.data).name}"


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model and few steps: does it work?")
    add("--page", action="store_true", help="only write the page again")
    add("--hf", metavar="FOLDER", help="fine-tune this Hugging Face folder's model, with its tokenizer and template")
    add("--layers", type=int, nargs="+", metavar="N", help="numbers of full layers (default: 0, 1, 2, 4, ..., all)")
    add("--seeds", type=int, metavar="K", help="orders of the data for each number")
    add("--steps", type=int, help="of each fine-tuning")
    add("--pretrain-steps", type=int, metavar="N", help="of the small model")
    add("--at-once", type=int, metavar="N", help="fine-tunings side by side")
    add("--out", help="of the runs (default: runs/sparse_loss_sft)")
    add("--data", help="prepared folder; prepared now if it is not there (default: one below data/)")
    add("--nproc", type=int, default=1, metavar="N", help="processes (on GPUs: one each) of a training (default: 1)")
    add("overrides", nargs="*", metavar="key=value", help="given to every training")
    return parser.parse_args()


def _setting(args: argparse.Namespace) -> Setting:
    if args.quick:
        return QUICK_HF if args.hf else QUICK
    if torch.cuda.is_available():
        return GPU_HF if args.hf else GPU
    if args.hf:
        raise SystemExit("--hf needs a GPU (or --quick): its model is too large for a CPU")
    return CPU


def _pretrained(args: argparse.Namespace, setting: Setting, folder: Path, common: list[str]) -> tuple[list[str], int]:
    """Pretrain the small model, unless that was done before: what its fine-tuning starts from, and its layers."""
    data = prepared(args.data, setting.packages)
    steps = args.pretrain_steps or setting.pretrain_steps
    overrides = [
        "recipe=tiny",
        f"data.path={data}",
        f"data.cache_dir={folder / 'cache'}",
        f"train.steps={steps}",
        f"train.validate_every={steps}",
        "metrics.gate_every=0",
        f"checkpoint.save_every={max(1, steps // 4)}",
        "attention.dense_last_layers=0",
        *common,
        *setting.pretraining,
    ]
    train_all([Training(folder, "launch/pretrain.py", overrides, steps)], 1, args.nproc)
    load = [f"checkpoint.load={folder}", "checkpoint.load_weights_only=true"]
    return [*load, f"sft.tokenizer={data / 'tokenizer'}"], compose(overrides).model.num_layers


def _hf_start(folder: str) -> tuple[list[str], int]:
    """What fine-tuning of a Hugging Face folder starts from, and its layers."""
    place = Path(folder).absolute()
    depth = int(json.loads((place / "config.json").read_text())["num_hidden_layers"])
    return [f"checkpoint.init_from_hf={place}", f"sft.tokenizer={place}"], depth


def _common(setting: Setting) -> list[str]:
    """What pretraining and fine-tuning share."""
    return [
        f"train.sequence_length={setting.sequence_length}",
        f"train.global_batch_size={setting.batch}",
        "attention.pattern=moba",
        f"attention.block_size={setting.block_size}",
        "attention.top_k=3",
        "checkpoint.keep_last=1",
        *setting.overrides,
    ]


def _questions(folder: Path, setting: Setting) -> Path:
    """The chat rows, made once. What is held out is held out from pretraining too: by hash, the same 5 %."""
    if not (folder / "valid.jsonl").exists():
        size = ["--characters", str(setting.characters), "--rows", str(setting.rows), "--valid-fraction", "0.05"]
        run(["experiments/sparse_loss_sft/build.py", "--output", folder, *size, *inputs(setting.packages)])
    return folder


def _doublings(depth: int) -> list[int]:
    """0, 1, 2, 4, ..., and half and all of the layers."""
    powers = itertools.takewhile(lambda n: n < depth // 2, (2**i for i in range(depth)))
    return sorted({0, *powers, depth // 2, depth})


if __name__ == "__main__":
    sys.exit(main())
