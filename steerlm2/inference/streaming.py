"""The interface of engines that serve: token ids of a prompt in, pieces of n answers out while they
are generated.

Unlike the engines that sample training data (`steerlm2.inference.engines`), these take each
request with settings of its own, at any time, and give its tokens as soon as they are known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class GenerationSettings:
    """How the answers to one prompt are sampled. The stop token and the forbidden tokens are the
    engine's, the same for all requests."""

    max_new_tokens: int
    """Of each answer, including the stop token."""
    n: int = 1
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """Sample from so many of the most likely tokens; 0: from all."""
    seed: int = 0
    """The random numbers of the j-th answer depend on `seed` + j."""
    top_log_probs: int | None = None
    """How many of the most likely tokens come with each token, for its log-prob; None: no
    log-probs."""


class TokenLogProb(NamedTuple):
    """A generated token's log-prob, in nats, before temperature, top-p and forbidden tokens."""

    log_prob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens in this position with their log-probs, the highest first."""
    sampler_log_prob: float | None = None
    """The token's log-prob in what it was drawn from, after all of these; None: not known."""


class Piece(NamedTuple):
    """The next tokens of one answer."""

    answer: int
    """Its number, from 0 to n - 1."""
    tokens: list[int]
    """With the stop token at the end, if the answer is complete."""
    log_probs: list[TokenLogProb] | None
    """One a token, where they were asked for."""
    finish_reason: str | None
    """With the answer's last piece: `records.STOP`, `records.LENGTH`, or `engines.OTHER_STOP`."""


class StreamingEngine(Protocol):
    """Generates for several requests at a time."""

    max_seq_len: int
    """Tokens of a prompt together with its answer."""

    def generate(self, prompt: Sequence[int], settings: GenerationSettings) -> AsyncIterator[Piece]:
        """The pieces of all answers; whoever closes the iterator ends the generation.

        Raises:
            ValueError: where the engine can't do what is asked.
            ConnectionError: where a server that it asks doesn't answer.
            RuntimeError: where it has ended, and answers no request any more.
        """

    async def close(self) -> None:
        """End what is still generated and free the engine's memory."""
