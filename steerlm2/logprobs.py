"""Log-probs of response tokens from hidden states, in chunks and on vocabulary shards.

Dimension letters: R response tokens, C tokens of one chunk, D hidden, V vocabulary (under tensor
parallel: this rank's shard of it), N responses.

Full logits [R, V] never exist: a chunk's logits are used and dropped, and computed again in the
backward. Under tensor parallel each rank has a shard of the output matrix and of a chunk's logits;
three numbers a token travel between the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_SIZE = 1024


def token_logps(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target], float32 [R].

    Args:
        hidden_RD: hidden states at the positions that predict the targets, after the final norm.
        weight_VD: the output matrix; under tensor parallel this rank's rows of it.
        targets_R: token ids of the whole vocabulary.
        chunk_size: tokens whose logits exist at one time.
        tp_group: the tensor-parallel group. The ranks of it pass the same `hidden_RD` and
            `targets_R`; the gradient of `hidden_RD` is this rank's summand of the whole one.
    """
    return _TokenLogProbs.apply(hidden_RD, weight_VD, targets_R, chunk_size, tp_group)


def sum_by_response(logps_R: Tensor, response_R: Tensor, num_responses: int) -> Tensor:
    """[N] sums of token log-probs, float64; `response_R` says which response a token belongs to.

    A sum of hundreds of nats rounds to 1e-5 to 1e-4 nats in float32, in another way for every
    packing. The loss depends on differences of such sums, so two runs that should agree would not.
    """
    sums_N = logps_R.new_zeros(num_responses, dtype=torch.float64)
    return sums_N.index_add(0, response_R, logps_R.double())


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        chunk_size: int,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        first_row = _first_row(weight_VD, tp_group)
        logps_R = hidden_RD.new_empty(len(targets_R), dtype=torch.float32)
        normalizer_R = torch.empty_like(logps_R)
        for chunk in _chunks(len(targets_R), chunk_size):
            logits_CV = _logits(hidden_RD[chunk], weight_VD)
            row_C, owned_C = _local_rows(targets_R[chunk], first_row, len(weight_VD))
            target_C = logits_CV.gather(1, row_C[:, None]).squeeze(1) * owned_C
            max_C = logits_CV.amax(dim=1)
            if tp_group is not None:
                dist.all_reduce(max_C, dist.ReduceOp.MAX, tp_group)
            sums_2C = torch.stack([(logits_CV - max_C[:, None]).exp().sum(dim=1), target_C])
            if tp_group is not None:
                dist.all_reduce(sums_2C, dist.ReduceOp.SUM, tp_group)
            normalizer_R[chunk] = sums_2C[0].log() + max_C
            logps_R[chunk] = sums_2C[1] - normalizer_R[chunk]
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, normalizer_R)
        ctx.chunk_size, ctx.first_row = chunk_size, first_row
        return logps_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, normalizer_R = ctx.saved_tensors
        needs_weight_grad = ctx.needs_input_grad[1]
        grad_hidden_RD = torch.empty_like(hidden_RD)
        # float32, or the sum over many chunks would lose what each adds
        grad_weight_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight_grad else None
        )
        for chunk in _chunks(len(targets_R), ctx.chunk_size):
            hidden_CD, grad_C = hidden_RD[chunk], grad_R[chunk]
            logits_CV = _logits(hidden_CD, weight_VD)
            # d logp / d logits = onehot(target) - softmax(logits)
            grad_CV = (logits_CV - normalizer_R[chunk, None]).exp_().mul_(-grad_C[:, None])
            row_C, owned_C = _local_rows(targets_R[chunk], ctx.first_row, len(weight_VD))
            grad_CV.scatter_add_(1, row_C[:, None], (grad_C * owned_C)[:, None])
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden_RD[chunk] = grad_CV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_CV.t() @ hidden_CD
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight, None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """[C, V] float32; bfloat16 inputs are accumulated in float32 and not rounded in between.

    A logit of 16 rounded to bfloat16 is off by up to 0.06 nats.
    """
    if hidden_CD.is_cuda and hidden_CD.dtype != torch.float32:
        return torch.mm(hidden_CD, weight_VD.t(), out_dtype=torch.float32)
    return hidden_CD.float() @ weight_VD.float().t()


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _first_row(weight_VD: Tensor, tp_group: dist.ProcessGroup | None) -> int:
    """The token id of this rank's first row: shards are contiguous, in rank order."""
    if tp_group is None:
        return 0
    return dist.get_rank(tp_group) * len(weight_VD)


def _local_rows(targets_C: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Each target's row in this shard (clamped if another rank has it), and whether it is here."""
    row_C = targets_C - first_row
    owned_C = (row_C >= 0) & (row_C < num_rows)
    return row_C.clamp(0, num_rows - 1), owned_C
