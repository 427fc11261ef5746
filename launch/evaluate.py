#!/usr/bin/env python3
"""Look at a model's long context: loss by position, and a passkey hidden at several depths of several lengths.

examples:
  python launch/evaluate.py runs/tiny --output evaluation/tiny --lengths 512,1024
  torchrun --nproc-per-node 8 launch/evaluate.py runs/8b --output evaluation/8b --lengths 131072 \\
      parallel.context=8
  python launch/evaluate.py models/SmolLM2 --data data/smol --output evaluation/smol --lengths 8192,16384 \\
      model.rope_scaling.rope_type=linear model.rope_scaling.factor=2

Both measures are forward passes and run under data, context and tensor parallelism (parallel.context=,
parallel.tensor=; what is left over is data parallel). Any key=value of the model's configuration can be changed: RoPE
scaling for lengths beyond training, attention.pattern=full to compare with full attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from moba_train.config.arguments import argument_parser
from moba_train.config.compose import told


def main() -> int:
    args = parse_arguments()
    # Not before the arguments are read: --help needs no torch.
    from moba_train import device

    device.quiet_imports()
    from moba_train.eval.evaluate import EvaluateArguments, evaluate

    given = {key: value for key, value in vars(args).items() if value is not None}
    return told(lambda: evaluate(EvaluateArguments(**{**given, "overrides": tuple(args.overrides)})))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", help="a run folder, one of its step folders, or a Hugging Face folder")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the model's configuration to change")
    add("--output", required=True, metavar="DIR", help="folder for evaluation.json and pictures")
    add("--data", metavar="DIR", help="prepared folder with the validation documents (default: the training data's)")
    add("--tasks", type=_list(str), metavar="A,B", help="position, passkey (default: both)")
    add("--lengths", type=_list(int), metavar="N,N", help="tokens (default: the length the model was made for)")
    add("--depths", type=_list(float), metavar="F,F", help="of the passkey, 0 to 1 (default: 0,0.25,0.5,0.75,1)")
    add("--samples", type=int, metavar="N", help="passkeys per length and depth (default: 4)")
    add("--distractors", type=int, metavar="N", help="other numbers each passkey is compared with (default: 3)")
    add("--documents", type=int, metavar="N", help="at most, for loss by position (default: 64)")
    add("--buckets", type=int, metavar="N", help="of loss by position (default: 16)")
    add("--context", type=int, metavar="N", help="loss by position also from the last N tokens of context alone")
    add("--seed", type=int, metavar="N", help="of filler and passkeys (default: 1234)")
    return parser.parse_intermixed_args()


def _list(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"{kind.__name__},{kind.__name__},..."  # argparse names it in its message
    return parse


if __name__ == "__main__":
    sys.exit(main())
