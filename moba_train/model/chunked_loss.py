"""GPTModel whose loss over a long row never holds the logits of the whole row.

Logits of T tokens over V words take T x V x 10 bytes in bf16 with the two fp32 copies of the loss: 168 GB at 128K
tokens of a 128K vocabulary. Above `LOGITS_AT_ONCE` elements they are formed for some rows at a time, and once more in
backward (a product of the output layer more); the weight's gradient is summed in fp32. Up to there nothing differs
from GPTModel.

Letters: T tokens, B rows (1 here), X hidden size, V words of this tensor rank, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

__all__ = ["LOGITS_AT_ONCE", "ChunkedLossGPT", "rows_at_once"]

LOGITS_AT_ONCE = 1 << 30  # elements on a tensor rank


def rows_at_once(words: int) -> int:
    """Tokens whose logits over `words` of the vocabulary are held together."""
    return max(1, LOGITS_AT_ONCE // words)


class ChunkedLossGPT(GPTModel):
    """GPTModel with the loss in chunks where the row is long. Parameters, names and results are GPTModel's."""

    def _postprocess(self, hidden_states: torch.Tensor, labels: torch.Tensor | None, **rest: Any) -> torch.Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        weight = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        rows = rows_at_once(weight.shape[0])
        if labels.shape[1] <= rows:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **rest)
        if self.config.sequence_parallel:  # chunks of the whole row: a part of each rank's would be no stretch of it
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        losses_TB: torch.Tensor = _ChunkedLoss.apply(hidden_states, weight, labels, self, rows)
        return losses_TB.transpose(0, 1).contiguous()

    def losses_of_rows(
        self, hidden_CBX: torch.Tensor, weight_VX: torch.Tensor, labels_BC: torch.Tensor
    ) -> torch.Tensor:
        """Losses [C, B] of some tokens, whole on every tensor rank."""
        gathered_before = self.output_layer.sequence_parallel
        self.output_layer.sequence_parallel = False
        try:
            logits_CBV, _ = self.output_layer(hidden_CBX, weight=weight_VX)
        finally:
            self.output_layer.sequence_parallel = gathered_before
        return self.compute_language_model_loss(labels_BC, logits_CBV).transpose(0, 1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TBX: torch.Tensor,
        weight_VX: torch.Tensor,
        labels_BT: torch.Tensor,
        model: ChunkedLossGPT,
        rows: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TBX, weight_VX, labels_BT)
        ctx.settings = (model, rows)
        parts = zip(hidden_TBX.split(rows), labels_BT.split(rows, dim=1), strict=True)
        return torch.cat([model.losses_of_rows(hidden, weight_VX, labels) for hidden, labels in parts])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TBX, weight_VX, labels_BT = ctx.saved_tensors
        model, rows = ctx.settings
        trains = ctx.needs_input_grad[1]  # not where the embedding is frozen
        dhidden_TBX = torch.empty_like(hidden_TBX)
        dweight_VX = torch.zeros_like(weight_VX, dtype=torch.float32) if trains else None
        weight = weight_VX.detach().requires_grad_(trains)
        for start in range(0, len(hidden_TBX), rows):
            chunk = slice(start, start + rows)
            hidden = hidden_TBX[chunk].detach().requires_grad_()
            with torch.enable_grad():
                losses = model.losses_of_rows(hidden, weight, labels_BT[:, chunk])
            found = torch.autograd.grad(losses, (hidden, weight) if trains else (hidden,), grads[0][chunk])
            dhidden_TBX[chunk] = found[0]
            if dweight_VX is not None:
                dweight_VX += found[1]
        return dhidden_TBX, None if dweight_VX is None else dweight_VX.to(weight_VX.dtype), None, None, None
