#!/usr/bin/env python3
"""Let a model write: from a core checkpoint of any layout or a Hugging Face folder, in one process.

examples:
  python launch/generate.py runs/tiny --prompt 'def main(' --max-tokens 100
  python launch/generate.py models/SmolLM2 --chat --temperature 0.7 --top-p 0.9 --prompt 'Why is the sky blue?'
  cat book.txt | python launch/generate.py runs/8b/checkpoints/step_00001000 --decode full

Both kinds of source become the same model here, so both decode with cached block means. The prompt is encoded as
training text is, without a beginning token; --special-tokens adds what the tokenizer puts around a text.
"""

from __future__ import annotations

import argparse
import io
import os
import sys

from moba_train.config.arguments import argument_parser
from moba_train.config.compose import told
from moba_train.config.schema import ConfigError


def main() -> int:
    args = parse_arguments()
    if wrong := told(lambda: take_prompt(args)):
        return wrong
    # Not before the arguments are read: --help needs no torch.
    from moba_train import device

    device.quiet_imports()
    from moba_train.eval.text import GenerateArguments, generate_text

    given = {key: value for key, value in vars(args).items() if value is not None}
    try:
        return told(lambda: generate_text(GenerateArguments(**{**given, "overrides": tuple(args.overrides)})))
    except BrokenPipeError:  # the reader had enough; nothing more can be written, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def take_prompt(args: argparse.Namespace) -> int:
    """The prompt from the option or standard input, into `args`; ConfigError where it is not UTF-8."""
    try:
        if args.prompt is None:
            if sys.stdin.isatty():
                print("Reading the prompt from the terminal; end it with Ctrl-D.", file=sys.stderr)
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8", errors="strict")
            args.prompt = sys.stdin.read()
        args.prompt.encode()
    except UnicodeError as error:
        raise ConfigError("--prompt", args.prompt or "standard input", f"is not UTF-8 text ({error})") from None
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="a run folder, one of its step folders, or a Hugging Face folder")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the model's configuration to change")
    add("--prompt", metavar="TEXT", help="what to go on from (default: read from standard input)")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the tokenizer's chat template")
    add("--special-tokens", action="store_true", help="add the tokenizer's own, such as a beginning token")
    add("--tokenizer", metavar="DIR", help="of a run whose training data has gone (default: the model's)")
    add("--max-tokens", type=int, metavar="N", help="new tokens at most; an end token ends sooner (default: 256)")
    add("--temperature", type=float, metavar="T", help="0: always the likeliest token (default: 0)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: 0, all)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach P (default: 1, all)")
    add("--seed", type=int, metavar="N", help="of the draws (default: 1234)")
    add("--decode", metavar="KIND", help="what new tokens attend to: moba, by the layer plan (default), or full")
    add("--prefill-chunk", type=int, metavar="N", help="prompt tokens in flight at once (default: 8192)")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
