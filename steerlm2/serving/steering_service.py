"""What the routes of a steering server share: the model, places, answers, and OpenAI's words."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge

from steerlm2.data.records import LENGTH, STOP
from steerlm2.data.templates import is_too_long
from steerlm2.inference.steered import Delta, Question, SteeredModel, TextToken
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.serving.event_stream import EventStream, while_connected
from steerlm2.serving.http import (
    Refusals,
    RequestError,
    json_by_items,
    overloaded,
)
from steerlm2.serving.intake import Intake
from steerlm2.serving.reward_server import Limits
from steerlm2.serving.steering_requests import INVALID, invalid

REFUSALS = Refusals(400, INVALID, "messages")

LOWEST_LOG_PROB = -9999.0
"""OpenAI's stand-in for lower ones: JSON has no infinity."""


BYTES_OF_A_LOG_PROB = 50
"""In an answer, about."""


@dataclass(frozen=True)
class SteeringLimits(Limits):
    """What a caller may ask for."""

    max_queue: int = 1024
    """Requests that are answered at a time."""
    max_n: int = 16
    """Answers to a request: `n` and `best_of`."""
    max_new_tokens: int = 1024
    """Tokens of an answer where the request doesn't say."""


class Work(Protocol):
    """A checked request, which is answered whole or, where `asked.stream` says so, in events."""

    asked: Any

    async def answer(self) -> Response: ...

    def events(self) -> AsyncGenerator[dict[str, Any]]: ...


class SteeringMetrics:
    """What /metrics shows besides what all servers have."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompt_tokens = Counter(
            "steerlm2_prompt_tokens", "Tokens of prompts", registry=registry
        )
        self.generated_tokens = Counter(
            "steerlm2_generated_tokens", "Tokens generated", registry=registry
        )
        self.running = Gauge(
            "steerlm2_running_requests", "Requests that are being answered", registry=registry
        )


@dataclass
class Answer:
    """One answer as far as it is known."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    scores: dict[str, float] | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.num_tokens += delta.num_tokens
        self.finish_reason = delta.finish_reason


@dataclass
class Service:
    """A model and what its routes share."""

    model: SteeredModel
    name: str
    limits: SteeringLimits
    metrics: SteeringMetrics
    intake: Intake
    created: int = field(default_factory=lambda: int(time.time()))
    running: int = 0
    broken: str | None = None
    """Why the engine answers no more."""

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A request's place among those that are answered.

        Raises:
            RequestError: where there is none.
        """
        if self.running >= self.limits.max_queue:
            raise overloaded(
                f"too many requests are answered already (the limit is {self.limits.max_queue})"
            )
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def check_size(self, texts: Sequence[str], param: str) -> None:
        """Raises:
        RequestError: where the texts of a prompt are so long that it needn't be tokenised.
        """
        limit = self.model.engine.max_seq_len
        if is_too_long(self.model.tokenizer, texts, limit):
            raise invalid(
                f"the prompt's {sum(map(len, texts))} characters are more than the model's {limit} "
                f"tokens: shorten the {param}",
                param=param,
                code="context_length_exceeded",
            )

    def room(
        self, prompt: Sequence[int], wanted: int | None, usual: int, param: str = "messages"
    ) -> int:
        """Tokens that an answer may have.

        Raises:
            RequestError: where the prompt leaves no room for what is wanted.
        """
        limit = self.model.engine.max_seq_len
        room = limit - len(prompt)
        if room < (wanted or 1):
            asked = f" and {wanted} tokens of an answer" if wanted else ""
            fewer = ", or ask for fewer" if wanted else ""
            raise invalid(
                f"the prompt's {len(prompt)} tokens{asked} are more than the model's {limit}: "
                f"shorten the {param}{fewer}",
                param=param,
                code="context_length_exceeded",
            )
        return wanted or min(room, usual)

    async def deltas(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        stop: Sequence[str] = (),
        *,
        whole: bool = False,
    ) -> AsyncGenerator[Delta]:
        """The engine's answers, with its failures as errors of the server."""
        self.metrics.prompt_tokens.inc(len(prompt))
        stream = self.model.stream_ids(prompt, settings, stop=stop, whole=whole)
        async with contextlib.aclosing(stream):
            try:
                async for delta in stream:
                    self.metrics.generated_tokens.inc(delta.num_tokens)
                    yield delta
            except ValueError as error:
                raise invalid(str(error)) from error
            except ConnectionError as error:
                raise RequestError(502, "engine_error", str(error)) from error
            except RuntimeError as error:
                self.broken = f"{error}; restart the server"
                raise RequestError(503, "broken", self.broken) from error

    async def answers(
        self,
        prompt: Sequence[int],
        settings: GenerationSettings,
        stop: Sequence[str] = (),
        *,
        whole: bool = False,
    ) -> list[Answer]:
        """All answers, complete."""
        answers = [Answer() for _ in range(settings.n)]
        async for delta in self.deltas(prompt, settings, stop, whole=whole):
            answers[delta.answer].add(delta)
        return answers

    async def response(
        self, answers: Sequence[Answer], content: Callable[[], dict[str, Any]]
    ) -> Response:
        """What is answered, put together aside where it has many log-probs: for an answer of
        megabytes that takes seconds.

        Args:
            content: makes it of the answers.
        """
        known = (token.log_prob for answer in answers for token in answer.tokens)
        num_log_probs = sum(1 + len(each.top) for each in known if each is not None)

        def made() -> Response:
            return Response(json_by_items(content()).encode(), media_type="application/json")

        return await self.intake.run(num_log_probs * BYTES_OF_A_LOG_PROB, made)

    async def score(self, question: Question, answers: Sequence[Answer]) -> None:
        """Give answers their scores."""
        scores = await self.model.scores(question, [answer.text for answer in answers])
        for answer, own in zip(answers, scores, strict=True):
            answer.scores = own


def token_text(model: SteeredModel, token_id: int) -> str:
    """One token alone."""
    return model.tokenizer.decode([token_id])


def reason_word(finish_reason: str | None) -> str:
    """OpenAI's word: an answer that a forbidden token ended has stopped too."""
    return LENGTH if finish_reason == LENGTH else STOP


def usage_of(prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prompt_tokens + num_tokens,
    }


def timed_out(limits: SteeringLimits) -> RequestError:
    return RequestError(
        504,
        "timeout",
        f"not answered within {limits.request_timeout:g} seconds (request_timeout): ask for fewer "
        "tokens, or try again later",
    )


@contextlib.asynccontextmanager
async def in_time(deadline: float, limits: SteeringLimits) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise timed_out(limits) from None


async def respond(
    request: Request, service: Service, what: str, work_of: Callable[[bytes], Work]
) -> Response:
    """Read a request and answer it within the server's time, as long as its caller waits.

    Args:
        what: the body has too much of, for messages.
        work_of: checks a body.

    Raises:
        RequestError: for what can't be answered.
    """
    limits = service.limits
    deadline = asyncio.get_running_loop().time() + limits.request_timeout
    async with in_time(deadline, limits), contextlib.AsyncExitStack() as held:
        body = await held.enter_async_context(service.intake.body(request, what))
        work = await service.intake.run(len(body), work_of, body)
        if work.asked.stream:
            events = work.events()
            first = await while_connected(request.receive, anext(events))
            return EventStream(first, events, deadline, timed_out(limits), held.pop_all())
        return await while_connected(request.receive, work.answer())
