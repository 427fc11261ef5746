#!/usr/bin/env python3
"""Turn text into a folder that training reads: tokens, tokenizer and dataset.json.

examples:
  python launch/prepare_data.py --output data/stdlib
      the Python standard library's own sources, with a byte-level BPE trained on them
  python launch/prepare_data.py --output data/books --input books/ --suffix .txt
  python launch/prepare_data.py --output data/web --input 'web/**/*.jsonl' --text-key content --tokenizer models/llama/
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moba_train.config.arguments import argument_parser
from moba_train.config.schema import ConfigError
from moba_train.data.info import DatasetInfo, PrepareArguments, already_prepared


def main() -> int:
    args = parse_arguments()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave nothing half-made then either
    try:
        arguments = PrepareArguments(
            output=args.output,
            inputs=tuple(os.path.abspath(given) if given else given for given in args.input),
            suffixes=tuple(args.suffix),
            text_key=args.text_key,
            tokenizer=None if args.tokenizer is None else os.path.abspath(args.tokenizer),
            eod_token=args.eod_token,
            vocab_size=args.vocab_size,
            valid_fraction=args.valid_fraction,
            max_megabytes=args.max_megabytes,
        )
        if already_prepared(arguments, args.overwrite) is not None:
            console.print(f"{args.output}: already prepared")
            return 0
        # Imported late: megatron-core takes seconds, and --help should not.
        from moba_train import device

        device.quiet_imports()
        from moba_train.data.prepare import prepare

        with progress_bar(console) as bar:
            task = bar.add_task("reading", total=None)

            def show(stage: str, done: int, total: int) -> None:
                bar.update(task, description=stage, completed=done, total=total or None)

            info = prepare(arguments, overwrite=args.overwrite, progress=show)
        console.print(summary(args.output, info))
    except ConfigError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written")
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="the folder to make; refused where it holds something else")
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, folders or quoted globs: plain text (a document a file), .jsonl (a line), .parquet (a row); "
        "none: the Python standard library's sources",
    )
    add("--suffix", nargs="+", default=[], metavar=".EXT", help="of folders and globs, only files with these endings")
    add("--text-key", default="text", metavar="KEY", help="of JSONL and Parquet, the text's key (default: text)")
    add("--tokenizer", metavar="PATH", help="a tokenizer.json or a pretrained folder; none: train a byte-level BPE")
    add("--eod-token", metavar="TOKEN", help="with --tokenizer: the end-of-document token (default: its eos_token)")
    add("--vocab-size", type=int, default=4096, metavar="N", help="of a trained tokenizer (default: 4096)")
    add(
        "--valid-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="of documents for validation, chosen by a hash of their text (default: 0.05)",
    )
    add(
        "--max-megabytes", type=float, metavar="MB", help="stop after this much text, in 10^6 bytes and whole documents"
    )
    add("--overwrite", action="store_true", help="replace a folder that was prepared with other arguments")
    return parser.parse_args()


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def summary(output: str, info: DatasetInfo) -> Table:
    table = Table(title=f"{output}: {info.sources}", title_justify="left")
    for column in ("split", "documents", "MB of text", "tokens", "bytes/token"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, split in (("train", info.train), ("valid", info.valid)):
        ratio = split.bytes / split.tokens
        table.add_row(name, f"{split.documents:,}", f"{split.bytes / 1e6:.2f}", f"{split.tokens:,}", f"{ratio:.2f}")
    notes = [
        f"vocabulary {info.vocab_size:,}, documents end with {info.eod_token} ({info.eod_id})",
        f"validation loss of a unigram model: {info.unigram_loss_per_byte:.3f} nats a byte "
        f"({info.byte_unigram_loss_per_byte:.3f} over bytes)",
    ]
    if info.pad_id is None:
        notes.append("the tokenizer has no pad token of its own (none, or the same as its end token): none is used")
    if info.skipped_files or info.skipped_texts:
        notes.append(f"skipped: {info.skipped_files} files that are not UTF-8, {info.skipped_texts} empty (null) texts")
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    sys.exit(main())
