"""A streaming engine that says what it is told to, for tests of what asks one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb

Script = Callable[[Sequence[int], GenerationSettings, int], list[int]]
"""(prompt, settings, number of the answer) -> its tokens, with the stop token where it has one."""


class ScriptedEngine:
    """Gives every answer in pieces of `step` tokens, all answers by turns.

    Args:
        stop_id: ends an answer; without it the answer was cut off.
        gate: holds every piece after the first back while it isn't set.
    """

    def __init__(
        self,
        script: Script,
        stop_id: int,
        *,
        max_seq_len: int = 512,
        step: int = 1,
        gate: asyncio.Event | None = None,
    ) -> None:
        self.script, self.stop_id, self.max_seq_len = script, stop_id, max_seq_len
        self.step, self.gate = step, gate
        self.asked: list[tuple[list[int], GenerationSettings]] = []
        self.running = 0
        self.is_closed = False

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        self.asked.append((list(prompt), settings))
        answers = [
            self.script(prompt, settings, j)[: settings.max_new_tokens] for j in range(settings.n)
        ]
        self.running += 1
        try:
            for start in range(0, max(map(len, answers)), self.step):
                if start and self.gate is not None:
                    await self.gate.wait()
                await asyncio.sleep(0)
                for j, tokens in enumerate(answers):
                    piece = tokens[start : start + self.step]
                    if piece:
                        yield self._piece(j, piece, start + self.step >= len(tokens), settings)
        finally:
            self.running -= 1

    def _piece(
        self, answer: int, tokens: list[int], is_last: bool, settings: GenerationSettings
    ) -> Piece:
        reason = None
        if is_last:
            reason = "stop" if tokens[-1] == self.stop_id else "length"
        log_probs = None
        if settings.top_log_probs is not None:
            top = [(token_id, -0.25) for token_id in range(40, 40 + settings.top_log_probs)]
            log_probs = [TokenLogProb(-0.5, tuple(top)) for _ in tokens]
        return Piece(answer, tokens, log_probs, reason)

    async def close(self) -> None:
        self.is_closed = True
