#!/usr/bin/env python3
"""A Hugging Face folder of the Llama-3.2-1B shape through everything: in, trained at 128K, out, and in again, equal.

    python -m experiments.roundtrip_1b.run [--quick] [--steps N] [--out FOLDER] [key=value ...]

Random weights in several shards, with the tokenizer of the prepared text. The folder is converted to a core checkpoint
and back (compared bit by bit), trained for a few steps in bf16 with MoBA (block 512, top 12, last layer full) and full
recomputation on one GPU, exported, and imported again: every tensor of the second checkpoint equals the first's. Prints
a page with a table and writes it to results.md in the run's folder. `--quick` does it with a tiny shape at 2K, on a CPU
in minutes. What is done is not done again; a folder begun with other settings is refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common import Training, data_in_words, environment, prepared, provenance, run, table
from moba_train.config.arguments import argument_parser

SHARD = "700MB"


@dataclass(frozen=True)
class Setting:
    """Shape of the model in config.json's words, and of the run."""

    shape: dict[str, int]
    length: int
    block_size: int
    overrides: tuple[str, ...] = ()


GPU = Setting(
    shape={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    length=131072,
    block_size=512,
)
QUICK = Setting(
    shape={
        "vocab_size": 5000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    length=2048,
    block_size=64,
)


def main() -> int:
    args = _arguments()
    setting = QUICK if args.quick else GPU
    out = Path(args.out or f"runs/roundtrip_1b{'_quick' if args.quick else ''}").absolute()
    data = prepared(args.data, ())
    training = _training(out, data, setting, args)
    training.prepare()
    from moba_train import device as devices

    devices.quiet_imports()
    from moba_train.train.convert import core_to_hf, hf_to_core
    from moba_train.train.metrics import read_metrics

    clock = _Clock()
    source, core, back, trained = out / "source", out / "core", out / "back", training.folder
    exported, again = out / "exported", out / "again"
    clock("folder written", lambda: _once(source, lambda: _write_source(source, setting, data)))
    clock("imported", lambda: _once(core, lambda: hf_to_core(source, core)))
    with ThreadPoolExecutor(1) as beside:  # the CPU's work, while the GPU trains
        way_back = beside.submit(lambda: _once(back, lambda: core_to_hf(core, back)))
        clock(f"trained at {setting.length:,}", lambda: _train(training))
        way_back.result()
    rows = [clock("imported and exported: equal", lambda: _compare_folders(source, back))]
    clock("exported", lambda: _once(exported, lambda: core_to_hf(trained, exported)))
    clock("imported again", lambda: _once(again, lambda: hf_to_core(exported, again)))
    rows.append(clock("trained, exported, imported: equal", lambda: _compare_checkpoints(trained, again)))
    rows.append(clock("trained weights differ from the source's", lambda: _count_changed(source, exported)))
    steps = [record for record in read_metrics(trained) if "loss" in record]
    last = steps[-1]
    rows += [
        ("steps", len(steps)),
        ("loss", ", ".join(f"{record['loss']:.4f}" for record in steps)),
        ("gradient norm", ", ".join(f"{record['grad_norm']:.3f}" for record in steps)),
        ("layers", next(record["layer_plan"] for record in steps if "layer_plan" in record)),
        ("tokens/s, last step", f"{last['tokens_per_second']:,.0f}"),
        ("TFLOP/s, last step (model FLOPs)", f"{last['tflops_per_gpu']:.0f}"),
        ("peak memory, GiB", f"{last['memory_gib']:.1f}"),
        *((f"seconds: {name}", f"{seconds:.0f}") for name, seconds in clock.seconds.items()),
    ]
    shape = "A tiny" if args.quick else "The 1B"
    title = f"# {shape} shape: imported, trained at {setting.length:,}, exported, imported again"
    words = data_in_words("the sources of the Python standard library", data, args.data)
    told = environment((), training.overrides, args.quick, words)
    page = "\n\n".join([title, *provenance(told), table(["", ""], *rows)])
    (out / "results.md").write_text(page + "\n", encoding="utf-8")
    print(page)
    return 0


class _Clock:
    """Says what is done and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, action: Callable[[], Any]) -> tuple[str, Any]:
        start = time.perf_counter()
        result = action()
        self.seconds[name] = time.perf_counter() - start
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)
        return name, result


def _once(folder: Path, action: Callable[[], Any]) -> None:
    if not folder.exists():
        action()


def _write_source(folder: Path, setting: Setting, data: Path) -> None:
    """Random weights in bf16, made on the GPU where there is one, with the data's tokenizer; whole or not at all."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(
        {
            **setting.shape,
            "max_position_embeddings": setting.length,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
        }
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model = model.bfloat16()
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial, max_shard_size=SHARD if setting is GPU else "300KB")
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(partial)
    partial.rename(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _train(training: Training) -> None:
    if not training.finished:
        run(training.command[1:])
    if not training.finished:
        raise SystemExit("stopped; the same command goes on")


def _training(out: Path, data: Path, setting: Setting, args: argparse.Namespace) -> Training:
    """The run below `out`. Its settings say everything about the rest too: shape, length and places."""
    names = {
        "num_layers": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        **{name: name for name in setting.shape if name not in ("num_hidden_layers", "intermediate_size")},
    }
    return Training(
        out / "run",
        "launch/pretrain.py",
        [
            "recipe=8k",
            *(f"model.{ours}={setting.shape[theirs]}" for ours, theirs in names.items()),
            "model.rope_scaling={rope_type: default, factor: null, low_freq_factor: null, high_freq_factor: null, "
            "original_max_position_embeddings: null}",
            "model.rope_base=500000",
            f"model.max_position_embeddings={setting.length}",
            f"checkpoint.load={out / 'core'}",
            "checkpoint.load_weights_only=true",
            f"data.path={data}",
            "data.mode=concatenated",
            f"train.steps={args.steps}",
            f"train.sequence_length={setting.length}",
            "train.global_batch_size=1",
            "train.validate_every=0",
            "train.validation_batches=1",
            f"attention.block_size={setting.block_size}",
            "attention.top_k=12",
            "parallel.recompute=full",
            "optim.warmup_steps=0",
            "checkpoint.save_every=0",
            *args.overrides,
        ],
        args.steps,
    )


def _compare_folders(one: Path, other: Path) -> str:
    """How many tensors of two Hugging Face folders are equal in every bit; an error where one is not."""
    from moba_train.model.hf_folder import load_hf_folder

    (_, ours), (_, theirs) = load_hf_folder(one), load_hf_folder(other)
    if ours.infos != theirs.infos:  # shards too
        raise SystemExit(f"{one} and {other} hold other tensors")
    for name in ours.infos:
        if not _same_bits(ours.read(name), theirs.read(name)):
            raise SystemExit(f"{name} differs between {one} and {other}")
    shards = len({info.file for info in ours.infos.values()})
    return f"{len(ours.infos)} tensors in {shards} shards, bit by bit"


def _compare_checkpoints(one: Path, other: Path) -> str:
    """How many core tensors of two runs' latest checkpoints are equal in every bit."""
    from moba_train.config.schema import ModelConfig, from_dict
    from moba_train.model.convert_hf import rules
    from moba_train.train.checkpoint_folder import locate, read_metadata
    from moba_train.train.core_weights import CoreWeights

    steps = [locate(folder, "run") for folder in (one, other)]
    model = from_dict(read_metadata(steps[0]).config["model"], ModelConfig)
    ours, theirs = (CoreWeights(step) for step in steps)
    compared = 0
    for rule in rules(model):
        for layer in range(model.num_layers if rule.per_layer else 1):
            if not _same_bits(ours.read(rule, layer), theirs.read(rule, layer)):
                raise SystemExit(f"{rule.core} of layer {layer} differs between {one} and {other}")
            compared += 1
    return f"{compared} core tensors, bit by bit"


def _count_changed(source: Path, exported: Path) -> str:
    from moba_train.model.hf_folder import load_hf_folder

    (_, before), (_, after) = load_hf_folder(source), load_hf_folder(exported)
    changed = sum(not _same_bits(before.read(name), after.read(name)) for name in before.infos)
    return f"{changed} of {len(before.infos)} tensors"


def _same_bits(one: Any, other: Any) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny shape at 2K: does it work?")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="of training (default: 3)")
    parser.add_argument("--out", metavar="DIR", help="of everything (default: runs/roundtrip_1b)")
    parser.add_argument(
        "--data", metavar="DIR", help="prepared folder; prepared now if not there (default: data/stdlib)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
