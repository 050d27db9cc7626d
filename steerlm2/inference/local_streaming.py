"""The local engine as one that serves: requests join and leave between two tokens.

One thread owns the decoder and decodes all requests together; each is also given back token by
token to the event loop that asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from torchtune.modules import TransformerDecoder

from steerlm2.inference.local import Decoding, Generation
from steerlm2.inference.streaming import GenerationSettings, Piece

log = logging.getLogger(__name__)

PREFILL_TOKENS = 2048
"""Prompts of so many tokens together are computed before the others' next token, or one prompt."""
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 4}
"""Tokens that come together, as of `steerlm2.inference.local`."""


class LocalStreamingEngine:
    """A `StreamingEngine` with a decoder on one device, which can't be used otherwise any more.

    Requests begin in the order in which they came, as soon as the cache has room for them.

    Args:
        decoder: with its weights, not sharded, on this device.
        stop_id: the token that ends an answer.
        forbidden_ids: tokens that aren't chosen; the probabilities of the others are renormalised.
        max_seq_len: tokens of a prompt together with its answer.
        max_cache_tokens: tokens that the cache has room for: of the prompts that are answered
            together and of all their answers at full length. Every request counts as many as the
            longest one.
    """

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
        self.max_cache_tokens = max_cache_tokens
        self._vocabulary = decoder.tok_embeddings.num_embeddings
        self._decoding = Decoding(
            decoder,
            stop_id=stop_id,
            forbidden_ids=forbidden_ids,
            steps_between_checks=STEPS_BETWEEN_CHECKS,
        )
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: deque[_Stream] = deque()
        self._running: dict[Generation, _Stream] = {}
        self._end: str | None = None
        """Why nothing is generated any more."""
        self._thread = threading.Thread(target=self._run, name="local engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        """The pieces of all answers; whoever closes the iterator ends the generation.

        An answer depends on its prompt and settings alone, not on other requests, up to rounding: a
        draw within rounding of the boundary between two tokens can go either way.

        Raises:
            ValueError: where the engine can't do what is asked.
            RuntimeError: where the engine was closed or has stopped after an error.
        """
        self._check(prompt, settings)
        stream = _Stream(Generation(list(prompt), settings))
        with self._changed:
            if self._end is not None:
                raise RuntimeError(self._end)
            self._waiting.append(stream)
            self._changed.notify()
        unfinished = settings.n
        try:
            while unfinished:
                news = await stream.news.get()
                if isinstance(news, str):
                    raise RuntimeError(news)
                for piece in news:
                    unfinished -= piece.finish_reason is not None
                    yield piece
        finally:
            stream.generation.cancelled = True

    async def close(self) -> None:
        """End what is still generated and free the cache."""
        with self._changed:
            self._end = self._end or "the local engine was closed"
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _check(self, prompt: Sequence[int], settings: GenerationSettings) -> None:
        """Refuse what can't be generated: an error later on would end all requests."""
        if not prompt:
            raise ValueError("the prompt is empty")
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise ValueError(f"the model has no tokens but 0 to {self._vocabulary - 1}")
        if settings.n < 1 or settings.max_new_tokens < 1:
            raise ValueError("n and max_new_tokens must be at least 1")
        if not (settings.temperature >= 0 and math.isfinite(settings.temperature)):
            raise ValueError("temperature must be 0 or more")
        if not 0 < settings.top_p <= 1:
            raise ValueError("top_p must be above 0 and at most 1")
        if settings.top_k < 0 or settings.seed < 0:
            raise ValueError("top_k and seed must be 0 or more")
        if not 0 <= (settings.top_log_probs or 0) <= self._vocabulary:
            raise ValueError(f"top_log_probs must be from 0 to {self._vocabulary}")
        if len(prompt) + settings.max_new_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_new_tokens {settings.max_new_tokens} "
                f"are more than the {self.max_seq_len} that a prompt and its answer can have"
            )
        needed = Generation(prompt, settings).cache_tokens
        if needed > self.max_cache_tokens:
            raise ValueError(
                f"{settings.n} answers of up to {settings.max_new_tokens} tokens and their prompt "
                f"are {needed} tokens; the engine has room for {self.max_cache_tokens}: ask for "
                f"fewer or shorter answers"
            )

    def _run(self) -> None:
        """The thread: one turn is the next tokens of all, and before it some new prompts."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._end or self._waiting or not self._decoding.is_empty
                    )
                    if self._end is not None:
                        break
                    joining = self._next_to_join()
                self._give(self._decoding.join(joining))
                self._give(self._decoding.advance())
        except Exception as error:
            log.exception("the local engine stops")
            reason = f"the local engine has stopped after an error: {error}"
            with self._changed:
                self._end = self._end or reason
        with self._changed:
            assert self._end is not None
            for stream in (*self._waiting, *self._running.values()):
                stream.put(self._end)
            self._waiting.clear()
            self._running.clear()
        self._decoding.clear()

    def _next_to_join(self) -> list[Generation]:
        """The first of the waiting requests, as many as there is room for and one turn may take."""
        together = self._decoding.generations
        joining: list[Generation] = []
        while self._waiting:
            first = self._waiting[0].generation
            most = max(each.cache_tokens for each in (*together, first))
            longest = max(len(each.prompt) for each in (*joining, first))
            if not first.cancelled:
                if (len(together) + 1) * most > self.max_cache_tokens:
                    break
                if joining and (len(joining) + 1) * longest > PREFILL_TOKENS:
                    break
                together.append(first)
                joining.append(first)
                self._running[first] = self._waiting[0]
            self._waiting.popleft()
        return joining

    def _give(self, pieces: Sequence[tuple[Generation, Piece]]) -> None:
        """Hand over what is new to those who asked, and forget whoever has all or has gone."""
        news: dict[Generation, list[Piece]] = {}
        for generation, piece in pieces:
            news.setdefault(generation, []).append(piece)
        for generation, own in news.items():
            self._running[generation].put(own)
        live = set(self._decoding.generations)
        with self._changed:
            self._running = {
                generation: stream
                for generation, stream in self._running.items()
                if generation in live
            }


@dataclass(eq=False)
class _Stream:
    """A request, and the way back to the event loop that made it."""

    generation: Generation
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    news: asyncio.Queue[list[Piece] | str] = field(default_factory=asyncio.Queue)
    """Pieces, or why there won't be more."""

    def put(self, news: list[Piece] | str) -> None:
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:  # its event loop is closed
            self.generation.cancelled = True
