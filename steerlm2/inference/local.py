"""Sampling with the decoder itself: every prompt is computed once for its n samples.

Dimension letters: P prompts (rows), S tokens of a row, M slots of a row for samples, N samples of
a prompt, C columns of the cache, T tokens of a response, D hidden, V vocabulary, K key/value heads,
G query heads that share one, E head size.

A row of the cache is a prompt, and all its samples: as in a packed training row, a token of a
sample sees the prompt and the tokens of its own sample. The prompt's keys and values are neither
copied nor read n times, and the n next tokens of a prompt are one step of its row. Which column
belongs to whom is kept beside the cache, so that columns may have any order: prompts of different
lengths have columns of nobody behind them, and what finished samples leave is taken out every now
and then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from steerlm2.inference.engines import LENGTH, STOP, Request, Sample, SamplingSettings
from steerlm2.inference.sampling import choose_tokens
from steerlm2.models.llama import end_at_hidden_states, output_weight

PROMPT, NOBODY = -1, -2
"""Owners of columns and slots that aren't the number of a sample."""

STEPS_BETWEEN_TIDYING = 32


class LocalEngine:
    """Samples with a decoder on one device; the decoder is changed for it, and belongs to it.

    Args:
        decoder: with its weights, whole on this device.
        settings: of every response.
        max_cache_tokens: prompts are sampled together as long as their tokens, and those of all
            their samples at full length, are at most so many. A single prompt may have more.
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
        """[request][n], in their order.

        What is sampled for a request doesn't depend on the others, up to rounding: a draw can turn
        out differently where it falls between two tokens to the last digits.

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
        """Places of requests that are sampled together, the longest prompts first."""
        of_samples = self.settings.n * self.settings.max_new_tokens
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        while order:
            size = max(1, self.max_cache_tokens // (len(requests[order[0]].prompt) + of_samples))
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

        sample_PM = torch.arange(wanted.n, device=device).expand(shape)
        request_PM = torch.arange(len(requests), device=device)[:, None].expand(shape)
        hidden_PD = self.decoder.prefill([request.prompt for request in requests])
        logits_PMV = self.decoder.logits(hidden_PD)[:, None].expand(-1, wanted.n, -1)
        for step in range(wanted.max_new_tokens):
            live_PM = sample_PM != NOBODY
            live = (request_PM[live_PM], sample_PM[live_PM])
            next_L, log_prob_L = self._draw(logits_PMV[live_PM], uniform_PNT[(*live, step)])
            tokens_PNT[(*live, step)] = next_L
            log_prob_PN[live] += log_prob_L
            num_tokens_PN[live] += 1

            next_PM = torch.zeros_like(sample_PM).masked_scatter(live_PM, next_L)
            sample_PM = sample_PM.where(next_PM != wanted.stop_id, NOBODY)
            live_PM = sample_PM != NOBODY
            if step + 1 == wanted.max_new_tokens or not live_PM.any():
                break
            if step % STEPS_BETWEEN_TIDYING == 0:
                rows_P = live_PM.any(dim=1).nonzero().squeeze(1)
                slots_PM = _first(live_PM[rows_P])
                sample_PM, request_PM, next_PM = (
                    each[rows_P].gather(1, slots_PM) for each in (sample_PM, request_PM, next_PM)
                )
                self.decoder.tidy(rows_P, sample_PM)
            logits_PMV = self.decoder.logits(self.decoder.step(next_PM, sample_PM))

        if not log_prob_PN.isfinite().all():
            raise ValueError("the model's probabilities are not finite: its weights are damaged, "
                             "or dtype is too small for them")  # fmt: skip
        return [
            [
                self._sample_of(tokens[:length], log_prob)
                for tokens, length, log_prob in zip(*rows, strict=True)
            ]
            for rows in zip(
                tokens_PNT.tolist(), num_tokens_PN.tolist(), log_prob_PN.tolist(), strict=True
            )
        ]

    def _draw(self, logits_LV: Tensor, uniform_L: Tensor) -> tuple[Tensor, Tensor]:
        """[L] tokens and their log-probs, which are those before anything is scaled or cut."""
        wanted = self.settings
        allowed_LV = logits_LV.index_fill(-1, self._forbidden, -torch.inf)
        next_L = choose_tokens(allowed_LV, wanted.temperature, wanted.top_p, uniform_L)
        log_prob_L = logits_LV.gather(1, next_L[:, None]).squeeze(1) - logits_LV.logsumexp(dim=1)
        return next_L, log_prob_L.double()

    def _uniform(self, requests: Sequence[Request]) -> Tensor:
        """[P, N, T] numbers from [0, 1): a response's own, from its seed alone."""
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
    """A decoder with a cache whose rows are prompts with all their samples.

    prefill -> step, step, ..., now and then tidy -> step, ...
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
        """[P, D] hidden states at the ends of prompts, which become the rows of the cache."""
        self.clear()
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        tokens_PS = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        place_S = torch.arange(tokens_PS.shape[1], device=self.device)
        # Padding stands behind the prompts: the causal mask keeps them from seeing it.
        hidden_PSD = self.decoder(tokens_PS, input_pos=place_S.expand_as(tokens_PS))
        self._owner_PC = torch.where(place_S < length_P[:, None], PROMPT, NOBODY)
        self._next_pos_P = length_P
        return hidden_PSD[torch.arange(len(rows), device=self.device), length_P - 1]

    def step(self, tokens_PM: Tensor, sample_PM: Tensor) -> Tensor:
        """[P, M, D] hidden states at the next token of each sample.

        Args:
            sample_PM: which sample of its prompt a token belongs to; NOBODY for an empty slot.
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

    def tidy(self, rows_P: Tensor, sample_PM: Tensor) -> None:
        """Keep some rows, and of their columns the prompts' and those of samples that go on.

        Args:
            rows_P: the rows that stay, in their new order.
            sample_PM: the samples that go on in them.
        """
        owner_PC = self._owner_PC[rows_P]
        kept_PC = (owner_PC[:, :, None] == sample_PM[:, None]).any(dim=-1) & (owner_PC != NOBODY)
        kept_PC |= owner_PC == PROMPT
        columns_PC = _first(kept_PC)
        self._owner_PC = owner_PC.where(kept_PC, NOBODY).gather(1, columns_PC)
        self._next_pos_P = self._next_pos_P[rows_P]
        room = STEPS_BETWEEN_TIDYING * sample_PM.shape[1]
        for attention in self.attentions:
            attention.keep(rows_P, columns_PC, room)

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.tok_embeddings.weight.dtype


class CachedAttention(nn.Module):
    """torchtune's attention, its layers and head counts, over the keys and values of all calls.

    A call without a mask is causal, and begins the cache.
    """

    def __init__(self, attention: MultiHeadAttention) -> None:
        super().__init__()
        assert attention.q_norm is None, "no Llama normalises its queries"
        self.attention = attention
        # The decoder asks its layers for them; this cache is none of its business.
        self.kv_cache, self.cache_enabled = None, False
        self.clear()

    def clear(self) -> None:
        self.keys_PKCE = self.values_PKCE = torch.empty(0)
        self.num_columns = 0

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None, input_pos: Tensor
    ) -> Tensor:
        """[P, S, D]

        Args:
            x: [P, S, D].
            y: the same.
            mask: [P, S, C], added to the scores of the S tokens with all columns, their own among
                them.
            input_pos: [P, S].
        """
        own = self.attention
        P, S, _ = x.shape
        q_PSHE = own.q_proj(x).view(P, S, own.num_heads, own.head_dim)
        k_PSKE = own.k_proj(x).view(P, S, own.num_kv_heads, own.head_dim)
        v_PKSE = own.v_proj(x).view(P, S, own.num_kv_heads, own.head_dim).transpose(1, 2)
        q_PSHE = own.pos_embeddings(q_PSHE, input_pos=input_pos)
        k_PKSE = own.pos_embeddings(k_PSKE, input_pos=input_pos).transpose(1, 2)
        if mask is None:
            self.keys_PKCE, self.values_PKCE, self.num_columns = k_PKSE, v_PKSE, S
            out_PHSE = scaled_dot_product_attention(
                q_PSHE.transpose(1, 2), k_PKSE, v_PKSE, is_causal=True, enable_gqa=True
            )
            return own.output_proj(out_PHSE.transpose(1, 2).reshape(P, S, -1))
        keys_PKCE, values_PKCE = self._extended(k_PKSE, v_PKSE)
        # The heads that share keys and values are further queries: nothing is copied for them.
        q_PKGSE = q_PSHE.view(P, S, own.num_kv_heads, -1, own.head_dim).permute(0, 2, 3, 1, 4)
        G = q_PKGSE.shape[2]
        out_PKQE = scaled_dot_product_attention(
            q_PKGSE.flatten(2, 3), keys_PKCE, values_PKCE, attn_mask=mask.repeat(1, G, 1)[:, None]
        )
        out_PSKGE = out_PKQE.view(P, -1, G, S, own.head_dim).permute(0, 3, 1, 2, 4)
        return own.output_proj(out_PSKGE.reshape(P, S, -1))

    def keep(self, rows_P: Tensor, columns_PC: Tensor, room: int) -> None:
        """Keep some rows and of each some columns, with room for so many more."""
        self.keys_PKCE = self._kept(self.keys_PKCE, rows_P, columns_PC, room)
        self.values_PKCE = self._kept(self.values_PKCE, rows_P, columns_PC, room)
        self.num_columns = columns_PC.shape[1]

    def _extended(self, k_PKSE: Tensor, v_PKSE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones at the end."""
        start, end = self.num_columns, self.num_columns + k_PKSE.shape[2]
        assert end <= self.keys_PKCE.shape[2], "tidy makes room for the steps that follow"
        self.keys_PKCE[:, :, start:end] = k_PKSE
        self.values_PKCE[:, :, start:end] = v_PKSE
        self.num_columns = end
        return self.keys_PKCE[:, :, :end], self.values_PKCE[:, :, :end]

    def _kept(self, cache_PKCE: Tensor, rows_P: Tensor, columns_PC: Tensor, room: int) -> Tensor:
        _, K, _, E = cache_PKCE.shape
        P, C = columns_PC.shape
        kept_PKCE = cache_PKCE.new_empty(P, K, C + room, E)
        columns_PKCE = columns_PC[:, None, :, None].expand(P, K, C, E)
        kept_PKCE[:, :, :C] = cache_PKCE[rows_P].gather(2, columns_PKCE)
        return kept_PKCE


def _first(marked_PC: Tensor) -> Tensor:
    """[P, c] places of the marked columns of each row, in their order; c is the most that a row
    has, and rows with fewer go on with places that aren't marked."""
    most = int(marked_PC.sum(dim=1).max())
    return marked_PC.int().sort(dim=1, descending=True, stable=True).indices[:, :most]


def _uniform(seed: int, count: int) -> np.ndarray:
    """Numbers from [0, 1), float32: a stream of its own for every seed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)
