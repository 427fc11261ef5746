#!/usr/bin/env python3
"""Bring a Hugging Face folder in as a core checkpoint, and take a checkpoint out as a Hugging Face folder.

  python launch/convert.py hf-to-core models/Llama-3.2-1B runs/llama
      then train with model=llama3.2-1b checkpoint.load=runs/llama checkpoint.load_weights_only=true, in any layout
      (or leave this out and train with checkpoint.init_from_hf=models/Llama-3.2-1B)
  python launch/convert.py core-to-hf runs/llama-128k models/Llama-3.2-1B-128k
      a run folder (its latest checkpoint) or one step folder; the tokenizer comes along

Llama 2, 3, 3.1, 3.2, Mistral, Qwen2, Qwen2.5 and Qwen3; safetensors only: nothing of such a folder is ever unpickled.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from moba_train.config.arguments import argument_parser
from moba_train.config.schema import ConfigError


def main() -> int:
    args = parse_arguments()
    console = Console(stderr=True)
    try:
        # Imported late: megatron-core takes seconds, and --help should not.
        from moba_train import device

        device.quiet_imports()
        from moba_train.train.convert import core_to_hf, hf_to_core

        with console.status("reading") as status:
            if args.direction == "hf-to-core":
                done = hf_to_core(args.source, args.target, status.update)
            else:
                done = core_to_hf(args.source, args.target, args.shard_gigabytes * 1e9, status.update)
        table = Table(title=f"{done.folder}: {done.model.name}", title_justify="left", show_header=False)
        table.add_row("tensors", f"{done.tensors:,} ({done.bytes / 2**30:.2f} GiB)")
        table.add_row("rotary embedding", done.rope)
        table.add_row("files", ", ".join(done.files))
        for note in done.notes:
            table.add_row("note", note)
        console.print(table)
    except ConfigError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written")
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("direction", choices=("hf-to-core", "core-to-hf"))
    parser.add_argument("source", metavar="SRC", help="a Hugging Face folder; or a run folder or step folder")
    parser.add_argument("target", metavar="DST", help="the folder to make; refused where it holds something")
    parser.add_argument(
        "--shard-gigabytes",
        type=float,
        default=5.0,
        metavar="GB",
        help="core-to-hf, of a model that was not imported: largest weights file in 10^9 bytes (default: 5)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
