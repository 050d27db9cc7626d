"""The interface of sampling engines: token ids of prompts in, n sampled responses each out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from steerlm2.data.templates import Template, reserved_ids, response_end
from steerlm2.data.tokenizers import Tokenizer

OTHER_STOP = "other_stop"
"""The finish reason where a server says "stop", but not at the stop token."""


@dataclass(frozen=True)
class SamplingSettings:
    """How every response is sampled.

    Control tokens other than the stop token are forbidden, because no text is encoded as them: the
    sampler doesn't choose them, and renormalizes the probabilities of the other tokens.
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    """Including the stop token."""
    stop_id: int
    forbidden_ids: tuple[int, ...]


class Request(NamedTuple):
    """A prompt for n responses; the random numbers of the j-th depend on `seed` + j."""

    prompt: Sequence[int]
    seed: int


class Sample(NamedTuple):
    """One sampled response."""

    tokens: list[int]
    """With the stop token at the end, if the response is complete."""
    finish_reason: str
    """`records.STOP`, `records.LENGTH`, or another reason of a server."""
    log_prob: float | None
    """Of the tokens, by the engine, in nats, before temperature and top-p; None: not known."""
    text: str | None = None
    """What a server gave instead of its tokens; `tokens` are then only what the text encodes to."""
    end_known: bool = True
    """Whether the finish reason was checked: a server's "stop" may be its own end of text."""
    sampler_log_prob: float | None = None
    """Of the tokens in what they were drawn from, after temperature and top-p; None: not known."""


class Engine(Protocol):
    """A sampling engine. Its settings are arguments of its constructor."""

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """[request][n] samples, in the order of the requests."""

    def close(self) -> None: ...


def request_seed(seed: int, record: int, label: int) -> int:
    """The seed of a record with one of its labels; it depends on nothing else."""
    digest = hashlib.sha256(f"{seed}:{record}:{label}".encode()).digest()
    return int.from_bytes(digest[:6])  # JSON keeps whole numbers up to 2^53


def forbidden_ids(
    template: Template, tokenizer: Tokenizer, num_embeddings: int = 0
) -> tuple[int, ...]:
    """The ids of the control tokens of tokenizer and template, except the stop token.

    Args:
        num_embeddings: of the model; ids without a token of the tokenizer are forbidden too.
    """
    _, stop_id = response_end(template, tokenizer)
    spare = range(tokenizer.vocab_size, num_embeddings)
    return (*sorted(reserved_ids(template, tokenizer) - {stop_id}), *spare)
