"""Submit a job with the facts of a cluster from recipes/cluster/NAME.yaml.

    CLUSTER=NAME python launch/slurm/submit.py pretrain [sbatch flags: --nodes=4 ...] recipe=128k train.steps=1000

Arguments that start with a dash go to sbatch, the others to training. `--print` shows the command and submits nothing.
The file has four keys: `sbatch` and `srun` (flags), `setup` (shell lines) and `environment` (variables).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["flags", "job", "main"]

ROOT = Path(__file__).resolve().parents[2]
JOBS = ("pretrain", "sft")
KEYS = ("sbatch", "srun", "setup", "environment")


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run sbatch in place of this process. Returns 2 with a message when something is not as it must be."""
    try:
        command, variables = job(arguments, environment)
    except ValueError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2
    if "--print" in arguments:
        settings = [f"{name}={value}" for name, value in variables.items()]
        print(shlex.join([*settings, *command]))
        return 0
    os.chdir(ROOT)
    os.execvpe(command[0], command, {**environment, **variables})


def job(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The sbatch command line, and the variables that carry the rest of the facts to launch/slurm/job.sh."""
    if not arguments or arguments[0] not in JOBS:
        raise ValueError(f"the first argument names the job: {' or '.join(JOBS)}")
    facts = _facts(environment.get("CLUSTER", ""))
    given = [argument for argument in arguments[1:] if argument.startswith("-") and argument != "--print"]
    overrides = [argument for argument in arguments[1:] if not argument.startswith("-")]
    script = f"launch/slurm/{arguments[0]}.sbatch"
    variables = {str(name): str(value) for name, value in facts["environment"].items()}
    variables["JOB_SETUP"] = "\n".join(facts["setup"])
    variables["JOB_SRUN_FLAGS"] = shlex.join(flags(facts["srun"]))
    return ["sbatch", *flags(facts["sbatch"]), *given, script, *overrides], variables


def flags(values: Mapping[str, Any]) -> list[str]:
    """`{"nodes": 2, "exclusive": True, "mem": None}` as `--nodes=2 --exclusive`."""
    wanted = {name: value for name, value in values.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items()]


def _facts(cluster: str) -> dict[str, Any]:
    folder = ROOT / "recipes" / "cluster"
    path = folder / f"{cluster}.yaml"
    if not cluster or not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ValueError(
            f"CLUSTER={cluster!r}: name a file of recipes/cluster/ ({known}), or write one from example.yaml"
        )
    try:
        facts = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expects the keys {', '.join(KEYS)}")
    unknown = sorted(str(key) for key in set(facts) - set(KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; the keys are {', '.join(KEYS)}")
    found = {key: facts.get(key) or ([] if key == "setup" else {}) for key in KEYS}
    for key, value in found.items():
        if not isinstance(value, list if key == "setup" else dict):
            kind = "a list of shell lines" if key == "setup" else "names with values"
            raise ValueError(f"{path}: {key} is {value!r}; write {kind}")
    limit = (facts.get("sbatch") or {}).get("time")
    if limit is not None and not isinstance(limit, str):
        raise ValueError(f"{path}: time is the number {limit}: quote it, as YAML reads 24:00:00 in seconds")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
