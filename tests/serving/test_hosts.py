"""Which hosts a server answers to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient

from steerlm2.config.keys import host_problems
from steerlm2.serving.hosts import host_of, is_allowed, usual_hosts
from steerlm2.serving.http import Metrics, json_response, new_app
from steerlm2.serving.listening import exposure_notice

LOOPBACK = usual_hosts("127.0.0.1", "127.0.0.1", None)
EVERYWHERE = usual_hosts("0.0.0.0", "0.0.0.0", None)


@pytest.mark.parametrize(
    ("header", "host"),
    [
        *[("localhost:8000", "localhost"), ("LocalHost", "localhost"), ("a.example.", "a.example")],
        *[("[::1]:8000", "::1"), ("[::1]", "::1"), ("127.0.0.1:", "127.0.0.1")],
    ],
)
def test_the_host_is_read_without_its_port(header: str, host: str) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize(
    ("host", "loopback", "everywhere"),
    [
        *[(name, True, True) for name in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9")],
        ("::1", True, True),
        ("10.0.0.7", False, True),
        ("fe80::1", False, True),
        (socket.gethostname().lower(), socket.gethostname().lower() == "localhost", True),
        *[(name, False, False) for name in ("evil.example", "localhost.evil.example", "x", "")],
        *[(name, False, False) for name in ("127.0.0.1.evil.example", "notlocalhost", "[", "*")],
    ],
)
def test_hosts_that_no_web_page_can_name(host: str, loopback: bool, everywhere: bool) -> None:
    """By default: those of loopback where only that is listened on, else addresses too."""
    assert is_allowed(host, LOOPBACK) is loopback
    assert is_allowed(host, EVERYWHERE) is everywhere


def test_where_a_key_is_asked_for_all_hosts_are_allowed() -> None:
    assert is_allowed("reward.example", usual_hosts("0.0.0.0", "0.0.0.0", "s3cret"))


@pytest.mark.parametrize(
    ("allowed", "host", "expected"),
    [
        *[
            (["reward.example"], "reward.example", True),
            (["Reward.example"], "reward.example", True),
        ],
        *[(["*.example"], "a.b.example", True), (["*.example"], "example", False)],
        *[(["10.0.0.0/8"], "10.1.2.3", True), (["10.0.0.0/8"], "11.1.2.3", False)],
        *[(["10.0.0.1"], "10.0.0.1", True), ([], "localhost", False), (["*"], "any", True)],
    ],
)
def test_a_list_of_hosts_replaces_the_usual_ones(
    allowed: list[str], host: str, expected: bool
) -> None:
    assert list(host_problems(allowed)) == []
    assert is_allowed(host, allowed) is expected


@pytest.mark.parametrize("host", ["a:80", "http://a", "", "a b", "10.0.0.0/99", "*a", "a.*"])
def test_what_is_no_host_is_refused_in_the_config(host: str) -> None:
    with pytest.raises(StopIteration):
        next(host_problems(["localhost", "*"]))
    assert "'allowed_hosts' has" in next(host_problems([host]))


def client_of(*allowed: str) -> TestClient:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = new_app(
        "test",
        Metrics(),
        lifespan=lifespan,
        paths=("/page",),
        health=lambda: None,
        api_key=None,
        allowed_hosts=allowed,
    )

    @app.get("/page")
    async def page() -> Response:
        return json_response(200, "page")

    return TestClient(app, base_url="http://localhost:8000")


def test_requests_for_other_hosts_are_refused_but_for_the_health() -> None:
    """A probe may name the server as it likes, and learns nothing by it."""
    with client_of(*LOOPBACK) as client:
        assert client.get("/page").status_code == 200
        evil = {"Host": "evil.example:8000"}
        refused = client.get("/page", headers=evil)
        assert refused.status_code == 421
        assert "'evil.example:8000'" in refused.json()["error"]["message"]
        assert "allowed_hosts" in refused.json()["error"]["message"]
        assert client.get("/metrics", headers=evil).status_code == 421
        assert client.get("/health", headers=evil).status_code == 200


def test_there_must_be_one_host() -> None:
    with client_of(*LOOPBACK) as client:
        twice = [("Host", "localhost"), ("Host", "localhost")]
        assert client.get("/page", headers=twice).status_code == 400


@pytest.mark.parametrize(
    ("host", "api_key", "expected"),
    [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "s3cret", False)],
)
def test_open_servers_are_noticed(host: str, api_key: str | None, expected: bool) -> None:
    with socket.socket() as bound:
        bound.bind((host, 0))
        notice = exposure_notice(bound, api_key)
    assert (notice is not None) is expected
    assert notice is None or "STEERLM2_API_KEY" in notice
