"""Fixtures that any test may ask for."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
from collections.abc import Callable, Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fork_server import ForkServer

# There is a worker a core. torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels without vector instructions: to find out which there are takes three compilations.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

# What is imported for the first time is compiled first: not by both workers at once.
SECOND_WORKER = os.environ.get("PYTEST_XDIST_WORKER") == "gw1"
if SECOND_WORKER:
    for package in ("sympy", "scipy.stats", "pandas", "datasets", "openai", "fastapi"):
        importlib.import_module(package)

# A loaded machine is slow, not wrong; and what fails fails again. Half of the usual examples.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("steady")
# Other examples each time, and 1,000 of them where a test names their number by `EXAMPLES`.
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1_000)

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """One of the workers collects from the end: what one has imported and compiled, assertions
    rewritten, the other reads."""
    report = yield
    if isinstance(collector, pytest.Directory) and SECOND_WORKER:
        report.result.reverse()
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: no worker is left with one of them when the other is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (item.path not in slow, item.path.parts))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference vectors and real data, which lie beside a checkout and are not part of it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}")
    return folder


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts Python scripts without the seconds that their imports take."""
    server = ForkServer()
    yield server
    server.close()


RunScript = Callable[..., None]


@pytest.fixture(scope="session")
def run_script(fork_server: ForkServer) -> RunScript:
    """Runs a script that starts ranks (`ranks.py` beside this file) in a process of its own."""

    def run(script: Path, *arguments: str | Path) -> None:
        process = fork_server.start(
            [script, *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(TESTS)},
        )
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr[-5000:]

    return run


class FakeVLLM(ThreadingHTTPServer):
    """vLLM's /v1/models, /classify and /v1/completions, as 0.32 answers them: scores are computed
    from the ids, completions are what a test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FakeVLLMHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.names = ["humor", "verbosity"]
        self.texts: list[list[int]] = []
        """Every text that was scored."""
        self.statuses: list[int] = []
        """What the next requests to /classify get instead of scores."""
        self.status_of: Callable[[list[int]], int] = lambda ids: 200
        """What a text gets after that."""
        self.dies_after: int | None = None
        """Number of scored texts from which on connections are closed without an answer."""
        self.seconds = 0.0
        """That a text takes."""
        self.in_flight, self.most_in_flight = 0, 0
        self.lock = threading.Lock()
        self.keys: list[str | None] = []
        """The Authorization of every request."""
        self.bodies: list[dict[str, Any]] = []
        """Every request to /v1/completions that was answered."""
        self.choices: Callable[[dict[str, Any]], Any] = lambda body: []
        """The choices of an answer that isn't streamed."""
        self.events: list[bytes] = []
        """The streamed answer."""
        self.hangs_at: int | None = None
        """The event that isn't sent: the caller is waited for to go."""
        self.dropped = threading.Event()
        """It has gone."""

    @staticmethod
    def scores(ids: list[int]) -> list[float]:
        return [sum(ids) % 101 / 20 - 0.5, len(ids) % 101 / 20 - 0.5]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of the test's business."""


class _FakeVLLMHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLM

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.server.keys.append(self.headers["Authorization"])
        if not self._dead():
            self._answer(200, {"data": [{"id": "served", "max_model_len": 512}]})

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = {"/classify": self._classify, "/v1/completions": self._complete}
        answers[self.path](request)

    def _complete(self, request: dict[str, Any]) -> None:
        fake = self.server
        if fake.statuses:
            self._refuse(fake.statuses.pop(0))
            return
        fake.bodies.append(request)
        if not request.get("stream"):
            self._answer(200, {"choices": fake.choices(request)})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"".join(fake.events[: fake.hangs_at]))
        if fake.hangs_at is not None:
            with contextlib.suppress(ConnectionError):  # the end may be a reset
                self.rfile.read(1)
            fake.dropped.set()

    def _classify(self, request: dict[str, Any]) -> None:
        fake = self.server
        with fake.lock:
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            status = fake.statuses.pop(0) if fake.statuses else fake.status_of(request["input"])
        threading.Event().wait(fake.seconds)
        with fake.lock:
            fake.in_flight -= 1
            if self._dead():
                return
            if status == 200:
                fake.texts.append(request["input"])
        if status != 200:
            self._refuse(status)
            return
        assert request["model"] == "served"
        probs = fake.scores(request["input"])
        label = fake.names[probs.index(max(probs))]
        data = {"index": 0, "label": label, "probs": probs, "num_classes": len(probs)}
        self._answer(200, {"object": "list", "model": "served", "data": [data]})

    def _dead(self) -> bool:
        limit = self.server.dies_after
        self.close_connection = limit is not None and len(self.server.texts) >= limit
        return self.close_connection

    def _refuse(self, status: int) -> None:
        self._answer(status, {"error": {"message": f"no, {status}"}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def fake_vllm() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
