"""Pretrain a GPT whose layers mix MoBA and full attention.

torchrun --nproc-per-node 8 launch/pretrain.py recipe=128k data.path=data/books
python launch/pretrain.py recipe=tiny                                   one process
python launch/pretrain.py recipe=1m world_size=64 dry_run=true          look first, on a laptop
"""

import sys

from moba_train.config.compose import run_command_line
from moba_train.config.schema import RunConfig


def run(config: RunConfig) -> int:
    # Not before the configuration is read: --help needs no torch.
    from moba_train import device

    device.quiet_imports()
    from moba_train.train.loop import pretrain

    return pretrain(config)


if __name__ == "__main__":
    sys.exit(run_command_line(run, __doc__))
