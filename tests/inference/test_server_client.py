"""The client of a vLLM pooling server, against a server that answers as vLLM does.

tests/recipes/test_vllm.py has the real one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerlm2.inference import server_client
from steerlm2.inference.server_client import ClassifyClient

NAMES = ["humor", "verbosity"]
TEXTS = [[i, 7, 3 * i] for i in range(20)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)


def connected(fake: Any, **options: Any) -> ClassifyClient:
    asked = ClassifyClient(fake.url, NAMES, **options)
    asked.connect(max_seq_len=512)
    return asked


def test_scores_come_in_the_order_of_the_texts(fake_vllm: Any) -> None:
    """Each text is sent once, whatever the number of threads."""
    assert connected(fake_vllm).classify(TEXTS) == [fake_vllm.scores(text) for text in TEXTS]
    assert sorted(fake_vllm.texts) == sorted(TEXTS)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment, as on clusters; nothing answers there."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    return "http://127.0.0.1:9"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_on_this_machine_is_asked_directly(fake_vllm: Any, proxy: str, host: str) -> None:
    fake_vllm.url = fake_vllm.url.replace("127.0.0.1", host)
    assert connected(fake_vllm).classify(TEXTS[:2]) == [fake_vllm.scores(t) for t in TEXTS[:2]]


def test_a_proxy_that_does_not_answer_is_named(proxy: str) -> None:
    """The server itself may be up."""
    asked = ClassifyClient("http://vllm.example:8000", NAMES, retries=0)
    with pytest.raises(
        ConnectionError, match=r"through the proxy that http_proxy names; no_proxy="
    ):
        asked.connect(max_seq_len=512)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", True)],
        *[("localhost", True), ("a.localhost", True), ("10.0.0.1", False)],
        *[("localhost.example", False), ("node1", False)],
    ],
)
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert server_client.is_loopback(host) is expected


@pytest.mark.parametrize(
    ("url", "without", "user"),
    [
        ("http://al:p%40w@h:1/a@b", "http://h:1/a@b", ("al", "p@w")),
        ("https://token@h", "https://h", ("token", "")),
        ("http://h:1/a@b", "http://h:1/a@b", None),
    ],
)
def test_a_user_in_a_url_is_sent_and_not_shown(
    url: str, without: str, user: tuple[str, str] | None
) -> None:
    asked = ClassifyClient(url, NAMES)
    assert (asked.url, asked.auth) == (without, user)
    asked.close()


def test_the_key_is_the_environments_or_of_a_file_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEERLM2_API_KEY", raising=False)
    assert server_client.own_api_key() is None
    file = tmp_path / "key"
    monkeypatch.setenv("STEERLM2_API_KEY_FILE", str(file))
    with pytest.raises(ValueError, match=f"STEERLM2_API_KEY_FILE: {file} can't be read"):
        server_client.own_api_key()
    file.write_text("\n")
    with pytest.raises(ValueError, match=f"STEERLM2_API_KEY_FILE: {file} is empty"):
        server_client.own_api_key()
    file.write_text("s3cret\n")
    assert server_client.key_header() == {"Authorization": "Bearer s3cret"}
    monkeypatch.setenv("STEERLM2_API_KEY", "other")
    assert server_client.own_api_key() == "other"


@pytest.mark.parametrize("key", ["S3CR one\n", "S3CR\nS3CR", "S3CRé", "S3CR\tx"])
def test_a_key_that_no_header_can_have_is_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx would quote it in its message."""
    (tmp_path / "key").write_text(key)
    for name, value in (("_FILE", str(tmp_path / "key")), ("", key)):
        monkeypatch.setenv(f"STEERLM2_API_KEY{name}", value)
        with pytest.raises(
            ValueError, match=rf"STEERLM2_API_KEY{name}.* must have one key"
        ) as error:
            server_client.own_api_key()
        assert "S3CR" not in str(error.value)


def test_nothing_to_ask_is_not_asked(fake_vllm: Any) -> None:
    assert connected(fake_vllm).classify([]) == []
    assert fake_vllm.texts == []


class SilentServer:
    """It refuses texts that begin with the token 1, and leaves other requests without an answer."""

    def __init__(self) -> None:
        self.bound = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.bound.getsockname()[1]}"
        self.connected: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connected.append(self.bound.accept()[0])
                threading.Thread(target=self._answer, args=self.connected[-1:]).start()

    def _answer(self, connected: socket.socket) -> None:
        asked = b""
        while b"use_activation" not in asked:
            asked += connected.recv(100_000)
        if b'"input":[1,' in asked.replace(b" ", b""):
            time.sleep(0.3)
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno")

    def close(self) -> None:
        for each in (self.bound, *self.connected):
            each.close()


@pytest.fixture
def silent() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.close()


def test_a_refusal_ends_the_requests_beside_it(silent: SilentServer) -> None:
    """They might wait for their answers as long as the timeout."""
    asked = ClassifyClient(silent.url, NAMES, model="m", timeout=20)
    started = time.monotonic()
    with pytest.raises(ValueError, match="status 400: no"):
        asked.classify([[1, 2], [3, 4], [5, 6]])
    assert time.monotonic() < started + 5


def test_ctrl_c_ends_requests_that_are_not_answered(silent: SilentServer) -> None:
    asked = ClassifyClient(silent.url, NAMES, model="m", timeout=20)
    started = time.monotonic()
    # What a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            asked.classify([[3, 4], [5, 6]])
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() < started + 5


def test_concurrency_is_bounded(fake_vllm: Any) -> None:
    """20 texts of 20 ms by 4 threads: several at a time, never 5."""
    fake_vllm.seconds = 0.02
    asked = connected(fake_vllm, concurrency=4)
    asked.classify(TEXTS)
    assert 2 <= fake_vllm.most_in_flight <= 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(fake_vllm: Any, status: int) -> None:
    fake_vllm.statuses = [status] * 2
    asked = connected(fake_vllm, concurrency=1, retries=2)
    assert asked.classify(TEXTS) == [fake_vllm.scores(text) for text in TEXTS]


def test_retries_end_in_one_clear_error(fake_vllm: Any) -> None:
    """1 + 2 tries; none of the other texts is sent once the first has failed."""
    fake_vllm.statuses = [503] * 100
    with pytest.raises(ConnectionError) as caught:
        connected(fake_vllm, concurrency=1, retries=2).classify(TEXTS)
    assert str(caught.value) == (
        f"the server at {fake_vllm.url} doesn't answer, tried 3 times (status 503: no, 503). Once "
        "it is up again, the same command continues where it stopped"
    )
    assert fake_vllm.texts == []


def test_pauses_double(fake_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.05 + 0.1 + 0.2 s before the last of four tries."""
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.05)
    fake_vllm.statuses = [503] * 3
    asked = connected(fake_vllm, concurrency=1, retries=3)
    started = time.monotonic()
    asked.classify(TEXTS[:1])
    assert 0.35 <= time.monotonic() - started < 1


def test_a_server_that_dies_is_a_connection_error(fake_vllm: Any) -> None:
    """In the midst of it; the client can be used again."""
    fake_vllm.dies_after = 7
    asked = connected(fake_vllm, concurrency=4, retries=1)
    with pytest.raises(ConnectionError, match="the same command continues"):
        asked.classify(TEXTS)
    fake_vllm.dies_after = None
    assert asked.classify(TEXTS) == [fake_vllm.scores(text) for text in TEXTS]


def test_one_failure_ends_the_pauses_of_the_others(
    fake_vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first text is refused while the second waits 20 s for its next try."""
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 20.0)
    fake_vllm.status_of = lambda ids: 400 if ids == TEXTS[0] else 503
    asked = connected(fake_vllm, concurrency=2)
    started = time.monotonic()
    with pytest.raises(ValueError, match="no, 400"):
        asked.classify(TEXTS)
    assert time.monotonic() - started < 10


def test_no_server_at_all() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"the server at {url} doesn't answer, tried 1 times"):
        ClassifyClient(url, NAMES, retries=0).connect(max_seq_len=512)


@pytest.mark.parametrize("status", [400, 404])
def test_a_refusal_is_not_tried_again(fake_vllm: Any, status: int) -> None:
    """The server's own reason is given."""
    fake_vllm.statuses = [status]
    with pytest.raises(ValueError, match=f"/classify refuses .*status {status}: no, {status}"):
        connected(fake_vllm, concurrency=1).classify(TEXTS[:1])
    assert (fake_vllm.statuses, fake_vllm.texts) == ([], [])


def test_another_number_of_attributes_is_refused(fake_vllm: Any) -> None:
    asked = ClassifyClient(fake_vllm.url, [*NAMES, "quality"])
    asked.connect(max_seq_len=512)
    with pytest.raises(ValueError, match=r"gives 2 scores, schema\.names has 3 attributes"):
        asked.classify(TEXTS)


def test_another_order_of_attributes_is_refused(fake_vllm: Any) -> None:
    asked = ClassifyClient(fake_vllm.url, NAMES[::-1])
    asked.connect(max_seq_len=512)
    with pytest.raises(ValueError, match="calls humor what is verbosity in schema"):
        asked.classify([[100]])


def test_a_model_without_names_of_its_attributes_is_taken(fake_vllm: Any) -> None:
    """transformers calls them LABEL_0, LABEL_1, ... then."""
    fake_vllm.names = ["LABEL_0", "LABEL_1"]
    assert connected(fake_vllm).classify(TEXTS[:1]) == [fake_vllm.scores(TEXTS[0])]


def test_longer_texts_than_the_server_takes_are_refused(fake_vllm: Any) -> None:
    with pytest.raises(ValueError, match="texts of at most 512 tokens: set max_seq_len=512"):
        ClassifyClient(fake_vllm.url, NAMES).connect(max_seq_len=513)


def test_the_model_must_be_served(fake_vllm: Any) -> None:
    with pytest.raises(ValueError, match="has no model other, only served"):
        ClassifyClient(fake_vllm.url, NAMES, model="other").connect(max_seq_len=512)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_be_that_of_the_openai_api(fake_vllm: Any, suffix: str) -> None:
    asked = ClassifyClient(fake_vllm.url + suffix, NAMES)
    asked.connect(max_seq_len=512)
    assert asked.classify(TEXTS[:1]) == [fake_vllm.scores(TEXTS[0])]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^server\.url"):
        ClassifyClient(url, NAMES)
