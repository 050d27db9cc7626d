"""Log-probs of response tokens from hidden states, in chunks and on vocabulary shards.

Dimension letters: R response tokens, C tokens of one chunk, D hidden, V vocabulary (under tensor
parallel: this rank's shard of it), N responses.

Full logits [R, V] never exist: a chunk's logits are used, freed, and recomputed in the backward,
except those of the last chunk, with which the backward begins. Only one tensor of the size of a
chunk exists at a time. Under tensor parallel each rank has a shard of the output matrix and of a
chunk's logits; the ranks exchange three numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Bytes of a chunk's logits in float32, by device. A choice: the output matrix is read once for
every chunk, so small chunks are bound by memory bandwidth, and large ones take more memory. 512 MiB
are 1,046 tokens of a vocabulary of 128,256; a GPU is bound by its FLOPs from about 300 tokens on
(H100 in bfloat16). On a CPU chunks of 64 MiB took less time than full logits (measured:
tests/benchmarks/README.md, "Memory of the log-prob layer"); the GPU's value isn't measured yet."""


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
        hidden_RD: [R, D] hidden states at the positions that predict the targets, after the final
            norm.
        weight_VD: [V, D] the output matrix; under tensor parallel this rank's rows of it.
        targets_R: [R] token ids of the whole vocabulary.
        chunk_size: tokens of a chunk; None: as many as fit into CHUNK_BYTES.
        tp_group: the tensor-parallel group. Its ranks pass the same `hidden_RD` and `targets_R`,
            and equally many rows of the output matrix; the gradient of `hidden_RD` is this rank's
            summand of the full gradient.

    Raises:
        RuntimeError: where the ranks of `tp_group` have unequal numbers of rows.
    """
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES[hidden_RD.device.type] // (4 * len(weight_VD)))
    return _TokenLogProbs.apply(hidden_RD, weight_VD, targets_R, chunk_size, tp_group)


def sum_by_response(logps_R: Tensor, response_R: Tensor, num_responses: int) -> Tensor:
    """[N] sums of token log-probs by response, float64.

    In float32 a sum of hundreds of nats is rounded by 1e-5 to 1e-4 nats, differently for every
    packing. The loss depends on differences of such sums, so runs that should agree would not.

    Args:
        logps_R: [R] log-probs of tokens, nats.
        response_R: [R] index of each token's response.
        num_responses: N.
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
            chunk_CV = None  # frees it before the next one is allocated
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
        # In float32: in bfloat16 the sum over many chunks would round small summands away.
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
            chunk_CV = None  # frees it before the next one is allocated
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight, None, None, None


def _exact(weight_VD: Tensor) -> Tensor:
    """The output matrix in the dtype that `_logits` needs: float32 on a CPU."""
    return weight_VD if weight_VD.is_cuda else weight_VD.float()


def _logits(hidden_CD: Tensor, exact_weight_VD: Tensor) -> Tensor:
    """[C, V] logits, float32; products of bfloat16 inputs are accumulated in float32.

    A logit of 16 rounded to bfloat16 would be off by up to 0.06 nats.
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
    """The token id of the first row of this rank's shard: shards are contiguous, in rank order."""
    if tp_group is None:
        return 0
    _check_equal_shards(weight_VD, tp_group)
    return dist.get_rank(tp_group) * len(weight_VD)


def _check_equal_shards(weight_VD: Tensor, tp_group: dist.ProcessGroup) -> None:
    """Unequal shards would take tokens of one another: a wrong log-prob, and no error.

    A GPU checks it without the host waiting for it.
    """
    rows = len(weight_VD)
    extremes_2 = torch.full((2,), rows, device=weight_VD.device)
    extremes_2[1].neg_()
    dist.all_reduce(extremes_2, dist.ReduceOp.MAX, tp_group)
    torch._assert_async(
        extremes_2[0] == -extremes_2[1],
        "token_logps needs equal vocabulary shards, but the ranks of the tensor-parallel group "
        "have unequal numbers of rows of the output matrix: pad the vocabulary to a multiple of "
        "the tensor-parallel degree",
    )


def _local_rows(targets_C: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """[C] each target's row in this shard (clamped into it), and [C] whether this shard has it."""
    row_C = targets_C - first_row
    owned_C = (row_C >= 0) & (row_C < num_rows)
    return row_C.clamp(0, num_rows - 1), owned_C
