"""Attention over packed rows that never computes what a token doesn't see.

Dimension letters: B rows of a batch, H heads, T tokens of a row, E size of a head, X blocks,
Q tokens of a block.

In a row [prompt | y_1 | ... | y_n] a response's token sees the prompt and its own response. A dense
mask over the row would compute all T^2 pairs and throw most of them away. Two ways around it:

- By blocks (CPU): every token is in one causal block, with its own prompt or response, and may see
  further blocks of keys whole. Each block is one flash attention; where a token is in two, their
  outputs are merged by their log-sum-exps. Given the merged output and log-sum-exp, the flash
  backward of a block is that block's part of the whole gradient (as in ring attention,
  arXiv 2310.01889), so nothing is computed twice there either.
- FlexAttention (GPU): one kernel over a block mask, which `flex_mask` makes once for a row.

Blocks travel as a tensor and their attention is an operator of its own, so that compiled layers
neither break at it nor compile again for other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)
from torch.nn.functional import scaled_dot_product_attention

KERNEL_OPTIONS: FlexKernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
"""One kernel for all lengths: below 128 tokens FlexAttention would take another (flex_decoding),
which has failed with dynamic shapes (pytorch/pytorch#133716)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:
    """[B, H, T, E], with the arguments of torchtune's attention call.

    Args:
        mask: blocks too, as `attention_blocks` makes them (integers), and torchtune's own masks.
    """
    if isinstance(mask, BlockMask):
        # A compiled function can't be a part of another one, and needn't be.
        inside = torch.compiler.is_compiling() or not q.is_cuda
        attention = flex_attention if inside else _compiled_flex_attention
        return attention(q, k, v, block_mask=mask, kernel_options=KERNEL_OPTIONS)
    if mask is not None and mask.dtype == torch.long:
        return attend_blocks(q, k, v, mask)[0]
    mask = None if mask is None else mask[:, None]
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


def attention_blocks(
    causal: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int, int, int]]
) -> Tensor:
    """[X, 5] the pairs of a row to compute; empty blocks are left out.

    Args:
        causal: (start, stop) of tokens that see each other up to themselves: prompts, responses,
            padding. Every token is in exactly one.
        whole: (start, stop) of tokens, and of others before them that they see all of: the
            responses of a group, and their prompt.
    """
    blocks = [(start, stop, start, stop, 1) for start, stop in causal]
    blocks += [(*asking_and_seen, 0) for asking_and_seen in whole]
    kept = [block for block in blocks if block[0] < block[1] and block[2] < block[3]]
    return torch.tensor(kept, dtype=torch.long).view(-1, 5)


@torch.library.custom_op("steerlm2::attend_blocks", mutates_args=())
def attend_blocks(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, blocks_X5: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E)) v over what each token sees, [B, H, T, E], and the logarithm of what
    the softmax divides by, [B, H, T] float32; on the CPU.
    """
    out_BHTE = torch.empty_like(q_BHTE)
    lse_BHT = q_BHTE.new_empty(q_BHTE.shape[:-1], dtype=torch.float32)
    for asking, seen, is_causal in _slices(blocks_X5):
        out_BHQE, lse_BHQ = _flash(
            q_BHTE[:, :, asking], k_BHTE[:, :, seen], v_BHTE[:, :, seen], is_causal=is_causal
        )
        if is_causal:
            out_BHTE[:, :, asking], lse_BHT[:, :, asking] = out_BHQE, lse_BHQ
            continue
        # out = (e^lse_0 out_0 + e^lse out) / (e^lse_0 + e^lse)
        lse_0_BHQ = lse_BHT[:, :, asking]
        share_BHQ1 = torch.sigmoid(lse_BHQ - lse_0_BHQ)[..., None].to(q_BHTE.dtype)
        out_BHTE[:, :, asking].lerp_(out_BHQE, share_BHQ1)
        torch.logaddexp(lse_0_BHQ, lse_BHQ, out=lse_0_BHQ)
    return out_BHTE, lse_BHT


@torch.library.custom_op("steerlm2::attend_blocks_backward", mutates_args=())
def _attend_blocks_backward(
    grad_BHTE: Tensor,
    q_BHTE: Tensor,
    k_BHTE: Tensor,
    v_BHTE: Tensor,
    out_BHTE: Tensor,
    lse_BHT: Tensor,
    blocks_X5: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    grads = torch.empty_like(q_BHTE), torch.empty_like(k_BHTE), torch.empty_like(v_BHTE)
    for asking, seen, is_causal in _slices(blocks_X5):
        parts = _flash_backward(
            grad_BHTE[:, :, asking],
            q_BHTE[:, :, asking],
            k_BHTE[:, :, seen],
            v_BHTE[:, :, seen],
            out_BHTE[:, :, asking],
            lse_BHT[:, :, asking],
            0.0,
            is_causal,
        )
        for grad, place, part in zip(grads, (asking, seen, seen), parts, strict=True):
            if is_causal:
                grad[:, :, place] = part
            else:
                grad[:, :, place] += part
    return grads


def _slices(blocks_X5: Tensor) -> Iterator[tuple[slice, slice, bool]]:
    """Who asks, what is seen, and whether causally."""
    for start, stop, first, end, is_causal in blocks_X5.tolist():
        yield slice(start, stop), slice(first, end), bool(is_causal)


@attend_blocks.register_fake
def _(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, blocks_X5: Tensor) -> tuple[Tensor, Tensor]:
    lse_BHT = q_BHTE.new_empty(q_BHTE.shape[:-1], dtype=torch.float32)
    return torch.empty_like(q_BHTE), lse_BHT


@_attend_blocks_backward.register_fake
def _(
    grad_BHTE: Tensor, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BHTE), torch.empty_like(k_BHTE), torch.empty_like(v_BHTE)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, blocks_X5 = inputs
    ctx.save_for_backward(*qkv, *output, blocks_X5)


def _backward(ctx: Any, grad_BHTE: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """`attend` hands out no log-sum-exp, so it has no gradient."""
    return *_attend_blocks_backward(grad_BHTE, *ctx.saved_tensors), None


attend_blocks.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def flex_mask(group_T: Tensor, segment_T: Tensor) -> BlockMask:
    """FlexAttention's mask of a row: `steerlm2.data.packing.Row.attention_mask_TT`, by blocks.

    On a GPU it is computed there, without the dense mask [T, T].
    """
    length = len(group_T)
    create = _compiled_create_block_mask if group_T.is_cuda else create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_T[k] == 0) | (segment_T[q] == segment_T[k])
        return (q >= k) & (group_T[q] == group_T[k]) & own

    return create(sees, None, None, length, length, device=group_T.device)


# Rows have many lengths: static shapes would compile each anew.
_compiled_flex_attention = torch.compile(flex_attention, dynamic=True)
_compiled_create_block_mask = torch.compile(create_block_mask, dynamic=True)
