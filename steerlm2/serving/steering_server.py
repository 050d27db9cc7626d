"""The HTTP interface of a steered model: OpenAI's API, with attributes.

    POST /v1/chat/completions   messages and `attributes` -> answers, streamed or not
    POST /v1/completions        texts or token ids -> their continuations
    POST /v1/attributes         scores, where there is an attribute model (`reward_server`)
    PUT  /generate              the interface of NeMo's evaluation server
    GET  /v1/models, /v1/model  what is served
    GET  /                      a page to try it, /page.css and /page.js
    GET  /health, /metrics, /openapi.json

`attributes` is an object or a label, a field of its own, of `chat_template_kwargs`, or behind the
model's name ("name@helpfulness:4,verbosity:1"); values that are left out are the usual ones of
training. `best_of: k` gives those of k answers that the attribute model finds nearest to the
request, and `scores: true` each answer's scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge

from steerlm2.attributes import parse_label
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import LENGTH, STOP
from steerlm2.inference.steered import Delta, Question, SteeredModel, TextToken
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.serving.event_stream import EventStream, while_connected
from steerlm2.serving.http import (
    Metrics,
    Refusals,
    RequestError,
    add_components,
    body_schema,
    json_response,
    new_app,
    overloaded,
    parse_body,
    read_body,
)
from steerlm2.serving.reward_server import (
    ATTRIBUTES_PATH,
    AttributeScorer,
    Limits,
    add_attributes_route,
)
from steerlm2.serving.steering_requests import (
    INVALID,
    ChatRequest,
    check_at_most,
    check_text,
    invalid,
    split_model,
)

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
PATHS = (
    *(CHAT, COMPLETIONS, ATTRIBUTES_PATH, GENERATE, "/v1/models", "/v1/model"),
    *("/health", "/metrics", "/openapi.json", *PAGE_FILES),
)
REFUSALS = Refusals(400, INVALID, "messages")

COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""


@dataclass(frozen=True)
class SteeringLimits(Limits):
    """What a caller may ask for."""

    request_timeout: float = 600.0
    max_queue: int = 256
    """Requests that are answered at a time; and texts that wait for their scores."""
    max_n: int = 16
    """Answers to a request: `n` and `best_of`."""
    max_new_tokens: int = 1024
    """Tokens of an answer where the request doesn't say."""


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
    created: int = field(default_factory=lambda: int(time.time()))
    running: int = 0

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

    def room(self, prompt: Sequence[int], wanted: int | None, usual: int) -> int:
        """Tokens that an answer may have.

        Raises:
            RequestError: where the prompt leaves no room for what is wanted.
        """
        limit = self.model.engine.max_seq_len
        room = limit - len(prompt)
        if room < (wanted or 1):
            asked = f" and {wanted} tokens of an answer" if wanted else ""
            raise invalid(
                f"the prompt's {len(prompt)} tokens{asked} are more than the model's {limit}: "
                "shorten the messages or max_tokens",
                param="messages",
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
    ) -> AsyncIterator[Delta]:
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

    async def score(self, question: Question, answers: Sequence[Answer]) -> None:
        """Give answers their scores."""
        scores = await self.model.scores(question, [answer.text for answer in answers])
        for answer, own in zip(answers, scores, strict=True):
            answer.scores = own


def create_app(
    model: SteeredModel,
    name: str,
    *,
    limits: SteeringLimits | None = None,
    api_key: str | None = None,
    system_prompt: str | None = None,
) -> FastAPI:
    """The application that serves a model; it closes the model's engine at its end.

    Args:
        name: of the model, for callers.
        api_key: that callers must send; None: everybody may ask.
        system_prompt: of /v1/attributes, for conversations without one; None: the model's.
    """
    limits = limits or SteeringLimits()
    metrics = Metrics()
    scorer = None
    if model.attribute_model is not None:
        scorer = AttributeScorer(model.attribute_model, metrics.registry, limits.max_queue)
        model = dataclasses.replace(model, score_groups=_scoring(scorer))
    service = Service(model, name, limits, SteeringMetrics(metrics.registry))
    service.metrics.running.set_function(lambda: service.running)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if scorer is not None:
                await stack.enter_async_context(scorer.running())
            stack.push_async_callback(model.engine.close)
            yield

    app = new_app(
        "steerlm2 steered model",
        metrics,
        lifespan=lifespan,
        paths=PATHS,
        health=lambda: None if scorer is None else scorer.problem(),
        api_key=api_key,
        also_open=tuple(PAGE_FILES),
    )
    components = [_add_chat(app, service)]
    if scorer is not None:
        system = model.system if system_prompt is None else system_prompt
        components.append(add_attributes_route(app, scorer, name, limits, system))
    _add_models(app, service)
    _add_page(app)
    add_components(app, *components)
    return app


def _scoring(scorer: AttributeScorer) -> Any:
    async def score_groups(groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        texts = [[*group.prompt, *own] for group in groups for own in group.responses]
        scores = iter(await scorer.score(texts))
        return [[next(scores) for _ in group.responses] for group in groups]

    return score_groups


# Chats


def _add_chat(app: FastAPI, service: Service) -> dict[str, Any]:
    described, components = body_schema(ChatRequest)
    limits = service.limits

    @app.post(CHAT, openapi_extra=described)
    async def chat(request: Request) -> Response:
        """Answers to a conversation, as in OpenAI's API."""
        deadline = asyncio.get_running_loop().time() + limits.request_timeout
        async with _in_time(deadline, limits):
            body = await read_body(request, limits.max_body_bytes, "messages")
            asked = parse_body(body, ChatRequest, REFUSALS)
            work = ChatWork(service, asked)
            if asked.stream:
                events = work.events()
                first = await while_connected(request.receive, anext(events))
                return EventStream(first, events, deadline, _timed_out(limits))
            return json_response(200, await while_connected(request.receive, work.answer()))

    return components


class ChatWork:
    """A checked request for a chat.

    Raises:
        RequestError: for what can't be done.
    """

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self.service, self.asked = service, asked
        check_text(asked)
        label = split_model(asked.model, [service.name])
        model, limits = service.model, service.limits
        self.n = asked.n or 1
        self.best_of = asked.best_of
        check_at_most({"n": asked.n, "best_of": asked.best_of}, limits.max_n, "max_n")
        self.scored = bool(asked.scores) or self.best_of is not None
        if self.scored and model.attribute_model is None:
            key = "best_of" if self.best_of else "scores"
            raise invalid(f"{key}: this server has no attribute model", param=key)
        arguments = asked.chat_template_kwargs
        try:
            self.question = model.question(
                [message.model_dump() for message in asked.messages],
                asked.attributes,
                None if arguments is None else arguments.attributes,
                label,
            )
        except ValueError as error:
            param = str(error).partition(":")[0].partition("[")[0]
            raise invalid(str(error), param=param) from None
        self.prompt = model.prompt_of(self.question)
        most = service.room(self.prompt, asked.most_tokens, limits.max_new_tokens)
        self.settings = asked.settings(
            n=self.best_of or self.n, max_new_tokens=most, top_log_probs=asked.top_log_probs
        )
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    async def answer(self) -> dict[str, Any]:
        """The whole answer."""
        async with self.service.place():
            chosen, num_tokens = await self._chosen()
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._log_probs(answer.tokens),
                "finish_reason": _reason(answer.finish_reason),
            }
            | self._scores(answer)
            for i, answer in enumerate(chosen)
        ]
        return self.head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(len(self.prompt), num_tokens),
            "attributes": self.question.attributes,
        }

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer in chunks, each as soon as it is known."""
        async with self.service.place():
            num_tokens = 0
            begun: set[int] = set()
            async for i, delta, scores in self._deltas():
                num_tokens += delta.num_tokens
                if i not in begun:
                    role = {"role": "assistant", "content": ""}
                    shown = {} if begun else {"attributes": self.question.attributes}
                    begun.add(i)
                    yield self._chunk(self._choice(i, role)) | shown
                if delta.text or (delta.tokens and self.asked.logprobs):
                    text = {"content": delta.text}
                    yield self._chunk(self._choice(i, text, self._log_probs(delta.tokens)))
                if delta.finish_reason is not None:
                    reason = _reason(delta.finish_reason)
                    end = self._choice(i, {}, finish_reason=reason)
                    yield self._chunk(end | ({} if scores is None else {"scores": scores}))
        if self.asked.wants_usage:
            yield self._chunk() | {"usage": _usage(len(self.prompt), num_tokens)}

    async def _chosen(self) -> tuple[list[Answer], int]:
        """The answers to be given, the nearest first, and the tokens of all."""
        asked = self.asked
        answers = await self.service.answers(self.prompt, self.settings, asked.stop_texts)
        num_tokens = sum(answer.num_tokens for answer in answers)
        if self.scored:
            await self.service.score(self.question, answers)
        if self.best_of is not None:
            model = self.service.model
            answers.sort(key=lambda each: model.distance(self.question, each.scores or {}))
        return answers[: self.n], num_tokens

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta, dict[str, float] | None]]:
        """What becomes known of the answers, with the scores of those that have ended."""
        asked, service = self.asked, self.service
        if self.best_of is not None:  # nothing is known before all have ended
            chosen, num_tokens = await self._chosen()
            for i, answer in enumerate(chosen):
                own = num_tokens if i == 0 else 0
                delta = Delta(i, answer.text, answer.tokens, own, answer.finish_reason)
                yield i, delta, answer.scores if asked.scores else None
            return
        answers = [Answer() for _ in range(self.settings.n)]
        async for delta in service.deltas(self.prompt, self.settings, asked.stop_texts):
            answer = answers[delta.answer]
            answer.add(delta)
            if self.scored and delta.finish_reason is not None:
                await service.score(self.question, [answer])
            yield delta.answer, delta, answer.scores

    def _scores(self, answer: Answer) -> dict[str, Any]:
        return {"scores": answer.scores} if self.asked.scores else {}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk", "choices": list(choices)}

    def _choice(
        self,
        i: int,
        delta: dict[str, Any],
        log_probs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": i,
            "delta": delta,
            "logprobs": log_probs,
            "finish_reason": finish_reason,
        }

    def _log_probs(self, tokens: Sequence[TextToken]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": [self._log_prob(token) for token in tokens], "refusal": None}

    def _log_prob(self, token: TextToken) -> dict[str, Any]:
        assert token.log_prob is not None
        top = [self._named(*each) for each in token.log_prob.top[: self.asked.top_logprobs or 0]]
        return self._named(token.token_id, token.log_prob.log_prob) | {"top_logprobs": top}

    def _named(self, token_id: int, log_prob: float) -> dict[str, Any]:
        text = token_text(self.service.model, token_id)
        known = "\N{REPLACEMENT CHARACTER}" not in text  # else it is a part of a character
        return {
            "token": text,
            "logprob": max(log_prob, LOWEST_LOG_PROB),
            "bytes": list(text.encode()) if known else None,
        }


LOWEST_LOG_PROB = -9999.0
"""OpenAI's stand-in for lower ones: JSON has no infinity."""


def token_text(model: SteeredModel, token_id: int) -> str:
    """One token alone."""
    return model.tokenizer.decode([token_id])


def _reason(finish_reason: str | None) -> str:
    """OpenAI's word: an answer that a forbidden token ended has stopped too."""
    return LENGTH if finish_reason == LENGTH else STOP


def _usage(prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": prompt_tokens + num_tokens,
    }


def _timed_out(limits: SteeringLimits) -> RequestError:
    return RequestError(
        504,
        "timeout",
        f"not answered within {limits.request_timeout:g} seconds (request_timeout): ask for fewer "
        "tokens, or try again later",
    )


@contextlib.asynccontextmanager
async def _in_time(deadline: float, limits: SteeringLimits) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise _timed_out(limits) from None


# What is served, and the page


def _add_models(app: FastAPI, service: Service) -> None:
    model, limits = service.model, service.limits

    @app.get("/v1/models")
    async def models() -> Response:
        """The model, with its attributes."""
        return json_response(200, {"object": "list", "data": [_described(service)]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """The model, if it is that one."""
        split_model(name, [service.name])
        return json_response(200, _described(service))

    @app.get("/v1/model")
    async def describe() -> Response:
        """What is served, and the limits."""
        return json_response(
            200,
            _described(service)
            | {
                "max_n": limits.max_n,
                "max_new_tokens": limits.max_new_tokens,
                "max_queue": limits.max_queue,
                "max_body_bytes": limits.max_body_bytes,
                "request_timeout": limits.request_timeout,
                "default_label": model.usual_label,
            },
        )


def _described(service: Service) -> dict[str, Any]:
    model = service.model
    usual = parse_label(model.usual_label) if model.usual_label else {}
    schema = model.schema
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "steerlm2",
        "max_model_len": model.engine.max_seq_len,
        "attributes": [
            {"name": name, "min": low, "max": high, "default": usual.get(name)}
            for name, (low, high) in (
                zip(schema.names, schema.ranges, strict=True) if schema else ()
            )
        ],
        "system": model.system,
        "scores": model.attribute_model is not None,
    }


def _add_page(app: FastAPI) -> None:
    for path, (name, media_type) in PAGE_FILES.items():
        _add_file(app, path, PAGE / name, media_type)


def _add_file(app: FastAPI, path: str, file: Path, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def show() -> Response:
        if not file.is_file():
            raise RequestError(404, "not_found", f"this server has no {file.name}")
        headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return Response(file.read_bytes(), media_type=media_type, headers=headers)
