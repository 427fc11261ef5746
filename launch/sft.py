"""Fine-tune on chat rows: JSONL or Parquet with messages, conversations, or prompt and completion.

torchrun --nproc-per-node 8 launch/sft.py recipe=sft_128k sft.path=data/chat.jsonl sft.tokenizer=models/llama \\
    checkpoint.load=runs/pretrained checkpoint.load_weights_only=true
python launch/sft.py recipe=sft_tiny                                    one process; make sft makes its rows first
"""

import sys

from moba_train.config.compose import run_command_line
from moba_train.config.schema import RunConfig


def run(config: RunConfig) -> int:
    # Not before the configuration is read: --help needs no torch.
    from moba_train import device

    device.quiet_imports()
    from moba_train.train.loop import finetune

    return finetune(config)


if __name__ == "__main__":
    sys.exit(run_command_line(run, __doc__))
