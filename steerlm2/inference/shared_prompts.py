"""A decoder whose cache holds every prompt once, with all its samples.

Dimension letters: P cached sequences (one a prompt), S tokens of a forward, M slots of a sequence
for samples, C columns of the cache, D hidden, V vocabulary, K key/value heads, G query heads that
share one, H all query heads, E head size.

A sequence of the key/value cache is a prompt with all its samples: as in a packed sequence of
training, a token of a sample attends to the prompt and to its own sample. The prompt's keys and
values are neither copied nor read n times, and the n next tokens of a prompt are computed together.
A tensor beside the cache holds the owner of each column, so columns can have any order: behind a
short prompt there are empty columns, and the columns of finished samples are removed from time to
time (`compact`), when new prompts can join too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from steerlm2.models.attention import HeadNormAttention
from steerlm2.models.decoders import end_at_hidden_states, output_weight

PACKED_FROM = 2**22
"""Numbers of an output matrix, from which on a CPU reads it faster when it is packed: it no longer
fits a core's cache."""

ROWS_PACKED_FOR = 10
"""Any few rows give the same layout; for one row it would be another, slower for several."""

PROMPT, EMPTY = -1, -2
"""Owners of columns and slots besides the samples, which have numbers from 0."""

STEPS_BETWEEN_COMPACTIONS = 32
"""A choice: a compaction copies the cache, and until the next one finished samples keep their
columns, and the cache has room for this many tokens more of every sample."""


class SharedPromptDecoder:
    """A decoder with a key/value cache in which all samples of a prompt are one sequence.

    After `prefill`, which may come at any time, the next call is of `compact`. `step` is called at
    most STEPS_BETWEEN_COMPACTIONS times between two calls of `compact`.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        end_at_hidden_states(decoder)
        self.decoder = decoder
        self.device = decoder.tok_embeddings.weight.device
        self.attentions: list[CachedAttention] = []
        self._packed_output = _packed(output_weight(decoder))
        for layer in decoder.layers:
            layer.attn = CachedAttention(layer.attn)
            self.attentions.append(layer.attn)
        self.clear()

    def clear(self) -> None:
        """Free the cache."""
        self._owner_PC = torch.empty(0, 0, dtype=torch.long, device=self.device)
        self._next_pos_P = torch.empty(0, dtype=torch.long, device=self.device)
        for attention in self.attentions:
            attention.clear()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D], float32."""
        if self._packed_output is not None:
            return torch.ops.mkldnn._linear_pointwise(
                hidden, self._packed_output, None, "none", [], ""
            )
        return (hidden @ output_weight(self.decoder).t()).float()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """[P, D] hidden states at the last tokens of prompts.

        Each begins a sequence; they follow the cached ones, where `compact` adds them to the cache.
        """
        sequences = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        tokens_PS = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        position_S = torch.arange(tokens_PS.shape[1], device=self.device)
        # Padding comes after the prompts, so the causal mask hides it from them.
        hidden_PSD = self.decoder(tokens_PS, input_pos=position_S.expand_as(tokens_PS))
        owner_PC = torch.where(position_S < length_P[:, None], PROMPT, EMPTY)
        self._owner_PC = _stacked(self._owner_PC, owner_PC, EMPTY)
        self._next_pos_P = torch.cat([self._next_pos_P, length_P])
        return hidden_PSD[torch.arange(len(sequences), device=self.device), length_P - 1]

    def step(self, tokens_PM: Tensor, sample_PM: Tensor) -> Tensor:
        """[P, M, D] hidden states at the next token of each sample.

        Args:
            tokens_PM: [P, M] the next tokens, one a slot.
            sample_PM: [P, M] which sample of its prompt a token belongs to; EMPTY for an empty
                slot.
        """
        self._owner_PC = torch.cat([self._owner_PC, sample_PM], dim=1)
        owner_P1C = self._owner_PC[:, None]
        seen_PMC = (owner_P1C == PROMPT) | (owner_P1C == sample_PM[:, :, None])
        bias_PMC = torch.zeros(seen_PMC.shape, dtype=self._dtype, device=self.device)
        hidden_PMD = self.decoder(
            tokens_PM,
            mask=bias_PMC.masked_fill(~seen_PMC, -torch.inf),
            input_pos=self._next_pos_P[:, None].expand_as(tokens_PM),
        )
        self._next_pos_P = self._next_pos_P + 1
        return hidden_PMD

    def compact(self, kept_P: Tensor, sample_PM: Tensor) -> None:
        """Remove finished sequences, and the columns of finished samples from the others.

        Args:
            kept_P: [P] indices of the sequences to keep, in their new order; those of a `prefill`
                since the last call come after the others.
            sample_PM: [P, M] their unfinished samples; EMPTY for an empty slot.
        """
        owner_PC = self._owner_PC[kept_P]
        kept_PC = (owner_PC[:, :, None] == sample_PM[:, None]).any(dim=-1) & (owner_PC != EMPTY)
        kept_PC |= owner_PC == PROMPT
        columns_PC = _first(kept_PC)
        self._owner_PC = owner_PC.where(kept_PC, EMPTY).gather(1, columns_PC)
        self._next_pos_P = self._next_pos_P[kept_P]
        room = STEPS_BETWEEN_COMPACTIONS * sample_PM.shape[1]
        for attention in self.attentions:
            attention.keep(kept_P, columns_PC, room)

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.tok_embeddings.weight.dtype


class CachedAttention(nn.Module):
    """torchtune's attention, its layers and head counts, over the keys and values of all calls.

    A call without a mask is causal: its sequences begin, beside the cache until `keep` is called.
    """

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention
        # The decoder reads these attributes of its layers; None means that it has no cache to fill.
        self.kv_cache, self.cache_enabled = None, False
        self.clear()

    def clear(self) -> None:
        self.keys_PKCE: Tensor | None = None
        self.values_PKCE: Tensor | None = None
        self.new_keys_PKSE: Tensor | None = None
        self.new_values_PKSE: Tensor | None = None
        self.num_columns = 0

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None, input_pos: Tensor
    ) -> Tensor:
        """The attention layer's output, [P, S, D].

        Args:
            x: [P, S, D] hidden states.
            y: the same; torchtune's decoder passes it.
            mask: [P, S, C], added to the attention scores; C includes the columns of these tokens.
            input_pos: [P, S] position ids.
        """
        own = self.attention
        P, S, _ = x.shape
        q_PSHE = own.q_proj(x).view(P, S, own.num_heads, own.head_dim)
        k_PSKE = own.k_proj(x).view(P, S, own.num_kv_heads, own.head_dim)
        v_PKSE = own.v_proj(x).view(P, S, own.num_kv_heads, own.head_dim).transpose(1, 2)
        if isinstance(own, HeadNormAttention):
            q_PSHE, k_PSKE = own.q_norm(q_PSHE), own.k_norm(k_PSKE)
        q_PSHE = own.pos_embeddings(q_PSHE, input_pos=input_pos)
        k_PKSE = own.pos_embeddings(k_PSKE, input_pos=input_pos).transpose(1, 2)
        if mask is None:
            self.new_keys_PKSE, self.new_values_PKSE = k_PKSE, v_PKSE
            # Repeated here: not every kernel that keeps no [S, S] scores does it itself.
            G = own.num_heads // own.num_kv_heads
            k_PHSE, v_PHSE = (each.repeat_interleave(G, dim=1) for each in (k_PKSE, v_PKSE))
            out_PHSE = scaled_dot_product_attention(
                q_PSHE.transpose(1, 2), k_PHSE, v_PHSE, is_causal=True
            )
            return own.output_proj(out_PHSE.transpose(1, 2).reshape(P, S, -1))
        keys_PKCE, values_PKCE = self._extended(k_PKSE, v_PKSE)
        # Query heads that share a key/value head count as further queries, so nothing is copied.
        q_PKGSE = q_PSHE.view(P, S, own.num_kv_heads, -1, own.head_dim).permute(0, 2, 3, 1, 4)
        G = q_PKGSE.shape[2]
        out_PKQE = scaled_dot_product_attention(
            q_PKGSE.flatten(2, 3), keys_PKCE, values_PKCE, attn_mask=mask.repeat(1, G, 1)[:, None]
        )
        out_PSKGE = out_PKQE.view(P, -1, G, S, own.head_dim).permute(0, 3, 1, 2, 4)
        return own.output_proj(out_PSKGE.reshape(P, S, -1))

    def keep(self, kept_P: Tensor, columns_PC: Tensor, room: int) -> None:
        """Keep some sequences and some columns of each, with room for so many columns more.

        Args:
            kept_P: [P] indices of the sequences to keep, in their new order.
            columns_PC: [P, C] indices of the columns to keep, in their new order.
            room: columns that can be added before the next call.
        """
        self.keys_PKCE = self._kept(self.keys_PKCE, self.new_keys_PKSE, kept_P, columns_PC, room)
        self.values_PKCE = self._kept(
            self.values_PKCE, self.new_values_PKSE, kept_P, columns_PC, room
        )
        self.new_keys_PKSE = self.new_values_PKSE = None
        self.num_columns = columns_PC.shape[1]

    def _extended(self, k_PKSE: Tensor, v_PKSE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at the end."""
        start, end = self.num_columns, self.num_columns + k_PKSE.shape[2]
        assert self.keys_PKCE is not None, "prefill and compact come first"
        assert self.values_PKCE is not None
        assert end <= self.keys_PKCE.shape[2], "compact makes room for the steps that follow"
        self.keys_PKCE[:, :, start:end] = k_PKSE
        self.values_PKCE[:, :, start:end] = v_PKSE
        self.num_columns = end
        return self.keys_PKCE[:, :, :end], self.values_PKCE[:, :, :end]

    def _kept(
        self,
        cache_PKCE: Tensor | None,
        new_PKSE: Tensor | None,
        kept_P: Tensor,
        columns_PC: Tensor,
        room: int,
    ) -> Tensor:
        if cache_PKCE is not None:
            cache_PKCE = cache_PKCE[:, :, : self.num_columns]
        if new_PKSE is not None:
            cache_PKCE = new_PKSE if cache_PKCE is None else _stacked(cache_PKCE, new_PKSE, 0)
        assert cache_PKCE is not None, "prefill comes first"
        _, K, _, E = cache_PKCE.shape
        P, C = columns_PC.shape
        kept_PKCE = cache_PKCE.new_empty(P, K, C + room, E)
        columns_PKCE = columns_PC[:, None, :, None].expand(P, K, C, E)
        kept_PKCE[:, :, :C] = cache_PKCE[kept_P].gather(2, columns_PKCE)
        return kept_PKCE


def _packed(weight: Tensor) -> Tensor | None:
    """A copy of a large float32 matrix on a CPU, in the layout of oneDNN's product for a few rows.

    That product takes half the time of the usual one, and is the larger part of a step at a large
    vocabulary. torch.compile packs weights so; the operations are PyTorch's own and not public.
    None: the usual product is as good, or there is no other.
    """
    is_large = weight.device.type == "cpu" and weight.numel() >= PACKED_FROM
    if not is_large or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_PACKED_FOR)
    except (AttributeError, RuntimeError):
        return None
    return packed


def _stacked(one: Tensor, other: Tensor, filler: int) -> Tensor:
    """Sequences [P, C] or [P, K, C, E] of both, the shorter ones filled up."""
    columns = 1 if one.dim() == 2 else 2
    most = max(one.shape[columns], other.shape[columns])
    behind = (0, 0) * (one.dim() - 1 - columns)
    return torch.cat(
        [pad(each, (*behind, 0, most - each.shape[columns]), value=filler) for each in (one, other)]
    )


def _first(marked_PC: Tensor) -> Tensor:
    """[P, c] indices of the marked columns of each sequence, in their order.

    c is the largest number of marked columns of a sequence; those with fewer are filled up with
    indices of columns that aren't marked.
    """
    most = int(marked_PC.sum(dim=1).max())
    return marked_PC.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
