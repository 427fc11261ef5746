"""RunConfig -> megatron-core's GPTModel, one chunk per virtual pipeline stage, wrapped for data parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_train.config.schema import RunConfig
from moba_train.config.validate import padded_vocab_size
from moba_train.model.chunked_loss import ChunkedLossGPT
from moba_train.model.freeze import freeze_parameters
from moba_train.model.layer_plan import layer_plan
from moba_train.model.specs import block_spec
from moba_train.parallel.groups import Axis, Groups

__all__ = ["build_gpt", "build_model", "params_dtype", "transformer_config"]


def params_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of weights and activations; fp8 lives inside Transformer Engine's matrix products over bf16 weights."""
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def transformer_config(config: RunConfig, device: torch.device) -> TransformerConfig:
    """megatron-core's view of the model and its layout."""
    model, parallel, dtype = config.model, config.parallel, params_dtype(config)
    on_cpu = device.type == "cpu"
    interleaved = parallel.virtual_pipeline > 1
    options: dict[str, Any] = {}
    if interleaved:
        # Anything else computes a wrong loss without an error at two stages.
        options |= {
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
            "microbatch_group_size_per_vp_stage": parallel.pipeline,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if parallel.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":  # attention keeps little: recompute the MLP
        options |= {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if config.precision == "fp8":
        # Scales of the present tensors: no history to keep, so none in a checkpoint (it would be a pickle).
        options |= {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        init_method_std=model.init_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=not on_cpu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        use_cpu_initialization=on_cpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        deallocate_pipeline_outputs=not on_cpu,
        **options,
    )


def build_gpt(
    config: RunConfig, transformer: TransformerConfig, groups: Groups, device: torch.device, stage: int = 0
) -> GPTModel:
    """The bare model chunk of one (virtual) pipeline stage of this rank on `device`; chunks share `transformer`."""
    plan = layer_plan(config.attention, config.model.num_layers)
    virtual = config.parallel.virtual_pipeline
    vp_stage = stage if virtual > 1 else None
    vocab_size = config.model.vocab_size
    model = ChunkedLossGPT(
        config=transformer,
        transformer_layer_spec=block_spec(config, transformer, plan, groups.pipeline.rank, vp_stage),
        vocab_size=padded_vocab_size(vocab_size, config.parallel.tensor),
        max_sequence_length=config.train.sequence_length,
        pre_process=groups.is_first_stage and stage == 0,
        post_process=groups.is_last_stage and stage == virtual - 1,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="none",  # CoreAttention rotates from explicit positions
        vp_stage=vp_stage,
    ).to(device)
    if model.post_process and vocab_size % config.parallel.tensor:
        model.output_layer.register_forward_hook(_PaddingHidden(vocab_size, groups.tensor))
    return model


class _PaddingHidden:
    """A forward hook that makes the logits of padding -inf, so that they take no part in a softmax or a choice."""

    def __init__(self, vocab_size: int, tensor: Axis) -> None:
        self.vocab_size, self.tensor = vocab_size, tensor
        self.width = padded_vocab_size(vocab_size, tensor.size)

    def __call__(self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        logits = output[0]
        gathered = logits.shape[-1] == self.width
        first = 0 if gathered else self.tensor.rank * logits.shape[-1]
        logits[..., max(self.vocab_size - first, 0) :] = -torch.inf


def build_model(config: RunConfig, groups: Groups, device: torch.device) -> list[DistributedDataParallel]:
    """This rank's model chunks on `device`: one, or one per virtual pipeline stage."""
    transformer = transformer_config(config, device)
    overlap = config.parallel.overlap_grad_reduce
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and config.parallel.distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    models = [
        build_gpt(config, transformer, groups, device, stage) for stage in range(config.parallel.virtual_pipeline)
    ]
    freeze_parameters(models, config.train.freeze, recompute=config.parallel.recompute != "none")
    return [
        DistributedDataParallel(
            transformer,
            ddp,
            Float16Module(transformer, model) if transformer.bf16 else model,
            disable_bucketing=stage > 0,
        )
        for stage, model in enumerate(models)
    ]
