"""Streaming by the decoder itself: one request after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from torchtune.modules import TransformerDecoder

from steerlm2.inference.engines import Request, SamplingSettings
from steerlm2.inference.local import LocalEngine
from steerlm2.inference.streaming import GenerationSettings, Piece


class LocalStreamingEngine:
    """A stand-in: answers come token by token, but only once all are known."""

    def __init__(
        self,
        decoder: TransformerDecoder,
        *,
        stop_id: int,
        forbidden_ids: Sequence[int],
        max_seq_len: int,
        max_cache_tokens: int,
    ) -> None:
        self.max_seq_len = max_seq_len
        self._stop_id, self._forbidden_ids = stop_id, tuple(forbidden_ids)
        settings = SamplingSettings(1, 1.0, 1.0, 1, stop_id, self._forbidden_ids)
        self._engine = LocalEngine(decoder, settings, max_cache_tokens=max_cache_tokens)
        self._lock = asyncio.Lock()

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        if settings.top_k or settings.top_log_probs is not None:
            raise ValueError("this engine does neither top_k nor log-probs")
        async with self._lock:
            self._engine.settings = SamplingSettings(
                settings.n,
                settings.temperature,
                settings.top_p,
                settings.max_new_tokens,
                self._stop_id,
                self._forbidden_ids,
            )
            request = Request(prompt, settings.seed)
            (samples,) = await asyncio.to_thread(self._engine.sample, [request])
        for step in range(max(len(sample.tokens) for sample in samples)):
            for answer, sample in enumerate(samples):
                if step < len(sample.tokens):
                    last = step + 1 == len(sample.tokens)
                    reason = sample.finish_reason if last else None
                    yield Piece(answer, sample.tokens[step : step + 1], None, reason)
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._engine.close()
