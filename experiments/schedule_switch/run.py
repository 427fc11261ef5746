"""Does MoBA for 90 % of training and full attention for the rest end where full attention ends?

    python -m experiments.schedule_switch.run [--quick] [--steps N] [--seeds K] [--out FOLDER] [key=value ...]

Pretrains one small GPT with full attention (`full`), with MoBA (`moba`), and with MoBA that switches to full attention
at nine tenths (`hybrid`), from the same weights and on the same batches; the same again for every further seed. All run
side by side. Then writes results.json, and from it README.md with a picture. A finished training is not run again, a
stopped one goes on from its last checkpoint. `--quick` shows in a minute or two that everything works; its numbers mean
nothing and are not put beside this file. `--page` writes the page again from results.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.common import Training, data_in_words, environment, prepared_long, train_all
from experiments.schedule_switch.page import EIGHTHS, publish, read_curve
from moba_train.config.arguments import argument_parser
from moba_train.data.info import dataset_info

ARMS = {"full": ["attention=full"], "moba": ["attention=moba"], "hybrid": ["attention=moba_then_full"]}
DATA = (
    "the Python sources of the standard library and of the packages installed, joined to long documents in path order"
)


@dataclass(frozen=True)
class Setting:
    """Model and training of one kind of device.

    at_once: trainings side by side; megabytes: of text, in documents of so many characters.
    """

    steps: int
    sequence_length: int
    batch: int
    block_size: int
    seeds: int
    at_once: int
    megabytes: float
    characters: int = 420_000
    overrides: tuple[str, ...] = ()


GPU = Setting(
    steps=6000,
    sequence_length=8192,
    batch=2,
    block_size=512,  # with top_k 3 the setting of the MoBA report's scaling study
    seeds=2,
    at_once=6,
    megabytes=128,
    overrides=(
        "precision=bf16",
        "model.num_layers=6",
        "model.hidden_size=256",
        "model.ffn_hidden_size=768",
        "model.head_dim=64",
        "optim.learning_rate=2e-3",
        "optim.min_learning_rate=2e-5",
        "optim.warmup_steps=200",
    ),
)
CPU = Setting(steps=400, sequence_length=1024, batch=4, block_size=32, seeds=1, at_once=2, megabytes=24)
QUICK = Setting(
    steps=40,
    sequence_length=256,
    batch=2,
    block_size=16,
    seeds=2,
    at_once=2,
    megabytes=2,
    characters=20_000,
    overrides=("model.hidden_size=32", "model.ffn_hidden_size=64", "model.head_dim=8", "optim.warmup_steps=4"),
)


def main() -> int:
    args = _arguments()
    setting = QUICK if args.quick else GPU if torch.cuda.is_available() else CPU
    out = Path(args.out or f"runs/schedule_switch{'_quick' if args.quick else ''}").absolute()
    page = out if args.quick else Path(__file__).parent
    if not args.page:
        steps, seeds = args.steps or setting.steps, args.seeds or setting.seeds
        data = prepared_long(args.data, setting.megabytes, setting.characters)
        common = [*_overrides(setting, steps, data), *args.overrides]
        trainings = {
            (arm, seed): Training(
                out / f"{arm}_seed_{seed}",
                "launch/pretrain.py",
                [
                    *common,
                    *overrides,
                    f"data.seed={1234 + seed}",
                    f"train.seed={1234 + seed}",
                    f"data.cache_dir={out / f'{arm}_seed_{seed}' / 'cache'}",  # of its own: all start at one time
                ],
                steps,
            )
            for seed, (arm, overrides) in itertools.product(range(seeds), ARMS.items())
        }
        train_all(list(trainings.values()), args.at_once or setting.at_once, args.nproc)
        results = {
            "environment": environment(
                [name for name in ("numpy", "transformers") if importlib.util.find_spec(name)],
                common,
                args.quick,
                data_in_words(DATA, data, args.data),
            ),
            "seeds": [
                {arm: dataclasses.asdict(read_curve(trainings[arm, seed].folder)) for arm in ARMS}
                for seed in range(seeds)
            ],
        }
        (page / "results.json").write_text(json.dumps(results) + "\n")
    publish(page)
    print((page / "README.md").read_text(), f"written: {page / 'README.md'}", sep="\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model and few steps: does it work?")
    add("--page", action="store_true", help="only write the page again")
    add("--steps", type=int, help="of each training; the switch is at nine tenths")
    add("--seeds", type=int, metavar="K", help="trainings of each kind (default: 2 on a GPU, 1 on a CPU)")
    add("--at-once", type=int, metavar="N", help="trainings side by side (default: 6 on a GPU, 2 on a CPU)")
    add("--out", help="of the runs (default: runs/schedule_switch)")
    add("--data", help="prepared folder; prepared now if it is not there (default: one below data/)")
    add("--nproc", type=int, default=1, metavar="N", help="processes (on GPUs: one each) of a training (default: 1)")
    add("overrides", nargs="*", metavar="key=value", help="given to every training")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 20:
        parser.error("--steps must be at least 20: the last tenth is trained with full attention")
    return args


def _overrides(setting: Setting, steps: int, data: Path) -> list[str]:
    """What all share. Validation covers the whole split, in rows of running text so that all positions count."""
    rows = math.ceil((dataset_info(data).valid.tokens - 1) / setting.sequence_length)
    return [
        "recipe=tiny",
        f"data.path={data}",
        "data.mode=concatenated",
        f"train.steps={steps}",
        f"train.sequence_length={setting.sequence_length}",
        f"train.global_batch_size={setting.batch}",
        f"train.validate_every={steps}",
        f"train.validation_batches={math.ceil(rows / setting.batch)}",
        f"attention.block_size={setting.block_size}",
        "attention.top_k=3",
        "attention.dense_last_layers=0",
        "optim.schedule=wsd",  # the decay begins at the switch: full attention is learned from the peak rate down
        f"optim.decay_steps={max(1, steps // 10)}",
        "metrics.gate_every=0",
        f"metrics.position_buckets={EIGHTHS}",
        f"checkpoint.save_every={max(1, steps // 4)}",
        "checkpoint.keep_last=1",
        *setting.overrides,
    ]


if __name__ == "__main__":
    sys.exit(main())
