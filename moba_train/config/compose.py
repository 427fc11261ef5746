"""Hydra composes the values of a run: recipes/ and the command line in, a frozen `RunConfig` out.

The only file that knows Hydra. Its compose API is used rather than `hydra.main`, so that Hydra makes no folders (least
of all one per rank), leaves logging alone, and every mistake comes out as one `ConfigError`.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_train.config.huggingface import parse_config, read_config
from moba_train.config.schedule import resolve_schedule
from moba_train.config.schema import ConfigError, RunConfig, from_dict, to_dict, unknown_key

__all__ = ["RECIPES", "compose", "group_options", "run_command_line", "told", "with_overrides"]

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_OTHERS_WAIT_S = 10.0  # torchrun ends the rest within a second of the first failure


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by `recipes/config.yaml` and `overrides` in Hydra's grammar, its attention schedule in steps.

    Raises ConfigError.
    """
    return resolve_schedule(from_dict(_values(overrides)))


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with key=value settings, such as those of a checkpoint that something is to be changed of."""
    for override in overrides:
        if not re.match(r"[\w.]+=", override):
            raise ConfigError("overrides", override, "not in key=value form")
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError("overrides", " ".join(overrides), str(error).splitlines()[0]) from None
    return from_dict(_merged(to_dict(config), changes))


def group_options(group: str) -> list[str]:
    """Names to choose from in a config group, such as 'recipe' or 'model'."""
    return sorted(path.name.removesuffix(".yaml") for path in (RECIPES / group).glob("*.yaml"))


def run_command_line(action: Callable[[RunConfig], int], doc: str, arguments: Sequence[str] | None = None) -> int:
    """What a launch script does: `--help`, `--cfg job`, or compose and `action(config)`. Returns the exit code.

    A ConfigError exits 2 and is printed as one message by the first process of each machine; the others wait to be
    ended by the launcher with it, and speak only if the trouble was theirs alone.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return told(lambda: _run(action, doc, arguments))


def told(action: Callable[[], int]) -> int:
    """`action()`; a ConfigError out of it is told as `run_command_line` says, and gives 2; Ctrl-C gives 130."""
    try:
        return action()
    except ConfigError as error:
        rank, local_rank = _ranks()
        if local_rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run that had begun would note it and go on
            time.sleep(_OTHERS_WAIT_S)
        where = f" (process {rank} on {platform.node()})" if rank else ""
        print(f"Configuration error{where}: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if _ranks()[0] == 0:
            print("\ninterrupted", file=sys.stderr, flush=True)
        return 130


def _run(action: Callable[[RunConfig], int], doc: str, arguments: list[str]) -> int:
    rank, _ = _ranks()
    if "--help" in arguments or "-h" in arguments:
        if rank == 0:
            print(_help(doc))
        return 0
    arguments = [part for given in arguments for part in (["--cfg", "job"] if given == "--cfg=job" else [given])]
    if "--cfg" in arguments:
        at = arguments.index("--cfg")
        if arguments[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg", " ".join(arguments[at + 1 : at + 2]), "write --cfg job")
        text = OmegaConf.to_yaml(OmegaConf.create(_values(arguments[:at] + arguments[at + 2 :])))
        if rank == 0:
            print(text, end="")
        return 0
    return action(compose(arguments))


def _ranks() -> tuple[int, int]:
    """This process's number among all, and on its machine, as torchrun says."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    return rank, local_rank


def _values(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved values. Started from a Hugging Face folder, a run has the folder's model, unless `model=` names one;
    the recipe's and the command line's own model.* values lie on top either way. Chat rows have its tokenizer, unless
    sft.tokenizer names one."""
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(to_dict(RunConfig())))
    values = _compose_values(overrides)
    folder = values["checkpoint"]["init_from_hf"]
    if not isinstance(folder, str):  # none, or what from_dict refuses
        return values
    kept = Path(values["run"]["dir"] or "") / "hf"  # where a run keeps it, should the folder be gone by now
    source = kept if kept.is_dir() and not Path(folder).is_dir() else folder
    if not any(override.startswith("model=") for override in overrides):
        key = "checkpoint.init_from_hf"
        model = parse_config(read_config(source, key), Path(folder).resolve().name, key)
        ConfigStore.instance().store(group="model", name="from_hf", node=OmegaConf.create(to_dict(model)))
        values = _compose_values([*overrides, "model=from_hf"])
    if values["sft"]["path"] is not None and values["sft"]["tokenizer"] is None:
        values["sft"]["tokenizer"] = str(source)
    return values


def _compose_values(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, value = _split(override)
        if re.match(r"hydra[./@]", key):
            raise ConfigError(
                key, value, "Hydra only composes here: it makes no folder and launches nothing; leave it out"
            )
    try:
        with initialize_config_dir(str(RECIPES), version_base="1.3"):
            config = hydra_compose("config", overrides=[_quoted(override) for override in overrides])
            values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise _explain(error, overrides) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _merged(values: Any, changes: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(changes, dict):
        return changes
    return {**values, **{key: _merged(values.get(key), change) for key, change in changes.items()}}


def _quoted(override: str) -> str:
    """Hydra takes `a=x,y` for a sweep and `a=b=c` for a mistake; here a pattern (moba*3,full) and any path are text."""
    key, _, value = override.partition("=")
    if not value or value[0] in "[{(\"'" or re.fullmatch(r"[\w/+.$%*@?|: -]*", value, re.ASCII):
        return override
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value)
    return f'{key}="{escaped}"'


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's errors in our words: which override, and what would work instead."""
    text = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return ConfigError(*_split(error.override), f"not in key=value form ({text})")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(
            group or "recipe", name, f"no such {group or 'file'}; choose {', '.join(group_options(group))}"
        )
    match = re.search(r"Could not (?:override|append to config|find a match for)[^']*'([^']+)'", text)
    if match:
        key, value = _split(
            match[1] if "=" in match[1] else next((o for o in overrides if o.startswith(match[1])), match[1])
        )
        return _unknown(key, value)
    return ConfigError("overrides", " ".join(overrides), text)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _unknown(key: str, value: str) -> ConfigError:
    """Told at the first part of the key that is wrong."""
    section: Any = to_dict(RunConfig())
    parts, depth = key.split("."), 0
    while depth < len(parts) - 1 and isinstance(section, dict) and parts[depth] in section:
        section, depth = section[parts[depth]], depth + 1
    if not isinstance(section, dict) or not section:
        above = ".".join(parts[:depth])
        return ConfigError(key, value, f"no such key: {above} is given as a whole, {above}=...")
    return ConfigError(key, value, unknown_key(".".join(parts[: depth + 1]), value, section).remedy)


def _help(doc: str) -> str:
    groups = [
        f"  {group + '=':<12}{' | '.join(group_options(group))}" for group in ("recipe", "model", "attention", "optim")
    ]
    keys = [f"  {line}" for line in OmegaConf.to_yaml(OmegaConf.create(to_dict(RunConfig()))).splitlines()]
    return "\n".join(
        [
            doc.strip(),
            "",
            "Choose (files in recipes/):",
            *groups,
            "",
            "Any key can be overridden as key=value (a.b=c for nested ones); what each means: "
            "moba_train/config/schema.py. Defaults before the recipe's values:",
            *keys,
            "",
            "  --cfg job   print the resolved configuration and exit",
            "  dry_run=true world_size=64   check, print plan, layout, FLOPs and memory, and exit",
        ]
    )
