"""Attention over packed sequences that skips the masked pairs.

Dimension letters: B sequences of a batch, H heads, K key/value heads, T tokens of a packed
sequence, E size of a head, D hidden, X blocks, Q queries of a block.

In a packed sequence [prompt | y_1 | ... | y_n] a response's token attends to the prompt and to its
own response. A dense mask would compute all T^2 pairs and discard most of them. Two ways avoid it:

- By blocks (CPU): every token is a query of one causal block (its own prompt or response), and can
  be one of further blocks, in which every query attends to all keys. Each block is one flash
  attention; outputs of one query in two blocks are merged by their log-sum-exps. Given the merged
  output and log-sum-exp, the flash backward of a block is that block's part of the whole gradient
  (as in ring attention, arXiv 2310.01889), so the backward recomputes nothing more either.
- FlexAttention (GPU): one kernel over a block mask, which `flex_mask` makes once for a packed
  sequence.

The blocks are passed as a tensor, and their attention is a custom operator: compiled layers have no
graph break there and aren't recompiled for other blocks.
"""

from __future__ import annotations

import functools
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
from torchtune.modules import MultiHeadAttention

KERNEL_OPTIONS: FlexKernelOptions = {"FORCE_USE_FLEX_ATTENTION": True}
"""One kernel for all lengths: below 128 tokens FlexAttention would take another (flex_decoding),
which has failed with dynamic shapes (pytorch/pytorch#133716)."""

HEADS_DIM = 2
"""The dimension of the heads where `HeadNormAttention` normalises them."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | BlockMask | None,
    dropout_p: float,
    is_causal: bool,
    *,
    queries_per_key: int = 1,
) -> Tensor:
    """Attention with the arguments of torchtune's attention call, [B, H, T, E].

    Args:
        q: [B, H, T, E]; k and v alike.
        queries_per_key: how often torchtune has repeated each head of k and v, one copy after the
            other, to make them as many as those of q (grouped-query attention).
        mask: `attention_blocks` [X, 5] (int64), a `BlockMask`, or torchtune's own mask [B, T, T].
    """
    if isinstance(mask, BlockMask):
        # Inside a compiled layer FlexAttention is compiled with it; on a CPU it runs uncompiled.
        as_it_is = torch.compiler.is_compiling() or not q.is_cuda
        attention = flex_attention if as_it_is else _compiled(flex_attention)
        if queries_per_key > 1:  # the repetitions are neither read nor kept for the backward
            k, v = (each[:, ::queries_per_key].contiguous() for each in (k, v))
        return attention(
            *(q, k, v),
            block_mask=mask,
            enable_gqa=queries_per_key > 1,
            kernel_options=KERNEL_OPTIONS,
        )
    if mask is not None and mask.dtype == torch.long:
        return attend_blocks(q, k, v, mask)[0]
    mask = None if mask is None else mask[:, None]
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


class HeadNormAttention(MultiHeadAttention):
    """torchtune's attention with each head's queries and keys normalised before the rotation.

    torchtune's own applies `q_norm` and `k_norm` after the rotation, which no family here does.
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | BlockMask | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """The attention layer's output, [B, T, D].

        Args:
            x: [B, T, D] hidden states.
            y: the same; torchtune's decoder passes it.
            mask: as of `attend`.
            input_pos: [B, T] position ids.
        """
        B, T, _ = x.shape
        q_BTHE = self.q_norm(self.q_proj(x).view(B, T, self.num_heads, self.head_dim))
        k_BTKE = self.k_norm(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim))
        v_BKTE = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q_BHTE = self.pos_embeddings(q_BTHE, input_pos=input_pos).transpose(1, 2)
        k_BKTE = self.pos_embeddings(k_BTKE, input_pos=input_pos).transpose(1, 2)
        copies = self.num_heads // self.num_kv_heads
        k_BHTE, v_BHTE = (each.repeat_interleave(copies, dim=1) for each in (k_BKTE, v_BKTE))
        causal = mask is None and self.is_causal
        out_BHTE = self._attention_call(
            q_BHTE, k_BHTE, v_BHTE, mask=mask, dropout_p=0.0, is_causal=causal
        )
        return self.output_proj(out_BHTE.transpose(1, 2).reshape(B, T, -1))


def attention_blocks(
    causal: Sequence[tuple[int, int]], full_blocks: Sequence[tuple[int, int, int, int]]
) -> Tensor:
    """[X, 5] the blocks of pairs to compute, int64; empty ones are left out.

    A block is (query start, query stop, key start, key stop, 1 if causal else 0).

    Args:
        causal: (start, stop) of tokens that attend to each other causally: prompts, responses,
            padding. Every token is in exactly one.
        full_blocks: (start, stop) of queries and (start, stop) of earlier keys, all of which each
            query attends to: the responses of a group, and their prompt.
    """
    blocks = [(start, stop, start, stop, 1) for start, stop in causal]
    blocks += [(*queries_and_keys, 0) for queries_and_keys in full_blocks]
    kept = [block for block in blocks if block[0] < block[1] and block[2] < block[3]]
    return torch.tensor(kept, dtype=torch.long).view(-1, 5)


@torch.library.custom_op("steerlm2::attend_blocks", mutates_args=())
def attend_blocks(
    q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, blocks_X5: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the pairs of the blocks, on the CPU.

    Returns:
        softmax(q k^T / sqrt(E)) v, [B, H, T, E], and its log-sum-exps, [B, H, T] float32.
    """
    out_BHTE = torch.empty_like(q_BHTE)
    lse_BHT = q_BHTE.new_empty(q_BHTE.shape[:-1], dtype=torch.float32)
    for queries, keys, is_causal in _slices(blocks_X5):
        out_BHQE, lse_BHQ = _flash(
            q_BHTE[:, :, queries], k_BHTE[:, :, keys], v_BHTE[:, :, keys], is_causal=is_causal
        )
        if is_causal:
            out_BHTE[:, :, queries], lse_BHT[:, :, queries] = out_BHQE, lse_BHQ
            continue
        # out = (e^lse_0 out_0 + e^lse out) / (e^lse_0 + e^lse)
        lse_0_BHQ = lse_BHT[:, :, queries]
        share_BHQ1 = torch.sigmoid(lse_BHQ - lse_0_BHQ)[..., None].to(q_BHTE.dtype)
        out_BHTE[:, :, queries].lerp_(out_BHQE, share_BHQ1)
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
    """The gradients of q, k and v, each [B, H, T, E].

    Computed in float32: on CPUs this kernel takes several times as long for short blocks of bf16,
    and a prompt's gradient is a sum over blocks.
    """
    dtype = q_BHTE.dtype
    grad_BHTE, q_BHTE, k_BHTE, v_BHTE, out_BHTE = (
        each.float() for each in (grad_BHTE, q_BHTE, k_BHTE, v_BHTE, out_BHTE)
    )
    grads = torch.empty_like(q_BHTE), torch.empty_like(k_BHTE), torch.empty_like(v_BHTE)
    for queries, keys, is_causal in _slices(blocks_X5):
        parts = _flash_backward(
            grad_BHTE[:, :, queries],
            q_BHTE[:, :, queries],
            k_BHTE[:, :, keys],
            v_BHTE[:, :, keys],
            out_BHTE[:, :, queries],
            lse_BHT[:, :, queries],
            0.0,
            is_causal,
        )
        for grad, tokens, part in zip(grads, (queries, keys, keys), parts, strict=True):
            if is_causal:
                grad[:, :, tokens] = part
            else:
                grad[:, :, tokens] += part
    q_grad, k_grad, v_grad = (grad.to(dtype) for grad in grads)
    return q_grad, k_grad, v_grad


def _slices(blocks_X5: Tensor) -> Iterator[tuple[slice, slice, bool]]:
    """Each block's queries, its keys, and whether it is causal."""
    for query_start, query_stop, key_start, key_stop, is_causal in blocks_X5.tolist():
        yield slice(query_start, query_stop), slice(key_start, key_stop), bool(is_causal)


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
    """The gradients of the inputs; the log-sum-exps have none, as `attend` doesn't return them."""
    return *_attend_blocks_backward(grad_BHTE, *ctx.saved_tensors), None


attend_blocks.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def flex_mask(group_T: Tensor, segment_T: Tensor) -> BlockMask:
    """`steerlm2.data.packing.PackedSequence.attention_mask_TT` as FlexAttention's block mask.

    On a GPU it is computed there, without the dense mask [T, T].

    Args:
        group_T: [T] as in `PackedSequence`; segment_T alike.
    """
    length = len(group_T)
    create = _compiled(create_block_mask) if group_T.is_cuda else create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_T[k] == 0) | (segment_T[q] == segment_T[k])
        return (q >= k) & (group_T[q] == group_T[k]) & own

    return create(sees, None, None, length, length, device=group_T.device)


@functools.cache
def _compiled(function: Any) -> Any:
    """Packed sequences have many lengths: static shapes would be compiled anew for each.

    Compiled at the first use: importing the compiler takes seconds.
    """
    return torch.compile(function, dynamic=True)
