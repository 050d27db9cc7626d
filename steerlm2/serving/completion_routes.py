"""Continuations of given texts: OpenAI's POST /v1/completions, and PUT /generate.

The second is as NeMo's evaluation server has it, which the clients of the SteerLM guide ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, cast

from fastapi import FastAPI, Request, Response
from pydantic import BeforeValidator, Field

from steerlm2.data.templates import EXTRA_ID_TOKENS, ExtraIdTemplate, Segment, encode_segments
from steerlm2.inference.steered import SteeredModel, TextToken
from steerlm2.inference.streaming import GenerationSettings
from steerlm2.serving.event_stream import while_connected
from steerlm2.serving.http import FirstProblem, body_schema, json_response, parse_body
from steerlm2.serving.steering_requests import (
    ANYTHING,
    MOST_TOP_K,
    CompletionRequest,
    Ignoring,
    Neutral,
    Prompt,
    check_at_most,
    check_stop,
    check_text,
    invalid,
    split_model,
    usable_temperature,
)
from steerlm2.serving.steering_service import (
    LOWEST_LOG_PROB,
    REFUSALS,
    Answer,
    Service,
    in_time,
    reason_word,
    respond,
    token_text,
    usage_of,
)

COMPLETIONS, GENERATE = "/v1/completions", "/generate"

ItemT = TypeVar("ItemT")

COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens here."""


def add_completions(app: FastAPI, service: Service) -> dict[str, Any]:
    """Add POST /v1/completions; returns its components for /openapi.json."""
    described, components = body_schema(CompletionRequest)

    @app.post(COMPLETIONS, openapi_extra=described)
    async def complete(request: Request) -> Response:
        """Continuations of texts or token ids, as in OpenAI's API."""
        return await respond(
            request,
            service,
            "prompts",
            lambda body: CompletionWork(service, parse_body(body, CompletionRequest, REFUSALS)),
        )

    return components


class CompletionWork:
    """A checked request for continuations.

    Raises:
        RequestError: for what can't be done.
    """

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        self.service, self.asked = service, asked
        check_text(asked)
        if split_model(asked.model, [service.name]) is not None:
            raise invalid("model: attributes are for chats; here the prompt has all", "model")
        self.n = asked.n or 1
        check_at_most({"n": asked.n}, service.limits.max_n, "max_n")
        given = prompts_in(asked.prompt)
        if len(given) > service.limits.max_items:
            raise invalid(
                f"at most {service.limits.max_items} prompts (max_items), got {len(given)}",
                param="prompt",
            )
        for each in given:
            if isinstance(each, str):
                service.check_size([each], "prompt")
        self.prompts = prompts_of(service.model, given)
        wanted = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        for prompt in self.prompts:
            service.room(prompt, wanted, wanted, param="prompt")
        self.settings = asked.settings(
            n=self.n, max_new_tokens=wanted, top_log_probs=asked.logprobs
        )
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def answer(self) -> Response:
        """The whole answer."""
        async with self.service.place():
            answers = await together(
                self.service.answers(prompt, self.settings, self.asked.stop_texts)
                for prompt in self.prompts
            )
        flat = [answer for own in answers for answer in own]
        return await self.service.response(flat, lambda: self._whole(flat))

    def _whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return self.head | {
            "choices": [
                self._choice(i, answer.text, answer.tokens, answer.finish_reason)
                for i, answer in enumerate(answers)
            ],
            "usage": self._usage(sum(answer.num_tokens for answer in answers)),
        }

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer in chunks, those of all prompts as they come."""
        num_tokens = 0
        starts = [0] * len(self.prompts) * self.n
        streams = [
            self.service.deltas(prompt, self.settings, self.asked.stop_texts)
            for prompt in self.prompts
        ]
        async with self.service.place(), contextlib.aclosing(side_by_side(streams)) as deltas:
            async for number, delta in deltas:
                num_tokens += delta.num_tokens
                if not (delta.text or delta.tokens or delta.finish_reason):
                    continue
                i = number * self.n + delta.answer
                choice = self._choice(i, delta.text, delta.tokens, delta.finish_reason, starts[i])
                starts[i] += len(delta.text)
                yield self.head | {"choices": [choice]}
        if self.asked.wants_usage:
            yield self.head | {"choices": [], "usage": self._usage(num_tokens)}

    def _choice(
        self,
        i: int,
        text: str,
        tokens: Sequence[TextToken],
        finish_reason: str | None,
        start: int = 0,
    ) -> dict[str, Any]:
        return {
            "index": i,
            "text": text,
            "logprobs": self._log_probs(tokens, start),
            "finish_reason": None if finish_reason is None else reason_word(finish_reason),
        }

    def _log_probs(self, tokens: Sequence[TextToken], start: int) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        texts = [token_text(self.service.model, token.token_id) for token in tokens]
        offsets = list(itertools.accumulate(map(len, texts), initial=start))[: len(texts)]
        known = [token.log_prob for token in tokens if token.log_prob is not None]
        return {
            "tokens": texts,
            "token_logprobs": [max(own.log_prob, LOWEST_LOG_PROB) for own in known],
            "top_logprobs": [
                {
                    token_text(self.service.model, token_id): max(log_prob, LOWEST_LOG_PROB)
                    for token_id, log_prob in own.top
                }
                for own in known
            ],
            "text_offset": offsets,
        }

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return usage_of(sum(map(len, self.prompts)), num_tokens)


def prompts_in(given: Prompt) -> Sequence[str | list[int]]:
    """The prompts of a request, which may be one: a text or token ids each."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [cast("list[int]", given)]
    return cast("list[str] | list[list[int]]", given)


def prompts_of(model: SteeredModel, given: Sequence[str | list[int]]) -> list[list[int]]:
    """The token ids of prompts: texts, in which nothing spells a control token, or ids.

    Raises:
        RequestError: for empty prompts and ids that the tokenizer doesn't have.
    """
    bos = [] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id]
    prompts = [
        [*bos, *model.tokenizer.encode(each)] if isinstance(each, str) else each for each in given
    ]
    if not prompts or not all(prompts):
        raise invalid("prompt: is empty", param="prompt")
    size = model.tokenizer.vocab_size
    wrong = [each for prompt in prompts for each in prompt if not 0 <= each < size]
    if wrong:
        raise invalid(f"prompt: token ids go from 0 to {size - 1}, got {wrong[0]}", param="prompt")
    return prompts


async def together(works: Iterable[Awaitable[list[Answer]]]) -> list[list[Answer]]:
    """The results of several works, of which a failure ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def side_by_side(
    streams: Sequence[AsyncGenerator[ItemT]],
) -> AsyncGenerator[tuple[int, ItemT]]:
    """What several streams give, as it comes, each with its stream's number.

    A failure of one ends the others, and so does whoever closes the iterator.
    """
    news: asyncio.Queue[tuple[int, ItemT] | Exception | None] = asyncio.Queue(len(streams))

    async def read(number: int, stream: AsyncGenerator[ItemT]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await news.put((number, item))
        except Exception as error:
            await news.put(error)
        else:
            await news.put(None)

    readers = [asyncio.create_task(read(*each)) for each in enumerate(streams)]
    unfinished = len(streams)
    try:
        while unfinished:
            new = await news.get()
            if isinstance(new, Exception):
                raise new
            if new is None:
                unfinished -= 1
            else:
                yield new
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


# NeMo's interface


class GenerateRequest(Ignoring):
    """PUT /generate."""

    NEUTRAL: ClassVar[Neutral] = {
        "add_BOS": (ANYTHING,),  # a prompt begins as those of the training
        "all_probs": (False,),
        "compute_logprob": (False,),
        "min_tokens_to_generate": (0, 1),  # the token that ends an answer is one
        "repetition_penalty": (1,),
        "neighbors": (0,),
        "task_ids": (),
    }

    sentences: FirstProblem[str] = Field(min_length=1)
    tokens_to_generate: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0, le=100)
    greedy: bool = False
    top_k: int = Field(0, ge=0, le=MOST_TOP_K, description="0: all tokens")
    top_p: float = Field(0.9, ge=0, le=1, description="0: all tokens")
    end_strings: Annotated[FirstProblem[str], BeforeValidator(check_stop)] = Field(
        default_factory=lambda: ["<|endoftext|>"], description="up to 16 texts"
    )
    random_seed: int | None = Field(None, ge=0, lt=2**63)


def add_generate(app: FastAPI, service: Service) -> dict[str, Any]:
    """Add PUT /generate; returns its components for /openapi.json."""
    described, components = body_schema(GenerateRequest)
    limits = service.limits

    @app.put(GENERATE, openapi_extra=described)
    async def generate(request: Request) -> Response:
        """Whole prompts with their answers, as NeMo's evaluation server gives them.

        Here alone the template's control tokens in a text are control tokens.
        """
        deadline = asyncio.get_running_loop().time() + limits.request_timeout
        async with in_time(deadline, limits), service.intake.body(request, "sentences") as body:
            work = await service.intake.run(len(body), GenerateWork, service, body)
            sentences = await while_connected(request.receive, work.answer())
            return json_response(200, {"sentences": sentences})

    return components


class GenerateWork:
    """A checked request for prompts with their answers.

    Raises:
        RequestError: for what can't be done.
    """

    def __init__(self, service: Service, body: bytes) -> None:
        self.service = service
        self.asked = asked = parse_body(body, GenerateRequest, REFUSALS)
        check_text(asked)
        if len(asked.sentences) > service.limits.max_items:
            raise invalid(
                f"at most {service.limits.max_items} sentences (max_items), got "
                f"{len(asked.sentences)}",
                param="sentences",
            )
        self.spelled = control_spellings(service.model)
        self.prompts = []
        for text in asked.sentences:
            service.check_size([_without_controls(text, self.spelled)], "sentences")
            prompt = prompt_with_controls(service.model, text, self.spelled)
            service.room(prompt, asked.tokens_to_generate, 0, param="sentences")
            self.prompts.append(prompt)

    async def answer(self) -> list[str]:
        """Every prompt with its answer."""
        asked = self.asked
        greedy = asked.greedy or asked.top_k == 1
        seed = secrets.randbits(48) if asked.random_seed is None else asked.random_seed % 2**62
        settings = GenerationSettings(
            max_new_tokens=asked.tokens_to_generate,
            temperature=0.0 if greedy else usable_temperature(asked.temperature),
            top_p=float(asked.top_p) or 1.0,
            top_k=0 if greedy else asked.top_k,
        )
        # The stop token ends an answer as it is, and is spelled as the caller spells it.
        ends = [text for text in asked.end_strings if text and text not in self.spelled]
        async with self.service.place():
            answers = await together(
                self.service.answers(
                    prompt, dataclasses.replace(settings, seed=seed + i), ends, whole=True
                )
                for i, prompt in enumerate(self.prompts)
            )
        return [
            text + _as_spelled(own.text, asked.end_strings, self.spelled)
            for text, (own,) in zip(asked.sentences, answers, strict=True)
        ]


def control_spellings(model: SteeredModel) -> dict[str, str]:
    """How texts may spell the template's control tokens -> the tokens.

    The published names are understood where others stand in for them.
    """
    template = model.template
    spelled = {token: token for token in template.control_tokens}
    if isinstance(template, ExtraIdTemplate):
        spelled = dict(zip(EXTRA_ID_TOKENS, template.control_tokens, strict=True)) | spelled
    return spelled


def prompt_with_controls(model: SteeredModel, text: str, spelled: Mapping[str, str]) -> list[int]:
    """The token ids of a text whose control tokens count as such, after the bos token."""
    parts = _split(text, spelled)
    segments = [Segment(spelled.get(part, part), control=part in spelled) for part in parts if part]
    ids = encode_segments(segments, model.tokenizer, model.template.control_tokens)
    bos = model.tokenizer.bos_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _split(text: str, spelled: Mapping[str, str]) -> list[str]:
    """The text in pieces, of which every other one spells a control token."""
    return re.split(f"({'|'.join(map(re.escape, spelled))})", text)


def _without_controls(text: str, spelled: Mapping[str, str]) -> str:
    return "".join(_split(text, spelled)[::2])


def _as_spelled(text: str, end_strings: Sequence[str], spelled: Mapping[str, str]) -> str:
    for end in end_strings:
        token = spelled.get(end)
        if token is not None and text.endswith(token):
            return text.removesuffix(token) + end
    return text
