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
training. `best_of: k` gives k answers, or the first `n` of them, the nearest to the request by the
attribute model first, with their scores, and `scores: true` the scores of any answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from steerlm2.attributes import parse_label
from steerlm2.data.packing import RewardGroup
from steerlm2.data.templates import is_too_long
from steerlm2.inference.steered import ScoreGroups, SteeredModel
from steerlm2.serving.chat_route import CHAT, add_chat
from steerlm2.serving.completion_routes import COMPLETIONS, GENERATE, add_completions, add_generate
from steerlm2.serving.http import (
    Metrics,
    add_components,
    json_response,
    new_app,
)
from steerlm2.serving.reward_server import ATTRIBUTES_PATH, AttributeScorer, add_attributes_route
from steerlm2.serving.steering_requests import split_model
from steerlm2.serving.steering_service import Service, SteeringLimits, SteeringMetrics

PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Nothing of the page comes from elsewhere, and browsers are told so."""

PATHS = (
    *(CHAT, COMPLETIONS, ATTRIBUTES_PATH, GENERATE, "/v1/models", "/v1/model"),
    *("/health", "/metrics", "/openapi.json", *PAGE_FILES),
)


def create_app(
    model: SteeredModel,
    name: str,
    *,
    limits: SteeringLimits | None = None,
    api_key: str | None = None,
    system_prompt: str | None = None,
    allowed_hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """The application that serves a model; it closes the model's engine at its end.

    Args:
        name: of the model, for callers.
        api_key: that callers must send; None: everybody may ask.
        system_prompt: of /v1/attributes, for conversations without one; None: the model's.
        allowed_hosts: that the server answers for (`hosts.is_allowed`).
    """
    limits = limits or SteeringLimits()
    metrics = Metrics()
    # What is slow to be known of a tokenizer is known before the first request.
    is_too_long(model.tokenizer, (), 0)
    scorer = None
    if model.attribute_model is not None:
        room = limits.max_queue * limits.max_n + limits.max_items  # answers find it in any case
        scorer = AttributeScorer(model.attribute_model, metrics.registry, room)
        model = dataclasses.replace(model, score_groups=_scoring(scorer))
    service = Service(model, name, limits, SteeringMetrics(metrics.registry), limits.intake())
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
        health=lambda: service.broken or (scorer.problem() if scorer is not None else None),
        api_key=api_key,
        also_open=tuple(PAGE_FILES),
        allowed_hosts=allowed_hosts,
    )
    components = [
        add_chat(app, service),
        add_completions(app, service),
        add_generate(app, service),
    ]
    if scorer is not None:
        system = model.system if system_prompt is None else system_prompt
        components.append(add_attributes_route(app, scorer, name, limits, system, service.intake))
    _add_models(app, service)
    _add_page(app)
    add_components(app, *components)
    return app


def _scoring(scorer: AttributeScorer) -> ScoreGroups:
    async def score_groups(groups: Sequence[RewardGroup]) -> list[list[list[float]]]:
        texts = [[*group.prompt, *own] for group in groups for own in group.responses]
        scores = iter(await scorer.score(texts))
        return [[next(scores) for _ in group.responses] for group in groups]

    return score_groups


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
        "max_n": service.limits.max_n,
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
    content = file.read_bytes()

    @app.get(path, include_in_schema=False)
    async def show() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)
