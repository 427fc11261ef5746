"""megatron-core's AdamW and learning-rate schedule for a run, counted in optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moba_train.config.schema import RunConfig
from moba_train.model.build import params_dtype

__all__ = ["build_optimizer", "build_scheduler"]

_WSD_DECAY_SHARE = 0.1  # of training, when optim.decay_steps does not say


def build_optimizer(config: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with fp32 master weights under bf16, global-norm clipping, no weight decay on norms and biases."""
    if not HAVE_APEX_OR_TE:
        _mend_torch_adam()
    optim, dtype = config.optim, params_dtype(config)
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.learning_rate,
            min_lr=optim.min_learning_rate,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.epsilon,
            clip_grad=optim.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_grad_reduce and config.parallel.distributed_optimizer,
        ),
        chunks,
    )


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine (over decay_steps or all of training), WSD (a final decay), or constant."""
    optim, steps = config.optim, config.train.steps
    options: dict[str, Any] = {"lr_decay_style": optim.schedule, "lr_decay_steps": steps}
    if optim.schedule == "wsd":
        decay = optim.decay_steps or min(max(1, round(_WSD_DECAY_SHARE * steps)), steps - optim.warmup_steps)
        options |= {"lr_decay_style": "WSD", "wsd_decay_steps": decay, "lr_wsd_decay_style": "cosine"}
    elif optim.schedule == "cosine":
        options["lr_decay_steps"] = optim.decay_steps or steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.learning_rate,
        min_lr=optim.min_learning_rate,
        lr_warmup_steps=optim.warmup_steps,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        override_opt_param_scheduler=True,  # on resume the configuration decides, the checkpoint only says how far
        use_checkpoint_opt_param_scheduler=False,
        **options,
    )


def _mend_torch_adam() -> None:
    """Let a fresh process load the distributed optimizer's state when the inner Adam is torch's.

    megatron-core expects Apex's or Transformer Engine's, which keep no `step` per parameter. Three places fail
    otherwise: an assert that a step exists, a KeyError on it, and one step tensor shared by all parameters, advanced
    once for each.
    """
    cls: Any = DistributedOptimizer
    if getattr(cls, "_moba_train_mended", False):
        return
    set_states, sharded_state_dict, load_state_dict = (
        cls._set_main_param_and_optimizer_states,
        cls.sharded_state_dict,
        cls.load_state_dict,
    )

    def set_states_keeping_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        set_states(self, model_param, {**tensors, **({"step": state["step"]} if "step" in state else {})})

    def sharded_state_dict_of_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_stub_optimizer:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if not self.optimizer.state[p]:
                        zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                        self.optimizer.state[p].update(step=torch.zeros(()), **zeros)
        return sharded_state_dict(self, *args, **kwargs)

    def load_state_dict_apart(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    cls._set_main_param_and_optimizer_states = set_states_keeping_step
    cls.sharded_state_dict = sharded_state_dict_of_fresh
    cls.load_state_dict = load_state_dict_apart
    cls._moba_train_mended = True
