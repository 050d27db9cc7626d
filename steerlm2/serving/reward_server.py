"""The HTTP interface of an attribute model: conversations or texts in, named scores out.

POST /v1/attributes   {"conversations": [...]} or {"texts": [...]} -> {"scores": [...], ...}
GET  /v1/model        what is served, and its limits
GET  /health          200 as long as the server takes requests
GET  /metrics         for Prometheus
GET  /openapi.json    this interface for machines
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from steerlm2.attributes import parse_label
from steerlm2.data.conversations import Conversation, is_text
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import encode_for_scoring, is_too_long
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.inference.attribute_model import AttributeModel
from steerlm2.serving.batcher import Batcher, QueueFullError, ScoringError, Text
from steerlm2.serving.event_stream import while_connected
from steerlm2.serving.http import (
    FirstProblem,
    Metrics,
    RequestError,
    Strict,
    add_components,
    body_schema,
    json_response,
    listed,
    new_app,
    overloaded,
    parse_body,
)
from steerlm2.serving.intake import Intake

ATTRIBUTES_PATH = "/v1/attributes"
PATHS = (ATTRIBUTES_PATH, "/v1/model", "/health", "/metrics", "/openapi.json")


@dataclass(frozen=True)
class Limits:
    """What a caller may ask for."""

    max_body_bytes: int = 1 << 20
    max_pending_bytes: int = 64 << 20
    """Bytes of all requests that are read or answered at a time."""
    body_timeout: float = 30.0
    """Seconds from a request's header to the end of its body."""
    max_items: int = 64
    """Conversations or texts of a request."""
    max_queue: int = 1024
    """Texts that wait, of all requests together."""
    request_timeout: float = 60.0
    """Seconds from a request's header to its answer."""
    truncate: bool = False
    """Whether a text over the model's max_seq_len loses its beginning, or is refused."""

    def intake(self) -> Intake:
        return Intake(
            max_body_bytes=self.max_body_bytes,
            max_pending_bytes=self.max_pending_bytes,
            body_timeout=self.body_timeout,
        )


class AttributeScorer:
    """An attribute model behind a queue, with its metrics. Texts are scored inside `running`."""

    def __init__(self, model: AttributeModel, registry: CollectorRegistry, max_queue: int) -> None:
        self.model = model
        self.num_texts = Counter("steerlm2_texts", "Texts scored", registry=registry)
        batch_texts = Histogram(
            *("steerlm2_batch_texts", "Texts of a batch"),
            buckets=[2**i for i in range(11)],
            registry=registry,
        )
        self.batcher = Batcher(
            model,
            max_tokens=model.max_tokens_per_microbatch,
            max_queue=max_queue,
            on_batch=batch_texts.observe,
        )
        waiting = Gauge("steerlm2_waiting_texts", "Texts in the queue", registry=registry)
        waiting.set_function(lambda: len(self.batcher))
        self._worker: asyncio.Task[None] | None = None

    async def score(self, texts: Sequence[Text]) -> list[list[float]]:
        """[text][attribute] scores.

        Raises:
            RequestError: where too many texts wait, or the model fails on one of them.
        """
        try:
            scores = await self.batcher.score(texts)
        except QueueFullError:
            raise overloaded(
                f"too many texts wait already (the limit is {self.batcher.max_queue})"
            ) from None
        except ScoringError as error:
            raise RequestError(500, "internal_error", str(error)) from None
        self.num_texts.inc(len(texts))
        return scores

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._worker = asyncio.create_task(self.batcher.run())
        yield
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    def problem(self) -> str | None:
        """Why no text can be scored any more; None: they can."""
        if self._worker is None or self._worker.done():
            return "the model's worker has ended: restart the server"
        return None


def create_app(
    model: AttributeModel,
    name: str,
    *,
    limits: Limits | None = None,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The application that serves a model.

    Args:
        name: of the model, for callers.
        system_prompt: of conversations without one, and of texts.
        api_key: that callers must send; None: everybody may ask.
        allowed_hosts: that the server answers for (`hosts.is_allowed`).
    """
    limits = limits or Limits()
    metrics = Metrics()
    # What is slow to be known of a tokenizer is known before the first request.
    is_too_long(model.tokenizer, (), 0)
    scorer = AttributeScorer(model, metrics.registry, limits.max_queue)

    app = new_app(
        "steerlm2 attribute model",
        metrics,
        lifespan=lambda app: scorer.running(),
        paths=PATHS,
        health=scorer.problem,
        api_key=api_key,
        allowed_hosts=allowed_hosts,
    )
    components = add_attributes_route(app, scorer, name, limits, system_prompt, limits.intake())

    @app.get("/v1/model")
    async def describe() -> Response:
        """What is served: attributes, their ranges, and the limits.

        `min_value` and `max_value` are the range that all of them share, null where they don't.
        """
        attributes = list(model.schema.names)
        lowest, highest = model.schema.shared_range or (None, None)
        return json_response(
            200,
            {
                "model": name,
                "attributes": attributes,
                "ranges": dict(zip(attributes, model.schema.ranges, strict=True)),
                "min_value": lowest,
                "max_value": highest,
                "max_seq_len": model.max_seq_len,
                "truncate": limits.truncate,
                "max_items": limits.max_items,
                "max_body_bytes": limits.max_body_bytes,
            },
        )

    add_components(app, components)
    return app


def add_attributes_route(
    app: FastAPI,
    scorer: AttributeScorer,
    name: str,
    limits: Limits,
    system_prompt: str,
    intake: Intake,
) -> dict[str, Any]:
    """Add POST /v1/attributes; returns its components for /openapi.json."""
    model = scorer.model
    attributes = list(model.schema.names)
    body_model = request_model(limits.max_items)
    described, components = body_schema(body_model)

    def tokenised(body: bytes) -> tuple[list[Text], list[int]]:
        return encode(model, parse_request(body, body_model, system_prompt), limits.truncate)

    @app.post(ATTRIBUTES_PATH, openapi_extra=described)
    async def score(request: Request) -> Response:
        """Scores of the last turn of every conversation, or of every text."""
        try:
            async with asyncio.timeout(limits.request_timeout), intake.body(request) as body:
                texts, cut = await intake.run(len(body), tokenised, body)
                scores = await while_connected(request.receive, scorer.score(texts))
        except TimeoutError:
            raise RequestError(
                504,
                "timeout",
                f"not answered within {limits.request_timeout:g} seconds: send fewer texts at a "
                "time, or try again later",
            ) from None
        named = [dict(zip(attributes, of_text, strict=True)) for of_text in scores]
        answer = {"model": name, "attributes": attributes, "scores": named}
        return json_response(200, answer | ({"truncated": cut} if cut else {}))

    return components


def _check_unicode(text: str) -> str:
    if not is_text(text):
        raise ValueError("holds half of a surrogate pair: not valid Unicode text")
    return text


UnicodeText = Annotated[str, AfterValidator(_check_unicode)]
FilledText = Annotated[str, Field(pattern=r"\S")]
"""Checking a pattern, pydantic checks that it is Unicode too."""


class TurnItem(Strict):
    """One message."""

    role: Literal["User", "Assistant"] = Field(alias="from")
    value: FilledText
    label: str | None = Field(
        None, description="of the published format, an assistant's alone; checked, but not used"
    )

    @field_validator("label")
    @classmethod
    def _check_label(cls, label: str | None, info: ValidationInfo) -> str | None:
        if label and info.data.get("role") == USER:
            raise ValueError(f"only turns of {ASSISTANT!r} can have a label")
        if label:
            parse_label(label)
        return label


class ConversationItem(Strict):
    """A line of the published conversation format."""

    system: UnicodeText | None = Field(None, description="none: the server's system prompt")
    conversations: FirstProblem[TurnItem] = Field(
        min_length=1, description="the turns; the last one, the assistant's, is scored"
    )
    mask: Literal["User"] | None = None
    type: Literal["VALUE_TO_TEXT"] | None = None

    @field_validator("conversations")
    @classmethod
    def _check_last_turn(cls, turns: list[TurnItem]) -> list[TurnItem]:
        if turns[-1].role != ASSISTANT:
            raise ValueError(f"the last turn is scored, so it must be from {ASSISTANT!r}")
        return turns


class AttributesRequest(Strict):
    """What to score: conversations, or texts that are answers without a question."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    conversations: list[ConversationItem] = Field(default_factory=list)
    texts: list[FilledText] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, body: object) -> object:
        keys = list(body) if isinstance(body, dict) else []
        if keys not in (["conversations"], ["texts"]):
            raise ValueError(
                "the body must be an object with one key, 'conversations' or 'texts'; got "
                + (", ".join(map(repr, keys)) or "none")
            )
        return body


def request_model(max_items: int) -> type[AttributesRequest]:
    """AttributesRequest of a server with that limit, to check bodies and for /openapi.json."""
    fields: dict[str, Any] = {
        name: (field.annotation, Field(default_factory=list, min_length=1, max_length=max_items))
        for name, field in AttributesRequest.model_fields.items()
    }
    return create_model("AttributesRequest", __base__=AttributesRequest, **fields)


def parse_request(
    body: bytes, model: type[AttributesRequest], system_prompt: str
) -> list[Conversation]:
    """The conversations to score, each ending with the assistant's turn that is scored.

    A text of `texts` is such a turn with nothing but the system prompt before it.

    Raises:
        RequestError: naming the problems, and where they are.
    """
    request = parse_body(body, model)
    return [
        Conversation(
            [Turn(turn.role, turn.value) for turn in item.conversations],
            system_prompt if item.system is None else item.system,
        )
        for item in request.conversations
    ] + [Conversation([Turn(ASSISTANT, text)], system_prompt) for text in request.texts]


def encode(
    model: AttributeModel, conversations: Sequence[Conversation], truncate: bool
) -> tuple[list[Text], list[int]]:
    """The tokens of every conversation, and the places of those that were cut.

    Raises:
        RequestError: naming what has more tokens than `max_seq_len`, unless `truncate` cuts it.
    """
    texts, cut, too_long = [], [], []
    limit = model.max_seq_len
    for i, conversation in enumerate(conversations):
        *turns, response = conversation.turns
        contents = (conversation.system, *(turn.value for turn in conversation.turns))
        if not truncate and is_too_long(model.tokenizer, contents, limit):
            too_long.append(f"[{i}] has {sum(map(len, contents))} characters")
            continue
        whole, _ = encode_for_scoring(
            model.template,
            model.tokenizer,
            conversation.system,
            turns,
            [response.value],
            max_seq_len=sys.maxsize,
        )
        if whole.num_tokens > limit and not truncate:
            too_long.append(f"[{i}] has {whole.num_tokens} tokens")
            continue
        if whole.num_tokens > limit:
            cut.append(i)
        texts.append(last_tokens(whole, limit, model.tokenizer))
    if too_long:
        raise RequestError(
            413, "too_long", f"more than {limit} tokens: {listed(too_long, len(too_long))}"
        )
    return texts, cut


def last_tokens(whole: RewardGroup, limit: int, tokenizer: Tokenizer) -> Text:
    """The end of a group's only text, as `AttributeModel.encode` cuts it: the bos token stays."""
    text = [*whole.prompt, *whole.responses[0]]
    if len(text) <= limit:
        return text
    bos = text[:1] if text[:1] == [tokenizer.bos_id] else []
    return bos + text[len(text) - limit + len(bos) :]
