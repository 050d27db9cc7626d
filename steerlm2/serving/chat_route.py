"""POST /v1/chat/completions: messages and attributes in, answers out, streamed or not."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from steerlm2.inference.steered import Delta, TextToken
from steerlm2.serving.http import body_schema, parse_body
from steerlm2.serving.steering_requests import (
    ChatRequest,
    check_at_most,
    check_text,
    invalid,
    split_model,
)
from steerlm2.serving.steering_service import (
    LOWEST_LOG_PROB,
    REFUSALS,
    Answer,
    Service,
    reason_word,
    respond,
    token_text,
    usage_of,
)

CHAT = "/v1/chat/completions"


def add_chat(app: FastAPI, service: Service) -> dict[str, Any]:
    described, components = body_schema(ChatRequest)

    @app.post(CHAT, openapi_extra=described)
    async def chat(request: Request) -> Response:
        """Answers to a conversation, as in OpenAI's API."""
        return await respond(
            request,
            service,
            "messages",
            lambda body: ChatWork(service, parse_body(body, ChatRequest, REFUSALS)),
        )

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
        self.n = asked.n or asked.best_of or 1
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
        turns = (turn.value for turn in self.question.turns)
        service.check_size([self.question.system, *turns], "messages")
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

    async def answer(self) -> Response:
        """The whole answer."""
        async with self.service.place():
            chosen, num_tokens = await self._chosen()
        return await self.service.response(chosen, lambda: self._whole(chosen, num_tokens))

    def _whole(self, chosen: Sequence[Answer], num_tokens: int) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._log_probs(answer.tokens),
                "finish_reason": reason_word(answer.finish_reason),
            }
            | self._scores(answer)
            for i, answer in enumerate(chosen)
        ]
        return self.head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(len(self.prompt), num_tokens),
            "attributes": self.question.attributes,
        }

    async def events(self) -> AsyncGenerator[dict[str, Any]]:
        """The answer in chunks, each as soon as it is known."""
        async with self.service.place():
            num_tokens = 0
            begun: set[int] = set()
            async with contextlib.aclosing(self._deltas()) as deltas:
                async for i, delta, scores in deltas:
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
                        reason = reason_word(delta.finish_reason)
                        end = self._choice(i, {}, finish_reason=reason)
                        yield self._chunk(end | ({} if scores is None else {"scores": scores}))
        if self.asked.wants_usage:
            yield self._chunk() | {"usage": usage_of(len(self.prompt), num_tokens)}

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

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta, dict[str, float] | None]]:
        """What becomes known of the answers, with the scores of those that have ended."""
        asked, service = self.asked, self.service
        if self.best_of is not None:  # nothing is known before all have ended
            chosen, num_tokens = await self._chosen()
            for i, answer in enumerate(chosen):
                own = num_tokens if i == 0 else 0
                delta = Delta(i, answer.text, answer.tokens, own, answer.finish_reason)
                yield i, delta, answer.scores
            return
        answers = [Answer() for _ in range(self.settings.n)]
        stream = service.deltas(self.prompt, self.settings, asked.stop_texts)
        async with contextlib.aclosing(stream):
            async for delta in stream:
                answer = answers[delta.answer]
                answer.add(delta)
                if self.scored and delta.finish_reason is not None:
                    await service.score(self.question, [answer])
                yield delta.answer, delta, answer.scores

    def _scores(self, answer: Answer) -> dict[str, Any]:
        return {"scores": answer.scores} if self.scored else {}

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
