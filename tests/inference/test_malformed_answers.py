"""Answers that no vLLM server gives: all clients end in one line, or ask again."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from steerlm2.config.keys import ServerOptions
from steerlm2.inference import server_client, vllm_streaming
from steerlm2.inference.completions import CompletionsEngine
from steerlm2.inference.engines import Request, Sample, SamplingSettings
from steerlm2.inference.server_client import ClassifyClient
from steerlm2.inference.streaming import GenerationSettings, Piece
from steerlm2.inference.vllm_streaming import VllmStreamingEngine

Json = Any

SETTINGS = SamplingSettings(
    n=2, temperature=0.7, top_p=0.9, max_new_tokens=4, stop_id=3, forbidden_ids=(0,)
)
MODELS = {"data": [{"id": "served", "max_model_len": 512}]}


class RawServer(threading.Thread):
    """Answers a connection's one request with given bytes, and closes it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.models = answer_of(MODELS)
        self.answers: list[bytes] = []
        """One a request, the last one for all others."""
        self.asked = 0

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            with connection:
                head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
                while len(body) < int(fields.get(b"content-length", 0)):
                    body += connection.recv(65_536)
                if head.startswith(b"GET"):
                    connection.sendall(self.models)
                    continue
                self.asked += 1
                given = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
                connection.sendall(given)


def answer_of(content: Json, *, status: int = 200, fields: str = "") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    if "content-length" not in fields:
        fields += f"content-length: {len(body)}\r\n"
    return f"HTTP/1.1 {status} Odd\r\nconnection: close\r\n{fields}\r\n".encode() + body


def events_of(*events: Json) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RawServer]:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.001)
    server = RawServer()
    server.start()
    yield server
    server.listening.shutdown(socket.SHUT_RDWR)
    server.listening.close()
    server.join()


def classify(server: RawServer) -> list[list[float]]:
    client = ClassifyClient(server.url, ["humor", "verbosity"], retries=1, timeout=5)
    client.connect(512)
    return client.classify([[5, 6]])


def sample(server: RawServer) -> list[list[Sample]]:
    engine = CompletionsEngine(server.url, SETTINGS, lambda text: [9], retries=1, timeout=5)
    engine.connect(512)
    return engine.sample([Request([7], 0)])


def stream(server: RawServer, top_log_probs: int | None = None) -> list[Piece]:
    async def collect() -> list[Piece]:
        engine = VllmStreamingEngine(
            ServerOptions(url=server.url, retries=1, timeout=5),
            stop_id=3,
            forbidden_ids=(0,),
            max_seq_len=512,
        )
        try:
            settings = GenerationSettings(4, n=2, top_log_probs=top_log_probs)
            return [each async for each in engine.generate([7], settings)]
        finally:
            await engine.close()

    return asyncio.run(collect())


CLIENTS: dict[str, Callable[[RawServer], Any]] = {
    "classify": classify,
    "completions": sample,
    "streaming": stream,
}

SCORES: Json = {"data": [{"probs": [1.5, 2.5], "label": "verbosity"}]}


def choices(**change: Any) -> Json:
    own = {"finish_reason": "stop", "text": "a", "token_ids": [5, 3]} | change
    return {"choices": [own | {"index": i} for i in range(2)]}


NOT_FINISHED = {"choices": [{"index": 0, "token_ids": [5], "finish_reason": None}]}
GOOD = {
    "classify": answer_of(SCORES),
    "completions": answer_of(choices()),
    "streaming": answer_of(events_of(choices())),
}

BROKEN = {
    "bad gzip": answer_of(b"\x1f\x8bno gzip", fields="content-encoding: gzip\r\n"),
    "no answer": b"",
    "no HTTP": b"\x00\x01\x02\r\n\r\n",
    "ends early": answer_of(b"{", fields="content-length: 1000\r\n"),
    "length is no number": answer_of(b"{}", fields="content-length: two\r\n"),
    "negative length": answer_of(b"{}", fields="content-length: -2\r\n"),
    "endless length": answer_of(b"{}", fields=f"content-length: {'9' * 30}\r\n"),
    "two lengths": answer_of(b"{}", fields="content-length: 1\r\ncontent-length: 2\r\n"),
    "bad chunks": answer_of(
        b"zz\r\n", fields="transfer-encoding: chunked\r\nx-content-length: 1\r\n"
    ),
    "slow request": answer_of({"error": {"message": "slow"}}, status=408),
    "too early": answer_of(b"", status=425),
    "fails": answer_of(b"\xff\xfe", status=500),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("client", ["classify", "completions"])
def test_broken_answers_are_asked_for_again(server: RawServer, client: str, broken: bytes) -> None:
    server.answers = [broken, GOOD[client]]
    assert CLIENTS[client](server)
    assert server.asked == 2


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("client", CLIENTS)
def test_broken_answers_end_in_one_line(server: RawServer, client: str, broken: bytes) -> None:
    server.answers = [broken]
    with pytest.raises(ConnectionError) as caught:
        CLIENTS[client](server)
    check_message(str(caught.value))


def check_message(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 600


STRANGE: dict[str, bytes] = {
    "no JSON": b"<html>\x1b[2J\n\n</html>",
    "empty": b"",
    "too deep": b"[" * 100_000,
    "number": b"3",
    "text": b'"data"',
    "null": b"null",
    "list": b"[]",
    "nothing in it": b"{}",
    "no UTF-8": b'{"choices": "\xff"}',
    "endless number": b'{"choices": ' + b"9" * 9999 + b"}",
}

CLASSIFY_STRANGE: dict[str, Json] = {
    "text for scores": {"data": [{"probs": "12"}]},
    "texts for numbers": {"data": [{"probs": ["1.5", "2.5"]}]},
    "NaN": {"data": [{"probs": [float("nan"), 1.0]}]},
    "infinite": {"data": [{"probs": [float("inf"), 1.0]}]},
    "huge": {"data": [{"probs": [10**400, 1.0]}]},
    "true": {"data": [{"probs": [True, 1.0]}]},
    "null": {"data": [{"probs": [None, 1.0]}]},
    "objects": {"data": [{"probs": {"1": 2, "3": 4}}]},
    "label is a number": {"data": [{"probs": [1.5, 2.5], "label": 3}]},
    "label is a list": {"data": [{"probs": [1.5, 2.5], "label": []}]},
    "two results": {"data": [{"probs": [1.5, 2.5]}] * 2},
    "data is an object": {"data": {"probs": [1.5, 2.5]}},
}

CHOICES_STRANGE: dict[str, Json] = {
    "negative id": choices(token_ids=[-5, 3]),
    "huge id": choices(token_ids=[2**70, 3]),
    "text for ids": choices(token_ids="53"),
    "texts for ids": choices(token_ids=["5", "3"]),
    "fractions for ids": choices(token_ids=[5.0, 3.0]),
    "true for an id": choices(token_ids=[True]),
    "object for ids": choices(token_ids={"5": 3}),
    "more tokens than asked": choices(token_ids=[5] * 5),
    "reason is a number": choices(finish_reason=3),
    "reason is a list": choices(finish_reason=["stop"]),
    "index is a text": {"choices": [choices()["choices"][0] | {"index": "0"}] * 2},
    "negative index": {"choices": [choices()["choices"][0] | {"index": -1}] * 2},
    "index too high": {"choices": [choices()["choices"][0] | {"index": 7}] * 2},
    "twice the same index": {"choices": [choices()["choices"][0]] * 2},
    "choices are an object": {"choices": {"0": choices()["choices"][0]}},
    "a choice is a list": {"choices": [[], []]},
    "logprobs is a number": choices(logprobs=3),
}


def test_strange_scores_end_in_one_line(server: RawServer) -> None:
    for name, content in (STRANGE | CLASSIFY_STRANGE).items():
        server.answers = [answer_of(content)]
        with pytest.raises(ValueError, match="doesn't answer as a vLLM server does") as caught:
            print(name, classify(server))
        check_message(str(caught.value))


def test_strange_completions_end_in_one_line(server: RawServer) -> None:
    for name, content in (STRANGE | CHOICES_STRANGE).items():
        server.answers = [answer_of(content)]
        with pytest.raises(ValueError, match="doesn't answer as a vLLM server does") as caught:
            print(name, sample(server))
        check_message(str(caught.value))


def test_strange_streams_end_in_one_line(server: RawServer) -> None:
    """Those that are no JSON, as an event."""
    strange = {name: b"data: %b\n\n" % content for name, content in STRANGE.items()}
    strange |= {name: events_of(content) for name, content in CHOICES_STRANGE.items()}
    strange["log-probs are texts"] = events_of(choices(logprobs={"token_logprobs": ["a", "b"]}))
    strange["no log-prob"] = events_of(
        choices(logprobs={"token_logprobs": [None, 0], "top_logprobs": None})
    )
    ended = {"choices": choices()["choices"][:1]}
    strange["tokens after the end"] = events_of(ended, ended)
    strange["done early"] = events_of(NOT_FINISHED) + b"data: [DONE]\n\n"
    for name, content in strange.items():
        server.answers = [answer_of(content)]
        with pytest.raises(ConnectionError) as caught:
            print(name, stream(server))
        check_message(str(caught.value))


def test_log_probs_that_were_asked_for_must_come(server: RawServer) -> None:
    server.answers = [answer_of(events_of(choices()))]
    assert stream(server)
    with pytest.raises(ConnectionError, match="doesn't answer as a vLLM server does") as caught:
        stream(server, top_log_probs=0)
    check_message(str(caught.value))


MODELS_STRANGE: dict[str, Json] = {
    "id is a number": {"data": [{"id": 3}]},
    "id is a list": {"data": [{"id": []}]},
    "limit is a text": {"data": [{"id": "served", "max_model_len": "512"}]},
    "limit is negative": {"data": [{"id": "served", "max_model_len": -1}]},
    "a model is a text": {"data": ["served"]},
    "data is a number": {"data": 3},
}


def test_strange_lists_of_models_end_in_one_line(server: RawServer) -> None:
    for name, content in (STRANGE | MODELS_STRANGE).items():
        server.models = answer_of(content)
        for client in CLIENTS.values():
            with pytest.raises(ValueError, match="doesn't answer as a vLLM server does") as caught:
                print(name, client(server))
            check_message(str(caught.value))


def test_a_server_without_models_is_named(server: RawServer) -> None:
    server.models = answer_of({"data": []})
    with pytest.raises(ValueError, match=r"has no model$"):
        classify(server)


def test_a_refusal_is_quoted_in_one_line(server: RawServer) -> None:
    refusal = {"error": {"message": "no\n\x1b[31mway " * 1000}}
    for client in CLIENTS.values():
        server.answers = [answer_of(refusal, status=400)]
        with pytest.raises(ValueError, match="status 400: no") as caught:
            client(server)
        check_message(str(caught.value))


def test_answers_are_not_held_beyond_a_limit(
    server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed megabyte of spaces, where less may come."""
    monkeypatch.setattr(server_client, "MOST_ANSWER_BYTES", 1 << 16)
    monkeypatch.setattr(vllm_streaming, "MOST_EVENT_BYTES", 1 << 16)
    packed = gzip.compress(b" " * (1 << 20))
    server.answers = [answer_of(packed, fields="content-encoding: gzip\r\n")]
    for client in (classify, sample):
        with pytest.raises(ValueError, match="answers with more than"):
            client(server)
    with pytest.raises(ConnectionError, match="an event of more than"):
        stream(server)


def test_an_answer_that_never_ends_is_late(
    server: RawServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of it comes in time; time itself is made to fly."""
    times = iter(range(0, 100_000, 10))
    monkeypatch.setattr(server_client.time, "monotonic", lambda: float(next(times)))
    with pytest.raises(ConnectionError, match="ReadTimeout: no whole answer within 5 seconds"):
        classify(server)
