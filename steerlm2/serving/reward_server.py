"""The HTTP interface of an attribute model: conversations or texts in, named scores out.

    POST /v1/attributes   {"conversations": [...]} or {"texts": [...]} -> {"scores": [...], ...}
    GET  /v1/model        what is served, and its limits
    GET  /health          200 as long as the server takes requests
    GET  /metrics         for Prometheus
    GET  /openapi.json    this interface for machines

Every error has the body {"error": {"type": ..., "message": ...}}.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import reprlib
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerlm2 import __version__
from steerlm2.attributes import parse_label
from steerlm2.data.conversations import Conversation, is_text
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import encode_for_scoring
from steerlm2.inference.attribute_model import AttributeModel
from steerlm2.serving.batcher import Batcher, QueueFullError, ScoringError, Text

PATHS = ("/v1/attributes", "/v1/model", "/health", "/metrics", "/openapi.json")

LARGE_BODY = 16_384
"""Bytes from which a request is tokenised in a thread: so many take a few milliseconds, in which
other requests would stand still."""

RETRY_AFTER_SECONDS = 1

MOST_PROBLEMS, LONGEST_PROBLEM = 10, 500
"""That one answer lists, and their characters."""

MOST_LISTABLE = 10_000
"""Problems of a request: to collect more of them would hold up other requests for seconds."""

CLEARER = {
    "model_type": "Input should be an object",
    "string_pattern_mismatch": "is empty",
    "string_unicode": "holds half of a surrogate pair: not valid Unicode text",
}
"""pydantic's name of a problem -> our words, where its own are about Python."""


@dataclass(frozen=True)
class Limits:
    """What a caller may ask for."""

    max_body_bytes: int = 1 << 20
    max_items: int = 64
    """Conversations or texts of a request."""
    max_queue: int = 1024
    """Texts that wait, of all requests together."""
    request_timeout: float = 60.0
    """Seconds from a request's header to its answer."""
    truncate: bool = False
    """Whether a text over the model's max_seq_len loses its beginning, or is refused."""


class RequestError(Exception):
    """What is answered in place of scores."""

    def __init__(self, status: int, kind: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers


def create_app(
    model: AttributeModel,
    name: str,
    *,
    limits: Limits | None = None,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> FastAPI:
    """The application that serves a model.

    Args:
        name: of the model, for callers.
        system_prompt: of conversations without one, and of texts.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(
        model,
        max_tokens=model.max_tokens_per_microbatch,
        max_queue=limits.max_queue,
        on_batch=metrics.batch_texts.observe,
    )
    metrics.waiting_texts.set_function(lambda: len(batcher))
    attributes = list(model.schema.names)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = app.state.worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    # The pages of /docs load their scripts from the internet.
    app = FastAPI(
        title="steerlm2 attribute model",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Measured, metrics=metrics, paths=PATHS)
    for kind in (RequestError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)

    body_model = request_model(limits.max_items)
    schema = body_model.model_json_schema(ref_template="#/components/schemas/{model}")
    components = {"schemas": schema.pop("$defs")}
    content = {"application/json": {"schema": schema}}

    @app.post(
        "/v1/attributes", openapi_extra={"requestBody": {"required": True, "content": content}}
    )
    async def score(request: Request) -> Response:
        """Scores of the last turn of every conversation, or of every text."""
        try:
            async with asyncio.timeout(limits.request_timeout):
                body = await read_body(request, limits.max_body_bytes)
                conversations = parse_request(body, body_model, system_prompt)
                if len(body) < LARGE_BODY:
                    texts, cut = encode(model, conversations, limits.truncate)
                else:
                    texts, cut = await asyncio.to_thread(
                        encode, model, conversations, limits.truncate
                    )
                scores = await batcher.score(texts)
        except TimeoutError:
            raise RequestError(
                504,
                "timeout",
                f"not answered within {limits.request_timeout:g} seconds: send fewer texts at a "
                "time, or try again later",
            ) from None
        except QueueFullError:
            raise RequestError(
                503,
                "overloaded",
                f"too many texts wait already (the limit is {limits.max_queue}): try again later",
                **{"Retry-After": str(RETRY_AFTER_SECONDS)},
            ) from None
        except ScoringError as error:
            raise RequestError(500, "internal_error", str(error)) from None
        metrics.texts.inc(len(texts))
        named = [dict(zip(attributes, of_text, strict=True)) for of_text in scores]
        answer = {"model": name, "attributes": attributes, "scores": named}
        return _json(200, answer | ({"truncated": cut} if cut else {}))

    @app.get("/v1/model")
    async def describe() -> Response:
        """What is served: attributes, their ranges, and the limits.

        `min_value` and `max_value` are the range that all of them share, null where they don't.
        """
        lowest, highest = model.schema.shared_range or (None, None)
        return _json(
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

    @app.get("/health")
    async def health() -> Response:
        """200 as long as the server takes requests."""
        if app.state.worker.done():
            raise RequestError(503, "broken", "the model's worker has ended: restart the server")
        return _json(200, {"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    # FastAPI itself collects only the models of parameters, and knows none for a body that the
    # route reads by itself.
    app.openapi()["components"] = components
    return app


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, of which no more than `max_bytes` are ever held.

    Raises:
        RequestError: for another content type than JSON, which also keeps web pages of other
            origins from sending requests through a user's browser; for a body that is too large.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise RequestError(
            415,
            "unsupported_media_type",
            f"send Content-Type: application/json, got {content_type or 'none'}",
        )
    too_large = RequestError(
        413,
        "too_large",
        f"the body has more than {max_bytes} bytes (max_body_bytes): send fewer texts at a time",
    )
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


class _Strict(BaseModel):
    """Part of a request, without keys that it doesn't know."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _check_unicode(text: str) -> str:
    if not is_text(text):
        raise ValueError("holds half of a surrogate pair: not valid Unicode text")
    return text


UnicodeText = Annotated[str, AfterValidator(_check_unicode)]
FilledText = Annotated[str, Field(pattern=r"\S")]
"""Checking a pattern, pydantic checks that it is Unicode too."""


class TurnItem(_Strict):
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


class ConversationItem(_Strict):
    """A line of the published conversation format."""

    system: UnicodeText | None = Field(None, description="none: the server's system prompt")
    conversations: list[TurnItem] = Field(
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


class AttributesRequest(_Strict):
    """What to score: conversations, or texts that are answers without a question."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    conversations: list[ConversationItem] = []
    texts: list[FilledText] = []

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
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise RequestError(400, "malformed_json", "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, "malformed_json", f"the body is no valid JSON: {error}") from None
    try:
        request = model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None
    return [
        Conversation(
            [Turn(turn.role, turn.value) for turn in item.conversations],
            system_prompt if item.system is None else item.system,
        )
        for item in request.conversations
    ] + [Conversation([Turn(ASSISTANT, text)], system_prompt) for text in request.texts]


def _refusal(error: ValidationError) -> RequestError:
    if error.error_count() > MOST_LISTABLE:
        return RequestError(
            422,
            "invalid_request",
            f"{error.error_count()} problems, too many to list: send fewer turns to see them",
        )
    problems = error.errors(include_url=False, include_context=False)
    message = _listed(map(_problem_text, problems), len(problems))
    if any(problem["type"] == "too_long" for problem in problems):
        return RequestError(413, "too_large", f"{message} (max_items)")
    return RequestError(422, "invalid_request", message)


def _problem_text(problem: ErrorDetails) -> str:
    """Where the problem is, and pydantic's words unless they need Python to be understood."""
    kind, found = problem["type"], problem["input"]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
    where = "".join(steps).removeprefix(".")
    text = CLEARER.get(kind, problem["msg"]).removeprefix("Value error, ")
    got = f", got {reprlib.repr(found)}" if kind.endswith(("_type", "literal_error")) else ""
    return f"{where}: {text}{got}" if where else f"{text}{got}"


def encode(
    model: AttributeModel, conversations: Sequence[Conversation], truncate: bool
) -> tuple[list[Text], list[int]]:
    """The tokens of every conversation, and the places of those that were cut.

    Raises:
        RequestError: naming what has more tokens than `max_seq_len`, unless `truncate` cuts it.
    """
    texts, cut, too_long = [], [], []
    for i, conversation in enumerate(conversations):
        *turns, response = conversation.turns
        group, num_cut = model.encode(conversation.system, turns, [response.value])
        if num_cut and not truncate:
            whole, _ = encode_for_scoring(
                model.template,
                model.tokenizer,
                conversation.system,
                turns,
                [response.value],
                max_seq_len=sys.maxsize,
            )
            too_long.append(f"[{i}] has {whole.num_tokens} tokens")
        elif num_cut:
            cut.append(i)
        texts.append([*group.prompt, *group.responses[0]])
    if too_long:
        raise RequestError(
            413,
            "too_long",
            f"more than {model.max_seq_len} tokens: {_listed(too_long, len(too_long))}",
        )
    return texts, cut


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "steerlm2_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "steerlm2_request_seconds", "Seconds to the answer", ["path"], registry=registry
        )
        self.texts = Counter("steerlm2_texts", "Texts scored", registry=registry)
        self.batch_texts = Histogram(
            "steerlm2_batch_texts",
            "Texts of a batch",
            buckets=[2**i for i in range(11)],
            registry=registry,
        )
        self.waiting_texts = Gauge(
            "steerlm2_waiting_texts", "Texts in the queue", registry=registry
        )


class Measured:
    """Middleware that counts and times the requests; paths that don't exist are one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        try:
            await self.app(scope, receive, send_and_note)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)


def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case RequestError():
            return _error(error.status, error.kind, str(error), error.headers)
        case HTTPException():
            kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
            where = f"{request.method} {request.url.path}"
            message = f"{where}: {error.detail}. Known paths: {', '.join(PATHS)}"
            return _error(error.status_code, kind, message, error.headers)
        case ClientDisconnect():
            return _error(400, "disconnected", "the connection was closed before the body's end")
    return _error(500, "internal_error", f"{type(error).__name__}; the server's log has more")


def _error(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    return _json(status, {"error": {"type": kind, "message": message}}, headers)


def _json(status: int, value: object, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(value, allow_nan=False).encode()
    return Response(body, status, headers, media_type="application/json")


def _listed(problems: Iterable[str], count: int) -> str:
    """Problems quote what they found: a short answer goes to a long request too."""
    shown = [
        problem if len(problem) <= LONGEST_PROBLEM else f"{problem[:LONGEST_PROBLEM]}..."
        for problem in itertools.islice(problems, MOST_PROBLEMS)
    ]
    more = count - len(shown)
    return "; ".join(shown + ([f"... and {more} more"] if more else []))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
