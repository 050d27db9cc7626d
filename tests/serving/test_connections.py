"""Callers that hold connections, on real sockets: whatever they do, /health answers at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response

from steerlm2.serving import connections
from steerlm2.serving.connections import (
    MOST_HEAD_BYTES,
    MOST_HEAD_FIELDS,
    MOST_PIPELINED,
    Connections,
    GuardedConfig,
    GuardedServer,
    LoggedSeldom,
    connection_room,
)
from steerlm2.serving.http import Metrics, json_response, new_app
from steerlm2.serving.intake import Intake

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = (
    b"POST /work HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


@dataclass
class Serving:
    """A running server, whose POST /work answers once `go` is set."""

    port: int
    connections: Connections
    go: threading.Event
    refused: list[str]
    """What `on_refusal` was called with."""

    def connect(self, sent: bytes = b"") -> socket.socket:
        connected = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connected.sendall(sent)
        return connected

    def ask(self, sent: bytes) -> tuple[int, Any]:
        with self.connect(sent) as connected:
            return answer_in(connected)

    def health_seconds(self) -> float:
        started = time.monotonic()
        assert self.ask(HEALTH) == (200, {"status": "ok"})
        return time.monotonic() - started


def answer_in(connected: socket.socket) -> tuple[int, Any]:
    """Status and body of the next answer."""
    with connected.makefile("rb") as file:
        status = int(file.readline().split()[1])
        fields = dict(line.lower().strip().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
        return status, json.loads(file.read(int(fields[b"content-length"])))


def is_closed(connected: socket.socket) -> bool:
    """Whether the server closes within a second or two, without another word."""
    connected.settimeout(2)
    with contextlib.suppress(ConnectionError):
        return connected.recv(1) == b""
    return True


def app_of(go: threading.Event, intake: Intake) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = new_app(
        "test", Metrics(), lifespan=lifespan, paths=("/work",), health=lambda: None, api_key=None
    )

    @app.post("/work")
    async def work(request: Request) -> Response:
        async with intake.body(request) as body:
            while not go.is_set():
                await asyncio.sleep(0.01)
            return json_response(200, len(body))

    return app


@contextlib.contextmanager
def serving(
    most: int = 50,
    *,
    header_timeout: float = 30.0,
    body_timeout: float = 30.0,
    max_pending_bytes: int = 1 << 20,
) -> Iterator[Serving]:
    go = threading.Event()
    refused: list[str] = []
    guard = Connections(
        most,
        header_timeout=header_timeout,
        body_timeout=body_timeout,
        on_refusal=refused.append,
    )
    intake = Intake(
        max_body_bytes=1 << 20, max_pending_bytes=max_pending_bytes, body_timeout=body_timeout
    )
    settings: dict[str, Any] = {"log_level": "warning", "access_log": False}
    settings |= {"timeout_graceful_shutdown": 1}
    server = GuardedServer(GuardedConfig(app_of(go, intake), guard, **settings))
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield Serving(port, guard, go, refused)
        finally:
            go.set()
            server.should_exit = True
            thread.join()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Deadlines


def test_half_a_head_is_answered_at_its_deadline() -> None:
    with serving(header_timeout=0.2) as server, server.connect(b"GET / HTTP/1.1\r\nX:") as slow:
        status, body = answer_in(slow)
        assert (status, body["error"]["type"]) == (408, "timeout")
        assert is_closed(slow)
        assert server.refused == ["408"]


def test_bytes_that_drip_in_prolong_no_head() -> None:
    """Neither those of a field nor empty lines before a request."""
    with serving(header_timeout=0.3) as server:
        for drip in (b"a", b"\r\n"):
            start = b"GET / HTTP/1.1\r\nX: " if drip == b"a" else b""
            started = time.monotonic()
            with server.connect(start) as slow, contextlib.suppress(ConnectionError):
                while len(server.connections) or time.monotonic() - started < 0.1:
                    slow.sendall(drip)
                    time.sleep(0.02)
                    assert time.monotonic() - started < 5


def test_a_connection_without_a_word_is_closed_at_the_heads_deadline() -> None:
    with serving(header_timeout=0.2) as server, server.connect() as silent:
        assert is_closed(silent)


def test_an_answered_connection_may_rest_longer_than_a_head() -> None:
    with serving(header_timeout=0.2) as server, server.connect(HEALTH) as kept:
        assert answer_in(kept)[0] == 200
        time.sleep(0.5)
        kept.sendall(HEALTH)
        assert answer_in(kept)[0] == 200


def test_half_a_body_is_answered_at_its_deadline() -> None:
    with serving(body_timeout=0.2) as server, server.connect(POST % 100 + b"a") as slow:
        status, body = answer_in(slow)
        assert (status, body["error"]["type"]) == (408, "timeout")
        assert "body_timeout" in body["error"]["message"]
        assert is_closed(slow)


def test_a_body_that_nobody_reads_has_a_deadline_too() -> None:
    """The answer came before it."""
    request = HEALTH[:-2] + b"Content-Length: 100\r\n\r\n"
    with serving(body_timeout=0.2) as server, server.connect(request) as slow:
        assert answer_in(slow)[0] == 200
        assert is_closed(slow)


def test_work_may_last_longer_than_head_and_body() -> None:
    with (
        serving(header_timeout=0.1, body_timeout=0.1) as server,
        server.connect(POST % 2 + b"{}") as waits,
    ):
        time.sleep(0.4)
        server.go.set()
        assert answer_in(waits) == (200, 2)


def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again and again without reading, until the buffers are full."""
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.2)
    with serving() as server, server.connect() as deaf:
        deaf.settimeout(0.5)
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10
        with contextlib.suppress(OSError):
            while True:
                deaf.sendall(ask)
        wait_for(lambda: len(server.connections) == 0)


# Sizes


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nX: " + b"a" * 400_000,
        b"GET /" + b"a" * 400_000,
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(MOST_HEAD_FIELDS + 2)),
        b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (b"a" * 1000) * (MOST_HEAD_BYTES // 1000 + 2),
        b"GET / HTTP/1.1\r\n" + b"a" * 400_000,
    ],
    ids=["one long field", "long path", "many fields", "many bytes", "long name"],
)
def test_heads_are_bounded(head: bytes) -> None:
    """Before they end, so that none is ever held."""
    with serving() as server, server.connect() as greedy:
        with contextlib.suppress(ConnectionError):
            greedy.sendall(head)
        with contextlib.suppress(ConnectionError):  # where more is sent than was read
            status, body = answer_in(greedy)
            assert (status, body["error"]["type"]) == (431, "head_too_large")
        wait_for(lambda: len(server.connections) == 0)


def test_what_follows_a_chunked_body_is_bounded() -> None:
    head = POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    with serving() as server, server.connect(head + b"2\r\n{}\r\n0\r\n") as greedy:
        with contextlib.suppress(ConnectionError):
            greedy.sendall(b"X: " + b"a" * 400_000)
        wait_for(lambda: len(server.connections) == 0)


def test_usual_heads_pass() -> None:
    """A head of 16 KiB, in pieces, and a body of more bytes than a head may have."""
    head = POST[:-2] % 400_000 + b"X: " + b"a" * 16_000 + b"\r\n\r\n"
    with serving() as server, server.connect() as usual:
        server.go.set()
        for start in range(0, len(head), 5000):
            usual.sendall(head[start : start + 5000])
            time.sleep(0.01)
        usual.sendall(b"a" * 400_000)
        assert answer_in(usual) == (200, 400_000)


def test_requests_ahead_are_bounded() -> None:
    with serving() as server, server.connect(POST % 0) as ahead:
        ahead.sendall(HEALTH * (MOST_PIPELINED + 1))
        assert answer_in(ahead)[0] == 400


def test_pending_bodies_are_bounded_over_all_requests() -> None:
    """Two of 600 bytes, where 1000 may be pending; the third one finds room once the first went."""
    with serving(max_pending_bytes=1000) as server:
        with server.connect(POST % 600 + b"a" * 600) as first:
            wait_for(lambda: server.connections.num_busy == 1)
            time.sleep(0.1)
            status, body = server.ask(POST % 600 + b"a" * 600)
            assert (status, body["error"]["type"]) == (503, "overloaded")
            server.go.set()
            assert answer_in(first) == (200, 600)
        assert server.ask(POST % 600 + b"a" * 600) == (200, 600)


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\r\n\r\n", b"GET http://[::zz/ HTTP/1.1\r\nHost: x\r\n\r\n"]
)
def test_what_is_no_http_gets_the_body_of_all_errors(sent: bytes) -> None:
    with serving() as server:
        status, body = server.ask(sent)
    assert (status, body["error"]["type"]) == (400, "malformed_http")


# Room for others


def test_idle_connections_leave_room_for_health() -> None:
    """300 of them where 50 may be open: the oldest go."""
    with serving(50) as server:
        idle = [server.connect() for _ in range(300)]
        assert server.health_seconds() < 1
        assert len(server.connections) <= 50
        assert is_closed(idle[0])
        assert server.refused == ["none"] * 251
        idle[-1].sendall(HEALTH)
        assert answer_in(idle[-1])[0] == 200
        for each in idle:
            each.close()


def test_slow_bodies_leave_room_for_health() -> None:
    """12 of 20 connections may have requests; the next requests get 503, but for the health."""
    with serving(20) as server:
        slow = [server.connect(POST % 100) for _ in range(40)]
        wait_for(lambda: server.connections.are_busy or server.connections.num_busy == 12)
        assert server.health_seconds() < 1
        status, body = server.ask(POST % 2 + b"{}")
        assert (status, body["error"]["type"]) == (503, "overloaded")
        assert server.refused[-1] == "503"
        assert len(server.connections) <= 20
        for each in slow:
            each.close()
        wait_for(lambda: len(server.connections) == 0)
        server.go.set()
        assert server.ask(POST % 2 + b"{}") == (200, 2)


def test_no_descriptors_left_is_said_once_and_passes(caplog: pytest.LogCaptureFixture) -> None:
    """The limit is lowered to what is open already and 12 more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seldom = LoggedSeldom()
    logger = logging.getLogger("asyncio")
    logger.addFilter(seldom)
    try:
        with serving(500) as server, contextlib.ExitStack() as stack:
            held = [socket.socket() for _ in range(30)]
            number = max(each.fileno() for each in held) + 5
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
            for each in held:  # the callers' ends have their descriptors already
                stack.enter_context(each)
                each.settimeout(5)
                each.connect(("127.0.0.1", server.port))
            time.sleep(0.3)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            started = time.monotonic()
            server.health_seconds()
            assert time.monotonic() - started < 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        logger.removeFilter(seldom)
    messages = [each for each in caplog.records if "out of system resource" in each.getMessage()]
    assert len(messages) == 1


def test_connections_are_as_many_as_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit goes up to the hard one, never beyond."""
    limits = [64, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda what: tuple(limits))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: raised.append(both))
    monkeypatch.setattr(connections.os, "listdir", lambda path: ["0"] * 10)
    others = 10 + 5 + connections.ACCEPTED_AT_ONCE + connections.OTHER_FILES
    assert connection_room(1000, outgoing=5) == 1000
    assert raised == [(1000 + others, 4096)]
    limits[:] = [100, 100]
    assert connection_room(1000, outgoing=5) == 100 - others
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert connection_room(1000, outgoing=5) == 1000
    limits[:] = [40, 40]
    with pytest.raises(ValueError, match=r"file descriptors, the limit is 40: raise it \(ulimit"):
        connection_room(1000, outgoing=5)


def test_one_message_is_logged_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 within ten seconds the first; then again, with the number of the others."""
    now = [100.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    seldom = LoggedSeldom()

    def logged(text: str) -> str | None:
        record = logging.LogRecord("a", logging.WARNING, "f", 1, text, (), None)
        return record.getMessage() if seldom.filter(record) else None

    assert [logged("bad") for _ in range(5)] == ["bad", None, None, None, None]
    assert logged("other") == "other"
    now[0] += 11
    assert logged("bad") == "bad (and 4 more since)"
    assert logged("bad") is None
