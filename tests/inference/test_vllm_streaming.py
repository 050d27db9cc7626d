"""The engine that streams from a vLLM server, against one that answers as vLLM does.

tests/recipes/test_vllm.py has the real one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from steerlm2.config.keys import ServerOptions
from steerlm2.inference import server_client
from steerlm2.inference.engines import OTHER_STOP
from steerlm2.inference.streaming import GenerationSettings, Piece, TokenLogProb
from steerlm2.inference.vllm_streaming import VllmStreamingEngine

Json = dict[str, Any]
STOP_ID = 3
DONE = b"data: [DONE]\n\n"


def event(*choices: Json) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices)}).encode() + b"\n\n"


def choice(index: int, ids: list[int] | None, reason: str | None = None, **more: Any) -> Json:
    return {"index": index, "text": "?", "token_ids": ids, "finish_reason": reason} | more


WHOLE = [
    event(choice(0, [10])),
    event(choice(1, [20, 21])),
    event(choice(0, [11, STOP_ID], "stop")),
    event(choice(1, [22], "length")),
    DONE,
]


@pytest.fixture
def server(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    fake_vllm.events = WHOLE
    return fake_vllm


def connected(server: Any, max_seq_len: int = 512) -> VllmStreamingEngine:
    return VllmStreamingEngine(
        ServerOptions(url=server.url, retries=1),
        stop_id=STOP_ID,
        forbidden_ids=(0, 1),
        max_seq_len=max_seq_len,
    )


def pieces_of(server: Any, **settings: Any) -> list[Piece]:
    async def collect() -> list[Piece]:
        engine = connected(server)
        asked = GenerationSettings(**{"max_new_tokens": 8, "n": 2} | settings)
        try:
            return [piece async for piece in engine.generate([7, 8], asked)]
        finally:
            await engine.close()

    return asyncio.run(collect())


def test_pieces_come_as_the_server_gives_them(server: Any) -> None:
    assert pieces_of(server) == [
        Piece(0, [10], None, None),
        Piece(1, [20, 21], None, None),
        Piece(0, [11, STOP_ID], None, "stop"),
        Piece(1, [22], None, "length"),
    ]


def test_what_is_asked_for(server: Any) -> None:
    """Everything that decides the distribution is said, nothing left to the server's defaults."""
    pieces_of(server, temperature=0.5, top_p=0.9, top_k=4, seed=9)
    assert server.bodies == [
        {
            **{"model": "served", "prompt": [7, 8], "n": 2, "temperature": 0.5, "top_p": 0.9},
            **{"top_k": 4, "max_tokens": 8, "seed": 9, "stop_token_ids": [STOP_ID]},
            **{"logit_bias": {"0": -100, "1": -100}, "return_token_ids": True, "stream": True},
            **{"ignore_eos": True, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
        }
    ]
    pieces_of(server)
    assert server.bodies[-1]["top_k"] == -1


def test_log_probs_come_by_ids(server: Any) -> None:
    """The sampled token's own one comes too, if it isn't among the most likely ones."""
    own = {"token_id:10": -3.0, "token_id:12": -0.5, "token_id:11": -0.25}
    logprobs = {"token_logprobs": [-3.0], "top_logprobs": [own]}
    server.events = [event(choice(0, [10], "length", logprobs=logprobs)), DONE]
    (piece,) = pieces_of(server, n=1, top_log_probs=2)
    assert piece.log_probs == [TokenLogProb(-3.0, ((11, -0.25), (12, -0.5)))]
    assert server.bodies[0]["logprobs"] == 2
    assert server.bodies[0]["return_tokens_as_token_ids"] is True


def test_another_end_than_the_stop_token_is_told(server: Any) -> None:
    server.events = [event(choice(0, [10], "stop")), DONE]
    (piece,) = pieces_of(server, n=1)
    assert piece.finish_reason == OTHER_STOP


FAILURES: dict[str, tuple[Json, type[Exception], str]] = {
    "refused": ({"statuses": [400]}, ValueError, "refuses the request: status 400: no"),
    "fails": ({"statuses": [500]}, ConnectionError, "fails (status 500: no, 500)"),
    "key": ({"statuses": [401]}, ConnectionError, "fails (status 401: no, 401)"),
    "ends early": ({"events": WHOLE[:2]}, ConnectionError, "ended before the answers did"),
    "done early": ({"events": [*WHOLE[:2], DONE]}, ConnectionError, "ended before the answers"),
    "error event": (
        {"events": [b'data: {"error": {"message": "out of memory"}}\n\n']},
        ConnectionError,
        "out of memory",
    ),
    "no ids": ({"events": [event({"index": 0, "text": "a"})]}, ConnectionError, "gives token_ids"),
    "no JSON": ({"events": [b"data: {\n\n"]}, ConnectionError, "the server's stream isn't JSON"),
}


@pytest.mark.parametrize(("given", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_are_named(server: Any, given: Json, kind: type[Exception], message: str) -> None:
    vars(server).update(given)
    with pytest.raises(kind) as caught:
        pieces_of(server)
    assert message in str(caught.value)


def test_a_server_with_less_room_is_refused_at_once(server: Any) -> None:
    with pytest.raises(ValueError, match="takes texts of at most 512 tokens"):
        connected(server, max_seq_len=513)


def test_closing_the_iterator_closes_the_connection(server: Any) -> None:
    server.hangs_at = 2

    async def leave() -> None:
        engine = connected(server)
        pieces = engine.generate([7, 8], GenerationSettings(8, n=2))
        await anext(pieces)
        await pieces.aclose()
        assert await asyncio.to_thread(server.dropped.wait, 10)
        await engine.close()

    asyncio.run(leave())


def test_the_key_of_the_environment_is_sent(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_of(server)
    monkeypatch.setenv("STEERLM2_API_KEY", "s3cret")
    pieces_of(server)
    assert server.keys == [None, None, "Bearer s3cret", "Bearer s3cret"]
