"""Look at a run before starting it: resolved recipe, layer plan, layout, parameters, FLOPs and memory per GPU.

python launch/plan.py recipe=1m world_size=64
"""

import sys

from moba_train.config.compose import run_command_line
from moba_train.config.schema import RunConfig


def run(config: RunConfig) -> int:
    from moba_train import device

    device.quiet_imports()
    from moba_train.train.loop import pretrain

    return pretrain(config)


if __name__ == "__main__":
    sys.exit(run_command_line(run, __doc__, [*sys.argv[1:], "dry_run=true"]))
