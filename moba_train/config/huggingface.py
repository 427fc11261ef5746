"""config.json of a Hugging Face folder <-> `ModelConfig`. Standard library only.

Every field that changes what the model computes is honoured, or refused by name. Fields of no effect here (token ids,
cache and dtype settings) are carried, not read. `ROPE_FIELDS` says which scaling type takes which fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moba_train.config.schema import ConfigError, ModelConfig, RopeScaling, from_dict

__all__ = [
    "FAMILIES",
    "ROPE_FIELDS",
    "Family",
    "check_rope",
    "export_config",
    "parse_config",
    "read_config",
    "rope_parameters",
]


@dataclass(frozen=True)
class Family:
    """A model type: its causal language model class, what its config class takes for missing fields, its extras."""

    architecture: str
    defaults: Mapping[str, Any]
    qkv_bias: bool = False
    qk_norm: bool = False
    refused: Mapping[str, Any] = field(default_factory=dict)  # further fields and the only value they may have


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", {"max_position_embeddings": 2048}, refused={"attention_bias": False, "mlp_bias": False}
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", {**_QWEN, "sliding_window": 4096, "max_window_layers": 28}, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_QWEN, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        qk_norm=True,
        refused={"attention_bias": False},
    ),
}
# Scaling type -> (fields it needs, fields it may have). A factor that may be missing is
# max_position_embeddings / original_max_position_embeddings.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("original_max_position_embeddings", "short_factor", "long_factor"),
        ("factor", "attention_factor"),
    ),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EVERYWHERE = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0}


def read_config(folder: str | Path, key: str) -> dict[str, Any]:
    """The fields of `folder`/config.json; ConfigError (about `key`) where there is none or it is damaged."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ConfigError(key, str(folder), "has no config.json; give a local Hugging Face folder of a causal model")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(key, str(folder), f"config.json is damaged ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise ConfigError(key, str(folder), "config.json does not hold a group of fields; fetch it again")
    return values


def parse_config(values: Mapping[str, Any], name: str, key: str) -> ModelConfig:
    """The model that config.json's fields describe, called `name`. ConfigError (about `key`, or key.field) where it
    is of an unknown family or asks for something that is not built here."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(f"{kind} ({family.architecture})" for kind, family in FAMILIES.items())
        raise ConfigError(f"{key}: model_type", model_type, f"this family is not known; known are {known}")
    family = FAMILIES[model_type]
    _refuse_other_models(values, family, key)

    def get(field_name: str, default: Any = None) -> Any:
        value = values.get(field_name)
        return family.defaults.get(field_name, default) if value is None else value

    for field_name in _REQUIRED:
        if values.get(field_name) is None:
            raise ConfigError(f"{key}: {field_name}", None, "is missing from config.json; fetch it again")
    _refuse_sliding_window(values, family, key)
    heads = values["num_attention_heads"]
    head_dim = get("head_dim") or _divided(values["hidden_size"], heads, key)
    base, scaling = _parse_rope(values, key)
    return from_dict(
        {
            "name": name,
            "num_layers": values["num_hidden_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": values["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": get("num_key_value_heads", heads),
            "head_dim": head_dim,
            "vocab_size": values["vocab_size"],
            "rope_base": base,
            "rope_scaling": scaling,
            "max_position_embeddings": get("max_position_embeddings"),
            "norm_epsilon": get("rms_norm_eps", 1e-6),
            "qk_norm": family.qk_norm,
            "qkv_bias": family.qkv_bias,
            "tie_embeddings": get("tie_word_embeddings", False),
            "init_std": get("initializer_range", 0.02),
        },
        ModelConfig,
        f"{key}: ",
    )


def export_config(
    model: ModelConfig,
    dtype: str,
    plan: list[dict[str, Any]],
    carried: Mapping[str, Any] | None = None,
    eos_token_id: int | None = None,
) -> dict[str, Any]:
    """config.json's fields for a model, on top of those it was imported with; unchanged where nothing has changed.

    plan: what each layer computes; with a MoBA layer in it, it becomes the section `moba`, which plain transformers
    ignores. Rotary fields keep the spelling they came in; new ones are written as every version of transformers reads.
    """
    if carried is None:
        config = _new_config(model, dtype, eos_token_id)
    else:
        config = dict(carried)
        for name in ("dtype", "torch_dtype"):
            if name in config:
                config[name] = dtype
        if model.max_position_embeddings is not None:
            config["max_position_embeddings"] = model.max_position_embeddings
        was = _parse_rope(carried, "config.json")
        scaling = {name: value for name, value in dataclasses.asdict(model.rope_scaling).items() if value is not None}
        if was != (model.rope_base, scaling):
            config.update(_spelt_rope(model, new_spelling="rope_parameters" in carried))
            config.pop("original_max_position_embeddings", None)
    config.pop("moba", None)
    if any(layer["kind"] == "moba" for layer in plan):
        config["moba"] = {"layers": plan}
    return config


def rope_parameters(base: float, scaling: RopeScaling) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes them: rope_theta, rope_type and the fields that are set."""
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    return {"rope_theta": base, **fields}


def check_rope(model: ModelConfig, key: str = "model.rope_scaling") -> None:
    """ConfigError unless the scaling has the fields of its type, no others, and values that make sense."""
    scaling = dataclasses.asdict(model.rope_scaling)
    kind = scaling.pop("rope_type")
    if kind not in ROPE_FIELDS:
        raise ConfigError(f"{key}.rope_type", kind, f"choose {', '.join(ROPE_FIELDS)}")
    needed, optional = ROPE_FIELDS[kind]
    for name, value in scaling.items():
        if value is None and name in needed:
            raise ConfigError(f"{key}.{name}", None, f"rope_type={kind} needs it")
        if value is not None and name not in (*needed, *optional):
            raise ConfigError(f"{key}.{name}", value, f"rope_type={kind} does not use it; set it to null")
        if name == "factor" and value is not None and value < 1:
            raise ConfigError(f"{key}.{name}", value, "must be at least 1")
        if isinstance(value, tuple) and (len(value) != model.head_dim // 2 or min(value) <= 0):
            remedy = f"needs a positive number for each of the {model.head_dim // 2} dimension pairs"
            raise ConfigError(f"{key}.{name}", value, remedy)
        if isinstance(value, (int, float)) and value is not False and value <= 0:
            raise ConfigError(f"{key}.{name}", value, "must be positive")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ConfigError(f"{key}.high_freq_factor", scaling["high_freq_factor"], "must exceed low_freq_factor")
    fast, slow = scaling["beta_fast"] or 32, scaling["beta_slow"] or 1
    if kind == "yarn" and fast < slow:
        raise ConfigError(f"{key}.beta_fast", fast, f"must not be below beta_slow={slow}")
    for name in ("mscale", "mscale_all_dim"):
        if kind == "yarn" and scaling[name] is not None and scaling["attention_factor"] is not None:
            raise ConfigError(
                f"{key}.{name}", scaling[name], "attention_factor is given and overrides it; set one to null"
            )
    asked = scaling["factor"] is None and kind in ("yarn", "longrope")
    if (asked or kind == "dynamic") and model.max_position_embeddings is None:
        remedy = f"rope_type={kind} " + ("without factor " if asked else "") + "is computed from it: set it"
        raise ConfigError("model.max_position_embeddings", None, remedy)


def _refuse_other_models(values: Mapping[str, Any], family: Family, key: str) -> None:
    architectures = values.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ConfigError(f"{key}: architectures", architectures, f"only {family.architecture} is built here")
    for name in ("auto_map", "quantization_config"):
        if values.get(name):
            what = "weights are quantised" if name == "quantization_config" else "the model brings code of its own"
            raise ConfigError(f"{key}: {name}", values[name], f"{what}; give a folder in 16 or 32 bits, without it")
    for name, only in {**_EVERYWHERE, **family.refused}.items():
        if values.get(name, only) not in (only, None):
            raise ConfigError(f"{key}: {name}", values[name], f"is not built here; only {name}={only} is")


def _refuse_sliding_window(values: Mapping[str, Any], family: Family, key: str) -> None:
    """Sliding windows are not built: they must be off, in no layer, or wider than the longest input."""
    merged = {**family.defaults, **values}
    window, longest = merged.get("sliding_window"), merged["max_position_embeddings"]
    remedy = "sliding-window attention is not built here: choose a checkpoint without it"
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ConfigError(f"{key}: layer_types", kinds, "must be a list of the layers' kinds; fetch config.json again")
    if any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{key}: layer_types", kinds, remedy)
    if window is None or window >= longest or not merged.get("use_sliding_window", True) or kinds:
        return
    if merged.get("max_window_layers", 0) >= values["num_hidden_layers"]:
        return
    remedy += f", or set it to null in config.json if inputs beyond {window} tokens need not be what it was trained for"
    raise ConfigError(f"{key}: sliding_window", window, remedy)


def _divided(hidden: int, heads: int, key: str) -> int:
    if hidden % heads:
        raise ConfigError(f"{key}: num_attention_heads", heads, f"does not divide hidden_size={hidden}; give head_dim")
    return hidden // heads


def _parse_rope(values: Mapping[str, Any], key: str) -> tuple[float, dict[str, Any]]:
    """(base, RopeScaling's fields) from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    if new and old and new != old:
        raise ConfigError(f"{key}: rope_scaling", old, f"rope_parameters={new} is there too; keep one of them")
    where = "rope_parameters" if new else "rope_scaling"
    if not isinstance(new or old, dict):
        raise ConfigError(f"{key}: {where}", new or old, "must be a group of fields; fetch config.json again")
    fields = dict(new or old)
    kind = fields.pop("rope_type", None) or fields.get("type") or "default"
    fields.pop("type", None)
    base = fields.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    if not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ConfigError(f"{key}: rope_theta", base, "must be a positive number; fetch config.json again")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise ConfigError(f"{key}: {where}", kind, f"rope type not known; known are {', '.join(ROPE_FIELDS)}")
    needed, optional = ROPE_FIELDS[kind]
    if "original_max_position_embeddings" in needed:
        outer = values.get("original_max_position_embeddings")  # transformers prefers it
        inner = fields.get("original_max_position_embeddings")
        fields["original_max_position_embeddings"] = outer or inner or values.get("max_position_embeddings")
    if fields.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError(f"{key}: {where}.partial_rotary_factor", new or old, "is not built here; only 1.0 is")
    for name, value in list(fields.items()):
        if value is None:
            del fields[name]
        elif name not in (*needed, *optional):
            raise ConfigError(f"{key}: {where}.{name}", value, f"is no field of rope type {kind}; take it out")
        elif isinstance(value, list):
            fields[name] = tuple(value)
    for name in needed:
        if name not in fields:
            raise ConfigError(f"{key}: {where}.{name}", None, f"rope type {kind} needs it")
    return base, {"rope_type": kind, **fields}


def _spelt_rope(model: ModelConfig, new_spelling: bool) -> dict[str, Any]:
    fields = rope_parameters(model.rope_base, model.rope_scaling)
    if new_spelling:
        return {"rope_parameters": fields}
    base = fields.pop("rope_theta")
    return {"rope_theta": base, "rope_scaling": None if fields == {"rope_type": "default"} else fields}


def _new_config(model: ModelConfig, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """config.json of a model that never was a Hugging Face folder."""
    kinds = [kind for kind, f in FAMILIES.items() if (f.qkv_bias, f.qk_norm) == (model.qkv_bias, model.qk_norm)]
    if not kinds:
        raise ConfigError("model.qkv_bias", model.qkv_bias, "no Hugging Face family here has it together with qk_norm")
    return {
        "architectures": [FAMILIES[kinds[0]].architecture],
        "model_type": kinds[0],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
        **_spelt_rope(model, new_spelling=False),
        **dict.fromkeys(FAMILIES[kinds[0]].refused, False),
        **({"use_sliding_window": False} if "use_sliding_window" in FAMILIES[kinds[0]].defaults else {}),
    }
