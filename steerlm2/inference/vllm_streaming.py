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
from steerlm2.escaping import one_line
from steerlm2.inference.completions import NEVER, NO_OTHER_CUTS
from steerlm2.inference.engines import OTHER_STOP
from steerlm2.inference.server_client import (
    MALFORMED,
    TRANSIENT,
    ServerClient,
    as_list,
    as_number,
    as_text,
    as_whole,
    is_loopback,
    key_header,
    reason,
    ssl_context,
)
from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb

MOST_EVENT_BYTES = 1 << 20
"""Of an event of the stream. A choice: vLLM's have a few kilobytes."""


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
            verify=ssl_context(),
        )

    async def generate(
        self, prompt: Sequence[int], settings: GenerationSettings
    ) -> AsyncGenerator[Piece]:
        """The pieces of all answers; closing it closes the connection, which ends the generation.

        Raises:
            ValueError: where the server refuses the request.
            ConnectionError: where it doesn't answer, its answer isn't in vLLM's format, or it ends
                before the answers do.
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
        # Answers that haven't ended -> tokens that they may still have.
        room = dict.fromkeys(range(settings.n), settings.max_new_tokens)
        try:
            async with self._http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if not answer.is_success:
                    raise self._refusal(answer.status_code, await _beginning(answer))
                async for event in _events(answer):
                    for piece in self._pieces(event, room, settings.top_log_probs):
                        yield piece
                    if not room:
                        return
        except httpx.RequestError as error:
            raise ConnectionError(
                f"the server at {self.url} doesn't answer "
                f"({one_line(f'{type(error).__name__}: {error}')})"
            ) from error
        raise ConnectionError(f"the server at {self.url} ended before the answers did")

    async def close(self) -> None:
        await self._http.aclose()

    def _refusal(self, status: int, body: bytes) -> Exception:
        problem = f"status {status}: {reason(httpx.Response(status, content=body))}"
        if status >= 500 or status in (401, 403, 404, *TRANSIENT):
            return ConnectionError(f"the server at {self.url} fails ({problem})")
        return ValueError(f"{self.url}/v1/completions refuses the request: {problem}")

    def _pieces(self, event: Any, room: dict[int, int], num_top: int | None) -> list[Piece]:
        """What an event tells of the answers with room, which is then less."""
        if isinstance(event, dict) and "error" in event:
            problem = one_line(str(event["error"]))
            raise ConnectionError(f"the server at {self.url} fails ({problem})")
        try:
            pieces = []
            for choice in as_list(event["choices"]):
                piece = self._piece(choice, num_top)
                room[piece.answer] -= len(piece.tokens)
                if room[piece.answer] < 0:
                    raise ValueError("more tokens than were asked for")
                if piece.finish_reason is not None:
                    del room[piece.answer]
                pieces.append(piece)
            return pieces
        except MALFORMED as error:
            raise ConnectionError(
                f"{self.url}/v1/completions doesn't answer as a vLLM server does that gives "
                f"token_ids: {one_line(str(event))}"
            ) from error

    def _piece(self, choice: dict[str, Any], num_top: int | None) -> Piece:
        tokens = [as_whole(token_id) for token_id in as_list(choice["token_ids"] or [])]
        finish_reason = choice["finish_reason"]
        finish_reason = None if finish_reason is None else as_text(finish_reason)
        if finish_reason == STOP and tokens[-1:] != [self.stop_id]:
            finish_reason = OTHER_STOP
        log_probs = _log_probs(choice.get("logprobs"), num_top or 0)
        if log_probs is None and tokens and num_top is not None:
            raise ValueError("tokens without the log-probs that were asked for")
        if log_probs is not None and len(log_probs) != len(tokens):
            raise ValueError("another number of log-probs than of tokens")
        return Piece(as_whole(choice["index"]), tokens, log_probs, finish_reason)


def _log_probs(given: dict[str, Any] | None, count: int) -> list[TokenLogProb] | None:
    if given is None:
        return None
    tops = given["top_logprobs"] or [{}] * len(given["token_logprobs"])
    found = []
    for log_prob, top in zip(given["token_logprobs"], tops, strict=True):
        given_top = ((_id(token), as_number(own)) for token, own in top.items())
        named = sorted(given_top, key=_descending)
        # The sampled token comes too, if it isn't among them.
        found.append(TokenLogProb(as_number(log_prob), tuple(named[:count])))
    return found


def _descending(named: tuple[int, float]) -> float:
    return -named[1]


def _id(token: str) -> int:
    """Of "token_id:17"."""
    return as_whole(int(token.removeprefix("token_id:")))


async def _events(answer: httpx.Response) -> AsyncIterator[Any]:
    """The JSON values of server-sent events, up to [DONE].

    Raises:
        ConnectionError: for an event that is no JSON or has no end.
    """
    async for line in _lines(answer):
        if not line.startswith(b"data:"):
            continue
        text = line.removeprefix(b"data:").strip()
        if text == b"[DONE]":
            return
        try:
            event = json.loads(text)
        except (ValueError, RecursionError) as error:
            shown = one_line(text.decode("utf-8", "replace"))
            raise ConnectionError(f"the server's stream isn't JSON: {shown}") from error
        yield event


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of a stream as they come, none longer than MOST_EVENT_BYTES."""
    begun = bytearray()
    async for chunk in answer.aiter_bytes():
        begun += chunk
        if b"\n" in chunk:
            *lines, rest = begun.split(b"\n")
            for line in lines:
                yield bytes(line)
            begun = rest
        if len(begun) > MOST_EVENT_BYTES:
            raise ConnectionError(
                f"the server's stream has an event of more than {MOST_EVENT_BYTES} bytes"
            )
    yield bytes(begun)


async def _beginning(answer: httpx.Response) -> bytes:
    """A refusal's body, as far as a message needs it."""
    content = b""
    async for chunk in answer.aiter_bytes():
        content += chunk
        if len(content) > MOST_EVENT_BYTES:
            break
    return content[:MOST_EVENT_BYTES]
