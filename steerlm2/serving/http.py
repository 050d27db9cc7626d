"""What the servers share: bodies, errors, limits, metrics, and who may ask.

Every error has the body {"error": {"type": ..., "message": ..., "param": ..., "code": ...}}, which
is that of OpenAI's API: `param` is the request's key that is wrong, if one is.
"""

from __future__ import annotations

import hmac
import itertools
import json
import reprlib
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerlm2 import __version__
from steerlm2.data.jsonl import unique_keys
from steerlm2.serving.hosts import host_of, is_allowed

ALWAYS_OPEN = ("/health",)
"""Paths that need no API key: what starts a server asks whether it is up."""

RETRY_AFTER_SECONDS = 1

MOST_PROBLEMS, LONGEST_MESSAGE = 10, 500
"""That one answer lists, and its characters: messages quote what callers sent."""

LONGEST_PARAM = 100

MOST_LISTABLE = 10_000
"""Problems of a request: to collect more of them would hold up other requests for seconds."""

MOST_KEYS = 100
"""Of an object in a request."""

CLEARER = {
    "model_type": "Input should be an object",
    "string_pattern_mismatch": "is empty",
    "string_unicode": "holds half of a surrogate pair: not valid Unicode text",
}
"""pydantic's name of a problem -> our words, where its own are about Python."""


class RequestError(Exception):
    """What is answered in place of a result.

    Args:
        kind: the error's `type`.
        param: the key of the request that is wrong.
        code: a finer word than `kind`, where OpenAI's API has one.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else shortened(self.param, LONGEST_PARAM)
        message = shortened(str(self))
        error = {"type": self.kind, "message": message, "param": param, "code": self.code}
        return {"error": error}


def shortened(text: str, most: int = LONGEST_MESSAGE) -> str:
    """The text, or its beginning with "..." at the end."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def overloaded(message: str) -> RequestError:
    """What is answered while too much waits already."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return RequestError(503, "overloaded", f"{message}: try again later", headers=headers)


class Strict(BaseModel):
    """Part of a request, without keys that it doesn't know."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_keys(cls, given: object) -> object:
        if isinstance(given, dict) and len(given) > MOST_KEYS:
            raise ValueError(f"an object has at most {MOST_KEYS} keys, got {len(given)}")
        return given


ItemT = TypeVar("ItemT")

FirstProblem = Annotated[list[ItemT], FailFast()]
"""A list of which the first problem is told: to collect those of a megabyte takes seconds, in which
nothing else runs."""


@dataclass(frozen=True)
class Refusals:
    """How a route says that a body isn't of its model."""

    status: int = 422
    kind: str = "invalid_request"
    fewer: str = "texts"
    """What there may be too many of."""


RequestT = TypeVar("RequestT", bound=BaseModel)


def check_content_type(headers: Mapping[str, str]) -> None:
    """Raises:
    RequestError: for another content type than JSON, which also keeps web pages of other origins
        from sending requests through a user's browser.
    """
    content_type = headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != "application/json":
        got = shortened(content_type, LONGEST_PARAM) or "none"
        raise RequestError(
            415, "unsupported_media_type", f"send Content-Type: application/json, got {got}"
        )


def parse_body(body: bytes, model: type[RequestT], refusals: Refusals | None = None) -> RequestT:
    """The request that a body spells.

    Raises:
        RequestError: naming the problems, and where they are.
    """
    try:
        content = json.loads(
            body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=unique_keys
        )
    except RecursionError:
        raise RequestError(400, "malformed_json", "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, "malformed_json", f"the body is no valid JSON: {error}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error, refusals or Refusals()) from None


def _refusal(error: ValidationError, refusals: Refusals) -> RequestError:
    if error.error_count() > MOST_LISTABLE:
        return RequestError(
            refusals.status,
            refusals.kind,
            f"{error.error_count()} problems, too many to list: send fewer turns to see them",
        )
    problems = error.errors(include_url=False, include_context=False)
    message = listed(map(_problem_text, problems), len(problems))
    if any(problem["type"] == "too_long" for problem in problems):
        return RequestError(413, "too_large", f"{message} (max_items)")
    where = next((problem["loc"] for problem in problems if problem["loc"]), ())
    param = str(where[0]) if where else None
    return RequestError(refusals.status, refusals.kind, message, param=param)


def _problem_text(problem: ErrorDetails) -> str:
    """Where the problem is, and pydantic's words unless they need Python to be understood."""
    kind, found = problem["type"], problem["input"]
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
    where = "".join(steps).removeprefix(".")
    text = CLEARER.get(kind, problem["msg"]).removeprefix("Value error, ")
    got = f", got {reprlib.repr(found)}" if kind.endswith(("_type", "literal_error")) else ""
    return f"{where}: {text}{got}" if where else f"{text}{got}"


def listed(problems: Iterable[str], count: int) -> str:
    """The first of `count` problems, as far as an answer has room for them."""
    most = LONGEST_MESSAGE - len(f"; ... and {count} more")
    shown: list[str] = []
    for problem in itertools.islice(problems, MOST_PROBLEMS):
        room = most - len("; ".join([*shown, ""]))
        if shown and len(problem) > room:
            break
        shown.append(shortened(problem, room))
    more = count - len(shown)
    return "; ".join(shown + ([f"... and {more} more"] if more else []))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


class Metrics:
    """What /metrics shows of every server, in a registry of its own; a server adds to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            *("steerlm2_requests", "Requests answered", ["path", "status"]), registry=self.registry
        )
        self.seconds = Histogram(
            *("steerlm2_request_seconds", "Seconds to the end of the answer", ["path"]),
            registry=self.registry,
        )
        self.connections = Gauge(
            *("steerlm2_connections", "Open connections"), registry=self.registry
        )
        self.refused = Counter(
            *("steerlm2_refused_connections", "Closed before any path was asked", ["status"]),
            registry=self.registry,
        )
        """By the status that they got; "none" for idle ones that made room for others."""


class Lifespan(Protocol):
    """What runs beside the requests, from a server's start to its end."""

    def __call__(self, app: FastAPI) -> AbstractAsyncContextManager[None]: ...


class Health(Protocol):
    """Why a server can't take requests; None: it can."""

    def __call__(self) -> str | None: ...


def new_app(
    title: str,
    metrics: Metrics,
    *,
    lifespan: Lifespan,
    paths: Sequence[str],
    health: Health,
    api_key: str | None,
    also_open: Sequence[str] = (),
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """An application with /health, /metrics and /openapi.json, to which a server adds its routes.

    Args:
        paths: all of them, for metrics and messages.
        api_key: what `Authorization: Bearer` must have; None: everybody may ask.
        also_open: paths that need no key, besides ALWAYS_OPEN.
        allowed_hosts: as of `hosts.is_allowed`; others' requests are refused.
    """
    # The pages of /docs load their scripts from the internet.
    app = FastAPI(
        title=title,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.metrics = metrics
    if api_key is not None:
        app.add_middleware(KeyRequired, key=api_key, open_paths=(*ALWAYS_OPEN, *also_open))
    app.add_middleware(HostChecked, allowed=allowed_hosts)
    app.add_middleware(Measured, metrics=metrics, paths=paths)

    def answer_error(request: Request, error: Exception) -> Response:
        return _error_response(request, error, paths)

    for kind in (RequestError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_error)

    @app.get("/health")
    async def show_health() -> Response:
        """200 as long as the server takes requests."""
        if (problem := health()) is not None:
            raise RequestError(503, "broken", problem)
        return json_response(200, {"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def body_schema(model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`openapi_extra` of a route that reads a body of the model by itself, and its components.

    FastAPI itself collects only the models of parameters (`add_components`).
    """
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.pop("$defs", {})
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}, components


def add_components(app: FastAPI, *components: Mapping[str, Any]) -> None:
    """Put the models of bodies into /openapi.json; after the last route."""
    described = app.openapi().setdefault("components", {}).setdefault("schemas", {})
    for own in components:
        described.update(own)


class KeyRequired:
    """Middleware that asks for an API key."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Sequence[str]) -> None:
        self.app, self.open_paths = app, open_paths
        self.expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self.open_paths or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        error = RequestError(
            401,
            "unauthorized",
            "this server asks for an API key: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await json_response(error.status, error.body(), error.headers)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.expected)


class HostChecked:
    """Middleware that refuses requests for other hosts.

    Paths that are always open stay so: probes name a server as they like.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self.app, self.allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http" and scope["path"] not in ALWAYS_OPEN:
            error = self._problem(scope)
        if error is None:
            await self.app(scope, receive, send)
            return
        headers = {"Connection": "close"}
        await json_response(error.status, error.body(), headers)(scope, receive, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if "*" in self.allowed or (not given and scope["http_version"] == "1.0"):
            return None
        if len(given) != 1:
            return RequestError(400, "invalid_request", "the request must have one Host header")
        if is_allowed(host_of(given[0]), self.allowed):
            return None
        host = shortened(given[0], LONGEST_PARAM)
        return RequestError(
            421,
            "misdirected_request",
            f"this server doesn't answer to the host {host!r}: ask it by its address, or start it "
            "with that name in allowed_hosts",
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


def _error_response(request: Request, error: Exception, paths: Sequence[str]) -> Response:
    match error:
        case RequestError():
            found = error
        case HTTPException():
            kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
            where = f"{request.method} {shortened(request.scope['path'], LONGEST_PARAM)}"
            message = f"{where}: {error.detail}. Known paths: {', '.join(paths)}"
            found = RequestError(error.status_code, kind, message, headers=error.headers)
        case ClientDisconnect():
            message = "the connection was closed before the body's end"
            found = RequestError(400, "disconnected", message)
        case _:
            message = f"{type(error).__name__}; the server's log has more"
            found = RequestError(500, "internal_error", message)
    return json_response(found.status, found.body(), found.headers)


def json_response(status: int, value: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_dumped(value).encode(), status, headers, media_type="application/json")


def json_by_items(value: Mapping[str, Any]) -> str:
    """As `json.dumps`, but the items of lists one by one: none runs beside its encoder."""

    def text(item: object) -> str:
        if isinstance(item, list):
            return f"[{', '.join(map(_dumped, item))}]"
        return _dumped(item)

    return "{" + ", ".join(f"{_dumped(key)}: {text(item)}" for key, item in value.items()) + "}"


def _dumped(value: object) -> str:
    return json.dumps(value, allow_nan=False)
