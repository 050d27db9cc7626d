"""What recipes need of something that samples: token ids in, n sampled responses out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from steerlm2.data.templates import Template, encode_response
from steerlm2.data.tokenizers import Tokenizer

STOP, LENGTH = "stop", "length"
"""Finish reasons: at the stop token, or at `max_new_tokens`."""


@dataclass(frozen=True)
class SamplingSettings:
    """How every response is sampled.

    A control token other than the stop token can't stand in a response, for no text yields its id:
    the sampler doesn't choose it, and the probabilities of the others are scaled up.
    """

    n: int
    temperature: float
    top_p: float
    max_new_tokens: int
    """The stop token is one of them."""
    stop_id: int
    forbidden_ids: tuple[int, ...]


class Request(NamedTuple):
    """A prompt for n responses; the j-th one's random numbers follow from `seed` + j."""

    prompt: Sequence[int]
    seed: int


class Sample(NamedTuple):
    """One sampled response."""

    tokens: list[int]
    """The stop token at the end, where it ended with it."""
    finish_reason: str
    """STOP, LENGTH, or what a server says."""
    log_prob: float | None
    """Of the tokens, by the engine: nats, neither tempered nor cut. None: the server didn't say."""


class Engine(Protocol):
    """Something that samples. Its settings are given to whatever makes it."""

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """[request][n], in their order."""

    def close(self) -> None: ...


def request_seed(seed: int, record: int, label: int) -> int:
    """The seed for a record with one of its labels: the same whatever is sampled beside it."""
    digest = hashlib.sha256(f"{seed}:{record}:{label}".encode()).digest()
    return int.from_bytes(digest[:6])  # JSON keeps whole numbers up to 2^53


def response_end(template: Template, tokenizer: Tokenizer) -> tuple[str, int]:
    """What the template puts behind a response: its end-of-turn text, and the stop token's id."""
    segments = template.response("")
    text = "".join(segment.text for segment in segments if not segment.control)
    return text, encode_response(template, tokenizer, "")[-1]


def forbidden_ids(
    template: Template, tokenizer: Tokenizer, num_embeddings: int = 0
) -> tuple[int, ...]:
    """The control tokens of tokenizer and template, but for the stop token.

    Args:
        num_embeddings: of the model; those that the tokenizer has no token for are forbidden too.
    """
    of_template = {tokenizer.token_id(token) for token in template.control_tokens}
    known = {token_id for token_id in of_template if token_id is not None}
    _, stop_id = response_end(template, tokenizer)
    spare = range(tokenizer.vocab_size, num_embeddings)
    return (*sorted(known.union(tokenizer.control_ids) - {stop_id}), *spare)
