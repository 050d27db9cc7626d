"""Streaming from a vLLM server: token ids in, pieces of the answers out as they are generated.

The request is that of `completions.CompletionsEngine`, with `stream`; `return_token_ids` is an
extension of vLLM, without which no piece would say which tokens it has.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import httpx

from steerlm2.config.keys import ServerOptions
from steerlm2.data.records import STOP
from steerlm2.inference.completions import NEVER, NO_OTHER_CUTS
from steerlm2.inference.engines import OTHER_STOP
from steerlm2.inference.server_client import ServerClient, is_loopback, key_header, reason
from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb


class VllmStreamingEngine:
    """A `StreamingEngine` that asks a vLLM server.

    Args:
        server: is connected to at once.
        max_seq_len: tokens of a prompt together with its answer.

    Raises:
        ValueError: where the server doesn't have the model, or accepts fewer tokens.
        ConnectionError: where it doesn't answer.
    """

    def __init__(
        self,
        server: ServerOptions,
        *,
        stop_id: int,
        forbidden_ids: Sequence[int],
        max_seq_len: int,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.stop_id = stop_id
        self._bias = {str(token_id): NEVER for token_id in forbidden_ids}
        client = ServerClient(
            server.url,
            model=server.model,
            concurrency=1,
            timeout=server.timeout,
            retries=server.retries,
        )
        try:
            client.connect(max_seq_len)
            self.url, self.model, auth = client.url, client.model, client.auth
        finally:
            client.close()
        self._http = httpx.AsyncClient(
            auth=auth,
            timeout=server.timeout,
            limits=httpx.Limits(max_connections=server.concurrency),
            trust_env=not is_loopback(httpx.URL(self.url).host),
            headers=key_header(),
        )

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        """The pieces of all answers; closing it closes the connection, which ends the generation.

        Raises:
            ValueError: where the server refuses the request, or its answer isn't in vLLM's format.
            ConnectionError: where it doesn't answer, or ends before the answers do.
        """
        body: dict[str, Any] = NO_OTHER_CUTS | {
            "model": self.model,
            "prompt": list(prompt),
            "n": settings.n,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "max_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "stop_token_ids": [self.stop_id],
            "logit_bias": self._bias,
            "return_token_ids": True,
            "stream": True,
        }
        if settings.top_log_probs is not None:
            # Ids in place of texts, of which two tokens can have the same.
            body |= {"logprobs": settings.top_log_probs, "return_tokens_as_token_ids": True}
        open_answers = set(range(settings.n))
        try:
            async with self._http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise self._refusal(answer)
                async for event in _events(answer):
                    for piece in self._pieces(event, settings.top_log_probs or 0):
                        yield piece
                        if piece.finish_reason is not None:
                            open_answers.discard(piece.answer)
                    if not open_answers:
                        return
        except httpx.TransportError as error:
            raise ConnectionError(
                f"the server at {self.url} doesn't answer ({type(error).__name__}: {error})"
            ) from error
        raise ConnectionError(f"the server at {self.url} ended before the answers did")

    async def close(self) -> None:
        await self._http.aclose()

    def _refusal(self, answer: httpx.Response) -> Exception:
        problem = f"status {answer.status_code}: {reason(answer)}"
        if answer.status_code >= 500 or answer.status_code in (401, 403, 404, 429):
            return ConnectionError(f"the server at {self.url} fails ({problem})")
        return ValueError(f"{self.url}/v1/completions refuses the request: {problem}")

    def _pieces(self, event: dict[str, Any], num_top: int) -> list[Piece]:
        if "error" in event:
            raise ConnectionError(f"the server at {self.url} fails ({str(event['error'])[:200]})")
        try:
            return [self._piece(choice, num_top) for choice in event["choices"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.url}/v1/completions doesn't answer as a vLLM server does that gives "
                f"token_ids: {str(event)[:200]}"
            ) from error

    def _piece(self, choice: dict[str, Any], num_top: int) -> Piece:
        tokens = [int(token_id) for token_id in choice["token_ids"] or []]
        finish_reason = choice["finish_reason"]
        if finish_reason == STOP and tokens[-1:] != [self.stop_id]:
            finish_reason = OTHER_STOP
        log_probs = _log_probs(choice.get("logprobs"), num_top)
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError("another number of log-probs than of tokens")
        return Piece(int(choice["index"]), tokens, log_probs, finish_reason)


def _log_probs(given: dict[str, Any] | None, count: int) -> list[TokenLogProb] | None:
    if given is None:
        return None
    tops = given["top_logprobs"] or [{}] * len(given["token_logprobs"])
    found = []
    for log_prob, top in zip(given["token_logprobs"], tops, strict=True):
        named = sorted(((_id(token), float(own)) for token, own in top.items()), key=_descending)
        # The sampled token comes too, if it isn't among them.
        found.append(TokenLogProb(float(log_prob), tuple(named[:count])))
    return found


def _descending(named: tuple[int, float]) -> float:
    return -named[1]


def _id(token: str) -> int:
    """Of "token_id:17"."""
    return int(token.removeprefix("token_id:"))


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of server-sent events, up to [DONE]."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        try:
            yield json.loads(text)
        except ValueError as error:
            raise ValueError(f"the server's stream isn't JSON: {text[:200]}") from error
