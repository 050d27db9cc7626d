"""Attention over packed rows that never computes what a token doesn't see.

Dimension letters: B rows of a batch, H heads, T tokens of a row, E size of a head, Q tokens of a
block.

In a row [prompt | y_1 | ... | y_n] a response's token sees the prompt and its own response. A dense
mask over the row would compute all T^2 pairs and throw most of them away. Two ways around it:

- `AttentionBlocks` (CPU): every token is in one causal block, with its own prompt or response, and
  may see further blocks of keys whole. Each block is one flash attention; where a token is in two,
  their outputs are merged by their log-sum-exps. Given the merged output and log-sum-exp, the flash
  backward of a block is that block's part of the whole gradient (as in ring attention,
  arXiv 2310.01889), so nothing is computed twice there either.
- FlexAttention (GPU): one kernel over a block mask, which `flex_mask` makes once for a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class AttentionBlocks:
    """Which tokens of a row see which: every token is in exactly one causal block."""

    causal: Sequence[slice]
    """Tokens that see each other up to themselves: prompts, responses, padding."""
    whole: Sequence[tuple[slice, slice]]
    """Tokens, and others before them that they see all of: responses, and their prompt."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | AttentionBlocks | None,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:
    """[B, H, T, E], with the arguments of torchtune's attention call; `mask` may be blocks too."""
    if isinstance(mask, AttentionBlocks):
        return attend_blocks(q, k, v, mask)
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, mask)
    mask = None if mask is None else mask[:, None]
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


@torch.compiler.disable
def attend_blocks(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, blocks: AttentionBlocks
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over what each token sees, [B, H, T, E]; on the CPU."""
    return _BlockAttention.apply(q_BHTE, k_BHTE, v_BHTE, blocks)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, blocks: AttentionBlocks
    ) -> Tensor:
        out_BHTE = torch.empty_like(q_BHTE)
        lse_BHT = q_BHTE.new_empty(q_BHTE.shape[:-1], dtype=torch.float32)
        for own in blocks.causal:
            out_BHTE[:, :, own], lse_BHT[:, :, own] = _flash(
                q_BHTE[:, :, own], k_BHTE[:, :, own], v_BHTE[:, :, own], is_causal=True
            )
        for asking, seen in blocks.whole:
            more_BHQE, more_lse_BHQ = _flash(
                q_BHTE[:, :, asking], k_BHTE[:, :, seen], v_BHTE[:, :, seen]
            )
            lse_BHQ = lse_BHT[:, :, asking]
            # out = (e^lse out + e^more_lse more) / (e^lse + e^more_lse)
            share_BHQ1 = torch.sigmoid(more_lse_BHQ - lse_BHQ)[..., None].to(q_BHTE.dtype)
            out_BHTE[:, :, asking].lerp_(more_BHQE, share_BHQ1)
            torch.logaddexp(lse_BHQ, more_lse_BHQ, out=lse_BHQ)
        ctx.save_for_backward(q_BHTE, k_BHTE, v_BHTE, out_BHTE, lse_BHT)
        ctx.blocks = blocks
        return out_BHTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTE, k_BHTE, v_BHTE, out_BHTE, lse_BHT = ctx.saved_tensors
        grads = [torch.empty_like(each) for each in (q_BHTE, k_BHTE, v_BHTE)]
        grad_q_BHTE, grad_k_BHTE, grad_v_BHTE = grads

        def of_block(asking: slice, seen: slice, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            return _flash_backward(
                grad_BHTE[:, :, asking],
                q_BHTE[:, :, asking],
                k_BHTE[:, :, seen],
                v_BHTE[:, :, seen],
                out_BHTE[:, :, asking],
                lse_BHT[:, :, asking],
                0.0,
                is_causal,
            )

        for own in ctx.blocks.causal:
            for grad, part in zip(grads, of_block(own, own, True), strict=True):
                grad[:, :, own] = part
        for asking, seen in ctx.blocks.whole:
            part_q, part_k, part_v = of_block(asking, seen, False)
            grad_q_BHTE[:, :, asking] += part_q
            grad_k_BHTE[:, :, seen] += part_k
            grad_v_BHTE[:, :, seen] += part_v
        return grad_q_BHTE, grad_k_BHTE, grad_v_BHTE, None


def flex_mask(group_T: Tensor, segment_T: Tensor) -> BlockMask:
    """FlexAttention's mask of a row: `steerlm2.data.packing.Row.attention_mask_TT`, by blocks.

    On a GPU it is computed there, without the dense mask [T, T].
    """
    length = len(group_T)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_T[k] == 0) | (segment_T[q] == segment_T[k])
        return (q >= k) & (group_T[q] == group_T[k]) & own

    return create_block_mask(
        sees, None, None, length, length, device=group_T.device, _compile=group_T.is_cuda
    )


# Rows have many lengths: static shapes would compile each anew. Outside of compiled layers, because
# a compiled function can't be compiled again as a part of one.
_compiled_flex_attention = torch.compile(flex_attention, dynamic=True)


@torch.compiler.disable(recursive=False)
def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    call = _compiled_flex_attention if q.is_cuda else flex_attention
    return call(q, k, v, block_mask=mask)
