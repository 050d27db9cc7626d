"""Sampling with the decoder itself: every prompt is computed once for its n samples.

Dimension letters: P cached sequences (one a prompt), S tokens of a forward, M slots of a sequence
for samples, N samples of a prompt, C columns of the cache, T tokens of a response, L live samples,
D hidden, V vocabulary, K key/value heads, G query heads that share one, H all query heads, E head
size.

A sequence of the key/value cache is a prompt with all its samples: as in a packed sequence of
training, a token of a sample attends to the prompt and to its own sample. The prompt's keys and
values are neither copied nor read n times, and the n next tokens of a prompt are computed together.
A tensor beside the cache holds the owner of each column, so columns can have any order: behind a
short prompt there are empty columns, and the columns of finished samples are removed from time to
time (`compact`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from steerlm2.data.records import LENGTH, STOP
from steerlm2.inference.engines import Request, Sample, SamplingSettings
from steerlm2.inference.sampling import choose_tokens
from steerlm2.models.attention import HeadNormAttention
from steerlm2.models.decoders import end_at_hidden_states, output_weight

PROMPT, EMPTY = -1, -2
"""Owners of columns and slots besides the samples, which have numbers from 0."""

STEPS_BETWEEN_COMPACTIONS = 32
"""A choice: a compaction copies the cache, and until the next one finished samples keep their
columns, and the cache has room for this many tokens more of every sample."""
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16}
"""A check which samples have ended makes the host wait for a GPU; without one ended samples are
computed further, at most so many steps. A divisor of STEPS_BETWEEN_COMPACTIONS."""


class LocalEngine:
    """Samples with a decoder on one device. It changes the decoder, which can't be used otherwise.

    Args:
        decoder: with its weights, not sharded, on this device.
        settings: of every response.
        max_cache_tokens: prompts are sampled together while their tokens and those of all their
            samples at full length are at most so many. A single prompt may have more.
    """

    def __init__(
        self, decoder: TransformerDecoder, settings: SamplingSettings, *, max_cache_tokens: int
    ) -> None:
        self.decoder = SharedPromptDecoder(decoder.eval())
        self.settings = settings
        self.max_cache_tokens = max_cache_tokens
        self._forbidden = torch.tensor(
            settings.forbidden_ids, dtype=torch.long, device=self.decoder.device
        )

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """[request][n] samples, in the order of the requests.

        The samples of a request don't depend on the other requests, up to rounding: a draw within
        rounding of the boundary between two tokens can go either way.

        Raises:
            ValueError: where the model's probabilities are not finite.
        """
        found: dict[int, list[Sample]] = {}
        for batch in self._batches(requests):
            found |= zip(batch, self._sample_together([requests[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(requests))]

    def close(self) -> None:
        self.decoder.clear()

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indices of the requests that are sampled together, the longest prompts first."""
        sample_tokens = self.settings.n * self.settings.max_new_tokens
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        while order:
            size = max(1, self.max_cache_tokens // (len(requests[order[0]].prompt) + sample_tokens))
            yield order[:size]
            order = order[size:]

    @torch.no_grad()
    def _sample_together(self, requests: Sequence[Request]) -> list[list[Sample]]:
        wanted, device = self.settings, self.decoder.device
        shape = (len(requests), wanted.n)
        uniform_PNT = self._uniform(requests).to(device)
        tokens_PNT = torch.zeros(*shape, wanted.max_new_tokens, dtype=torch.long, device=device)
        log_prob_PN = torch.zeros(shape, dtype=torch.float64, device=device)
        num_tokens_PN = torch.zeros(shape, dtype=torch.long, device=device)

        sample_PM = own_sample_PM = torch.arange(wanted.n, device=device).expand(shape)
        request_PM = torch.arange(len(requests), device=device)[:, None].expand(shape)
        hidden_PD = self.decoder.prefill([request.prompt for request in requests])
        logits_PMV = self.decoder.logits(hidden_PD)[:, None].expand(-1, wanted.n, -1)
        slots = (sample_PM != EMPTY).nonzero(as_tuple=True)
        steps_between_checks = STEPS_BETWEEN_CHECKS[device.type]
        for step in range(wanted.max_new_tokens):
            # Samples that have ended since the last check are drawn too, and the draws dropped.
            live_L = sample_PM[slots] != EMPTY
            owners = (request_PM[slots], own_sample_PM[slots])
            next_L, log_prob_L = self._draw(logits_PMV[slots], uniform_PNT[(*owners, step)])
            next_L = next_L.where(live_L, 0)
            tokens_PNT[(*owners, step)] = next_L
            log_prob_PN[owners] += log_prob_L.where(live_L, 0)
            num_tokens_PN[owners] += live_L

            next_PM = torch.zeros_like(sample_PM).index_put(slots, next_L)
            sample_PM = sample_PM.where(next_PM != wanted.stop_id, EMPTY)
            if step + 1 == wanted.max_new_tokens:
                break
            if step % steps_between_checks == 0:
                live_PM = sample_PM != EMPTY
                if not live_PM.any():
                    break
                if step % STEPS_BETWEEN_COMPACTIONS == 0:
                    kept_P = live_PM.any(dim=1).nonzero().squeeze(1)
                    slots_PM = _first(live_PM[kept_P])
                    sample_PM, own_sample_PM, request_PM, next_PM = (
                        each[kept_P].gather(1, slots_PM)
                        for each in (sample_PM, own_sample_PM, request_PM, next_PM)
                    )
                    self.decoder.compact(kept_P, sample_PM)
                slots = (sample_PM != EMPTY).nonzero(as_tuple=True)
            logits_PMV = self.decoder.logits(self.decoder.step(next_PM, sample_PM))

        if not log_prob_PN.isfinite().all():
            raise ValueError("the model's probabilities are not finite: its weights are damaged, "
                             "or dtype is too small for them")  # fmt: skip
        return [
            [
                self._sample_of(tokens[:length], log_prob)
                for tokens, length, log_prob in zip(*samples, strict=True)
            ]
            for samples in zip(
                tokens_PNT.tolist(), num_tokens_PN.tolist(), log_prob_PN.tolist(), strict=True
            )
        ]

    def _draw(self, logits_LV: Tensor, uniform_L: Tensor) -> tuple[Tensor, Tensor]:
        """[L] tokens, and [L] their log-probs before temperature, top-p and forbidden tokens."""
        wanted = self.settings
        allowed_LV = logits_LV.index_fill(-1, self._forbidden, -torch.inf)
        next_L = choose_tokens(allowed_LV, wanted.temperature, wanted.top_p, uniform_L)
        log_prob_L = logits_LV.gather(1, next_L[:, None]).squeeze(1) - logits_LV.logsumexp(dim=1)
        return next_L, log_prob_L.double()

    def _uniform(self, requests: Sequence[Request]) -> Tensor:
        """[P, N, T] numbers from [0, 1): those of a response depend on its seed alone."""
        length = self.settings.max_new_tokens
        numbers = [
            [_uniform(request.seed + j, length) for j in range(self.settings.n)]
            for request in requests
        ]
        return torch.from_numpy(np.array(numbers))

    def _sample_of(self, tokens: list[int], log_prob: float) -> Sample:
        reason = STOP if tokens[-1] == self.settings.stop_id else LENGTH
        return Sample(tokens, reason, log_prob)


class SharedPromptDecoder:
    """A decoder with a key/value cache in which all samples of a prompt are one sequence.

    Call `prefill`, then `compact`, and then `step` at most STEPS_BETWEEN_COMPACTIONS times between
    two calls of `compact`.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        end_at_hidden_states(decoder)
        self.decoder = decoder
        self.device = decoder.tok_embeddings.weight.device
        self.attentions: list[CachedAttention] = []
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
        return (hidden @ output_weight(self.decoder).t()).float()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """[P, D] hidden states at the last tokens of prompts; each begins a cached sequence."""
        self.clear()
        sequences = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        tokens_PS = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(self.device)
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        position_S = torch.arange(tokens_PS.shape[1], device=self.device)
        # Padding comes after the prompts, so the causal mask hides it from them.
        hidden_PSD = self.decoder(tokens_PS, input_pos=position_S.expand_as(tokens_PS))
        self._owner_PC = torch.where(position_S < length_P[:, None], PROMPT, EMPTY)
        self._next_pos_P = length_P
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
            kept_P: [P] indices of the sequences to keep, in their new order.
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

    A call without a mask is causal, and begins the cache.
    """

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        self.attention = attention
        # The decoder reads these attributes of its layers; None means that it has no cache to fill.
        self.kv_cache, self.cache_enabled = None, False
        self.clear()

    def clear(self) -> None:
        self.keys_PKCE = self.values_PKCE = torch.empty(0)
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
            self.keys_PKCE, self.values_PKCE, self.num_columns = k_PKSE, v_PKSE, S
            out_PHSE = scaled_dot_product_attention(
                q_PSHE.transpose(1, 2), k_PKSE, v_PKSE, is_causal=True, enable_gqa=True
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
        self.keys_PKCE = self._kept(self.keys_PKCE, kept_P, columns_PC, room)
        self.values_PKCE = self._kept(self.values_PKCE, kept_P, columns_PC, room)
        self.num_columns = columns_PC.shape[1]

    def _extended(self, k_PKSE: Tensor, v_PKSE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at the end."""
        start, end = self.num_columns, self.num_columns + k_PKSE.shape[2]
        assert end <= self.keys_PKCE.shape[2], "compact makes room for the steps that follow"
        self.keys_PKCE[:, :, start:end] = k_PKSE
        self.values_PKCE[:, :, start:end] = v_PKSE
        self.num_columns = end
        return self.keys_PKCE[:, :, :end], self.values_PKCE[:, :, :end]

    def _kept(self, cache_PKCE: Tensor, kept_P: Tensor, columns_PC: Tensor, room: int) -> Tensor:
        _, K, _, E = cache_PKCE.shape
        P, C = columns_PC.shape
        kept_PKCE = cache_PKCE.new_empty(P, K, C + room, E)
        columns_PKCE = columns_PC[:, None, :, None].expand(P, K, C, E)
        kept_PKCE[:, :, :C] = cache_PKCE[kept_P].gather(2, columns_PKCE)
        return kept_PKCE


def _first(marked_PC: Tensor) -> Tensor:
    """[P, c] indices of the marked columns of each sequence, in their order.

    c is the largest number of marked columns of a sequence; those with fewer are filled up with
    indices of columns that aren't marked.
    """
    most = int(marked_PC.sum(dim=1).max())
    return marked_PC.int().sort(dim=1, descending=True, stable=True).indices[:, :most]


def _uniform(seed: int, count: int) -> np.ndarray:
    """[count] numbers from [0, 1), float32: an independent stream for every seed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)
