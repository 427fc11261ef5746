"""Look at a run before starting it: resolved recipe, layer plan, layout, parameters, FLOPs and memory per GPU.

python launch/plan.py recipe=1m world_size=64
"""

import sys

from pretrain import run

from moba_train.config.compose import run_command_line

if __name__ == "__main__":
    sys.exit(run_command_line(run, __doc__, [*sys.argv[1:], "dry_run=true"]))
