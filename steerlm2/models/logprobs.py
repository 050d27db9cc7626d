"""Log-probs of response tokens from hidden states, in chunks and on vocabulary shards.

Dimension letters: R response tokens, C tokens of one chunk, D hidden, V vocabulary (under tensor
parallel: this rank's shard of it), N responses.

Full logits [R, V] never exist: a chunk's logits are used and dropped, and computed again in the
backward, all but the last chunk's, with which the backward begins. Only one tensor of the size of
a chunk exists at a time. Under tensor parallel each rank has a shard of the output matrix and of a
chunk's logits; three numbers a token travel between the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Of a chunk's logits, by device. The output matrix is read once a chunk: a GPU needs some hundred
tokens a chunk to be busy with more than that."""


def token_logps(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    chunk_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target], float32 [R].

    Args:
        hidden_RD: hidden states at the positions that predict the targets, after the final norm.
        weight_VD: the output matrix; under tensor parallel this rank's rows of it.
        targets_R: token ids of the whole vocabulary.
        chunk_size: tokens whose logits exist at one time; none: what fits into CHUNK_BYTES.
        tp_group: the tensor-parallel group. The ranks of it pass the same `hidden_RD` and
            `targets_R`; the gradient of `hidden_RD` is this rank's summand of the whole one.
    """
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES[hidden_RD.device.type] // (4 * len(weight_VD)))
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
        exact_weight_VD = _exact(weight_VD)
        logps_R = hidden_RD.new_empty(len(targets_R), dtype=torch.float32)
        normalizer_R = torch.empty_like(logps_R)
        chunk_CV: Tensor | None = None
        for chunk in _chunks(len(targets_R), chunk_size):
            chunk_CV = None  # before there is another
            chunk_CV = _logits(hidden_RD[chunk], exact_weight_VD)
            row_C, owned_C = _local_rows(targets_R[chunk], first_row, len(weight_VD))
            target_C = chunk_CV.gather(1, row_C[:, None]).squeeze(1) * owned_C
            max_C = chunk_CV.amax(dim=1)
            if tp_group is not None:
                dist.all_reduce(max_C, dist.ReduceOp.MAX, tp_group)
            chunk_CV.sub_(max_C[:, None]).exp_()
            sums_2C = torch.stack([chunk_CV.sum(dim=1), target_C])
            if tp_group is not None:
                dist.all_reduce(sums_2C, dist.ReduceOp.SUM, tp_group)
            normalizer_R[chunk] = sums_2C[0].log() + max_C
            logps_R[chunk] = sums_2C[1] - normalizer_R[chunk]
        if chunk_CV is not None:
            chunk_CV.div_(sums_2C[0, :, None])  # softmax(logits)
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, normalizer_R)
        ctx.softmax_CV = chunk_CV
        ctx.chunk_size, ctx.first_row = chunk_size, first_row
        return logps_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, normalizer_R = ctx.saved_tensors
        chunk_CV, ctx.softmax_CV = ctx.softmax_CV, None
        exact_weight_VD = _exact(weight_VD)
        grad_hidden_RD = torch.empty_like(hidden_RD)
        # float32, or the sum over many chunks would lose what each adds
        grad_weight_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for chunk in reversed(_chunks(len(targets_R), ctx.chunk_size)):
            hidden_CD, grad_C = hidden_RD[chunk], grad_R[chunk]
            # d logp / d logits = onehot(target) - softmax(logits)
            if chunk_CV is None:
                chunk_CV = _logits(hidden_CD, exact_weight_VD)
                chunk_CV.sub_(normalizer_R[chunk, None]).exp_()
            chunk_CV.mul_(-grad_C[:, None])
            row_C, owned_C = _local_rows(targets_R[chunk], ctx.first_row, len(weight_VD))
            chunk_CV.scatter_add_(1, row_C[:, None], (grad_C * owned_C)[:, None])
            chunk_CV = chunk_CV.to(weight_VD.dtype)
            grad_hidden_RD[chunk] = chunk_CV @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, chunk_CV.t(), hidden_CD)
            chunk_CV = None  # before there is another
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight, None, None, None


def _exact(weight_VD: Tensor) -> Tensor:
    """The output matrix as `_logits` needs it."""
    return weight_VD if weight_VD.is_cuda else weight_VD.float()


def _logits(hidden_CD: Tensor, exact_weight_VD: Tensor) -> Tensor:
    """[C, V] float32; bfloat16 inputs are accumulated in float32 and not rounded in between.

    A logit of 16 rounded to bfloat16 is off by up to 0.06 nats.
    """
    if hidden_CD.is_cuda and hidden_CD.dtype != torch.float32:
        return torch.mm(hidden_CD, exact_weight_VD.t(), out_dtype=torch.float32)
    return hidden_CD.float() @ exact_weight_VD.t()


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    if sum_VD.dtype == left_VC.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD


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
