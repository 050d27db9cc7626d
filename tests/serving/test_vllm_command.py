"""The command for a vLLM server: how GPUs are used, what can't be served, and how it is run beside
another command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlm2.files import sha256, write_sums
from steerlm2.serving.vllm_command import vllm_command


def checkpoint(path: Path, gigabytes: float, heads: int = 64, kv_heads: int = 8) -> Path:
    """A folder as far as the command looks into it; no weights."""
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (path / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": int(gigabytes * 1e9)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("gigabytes", "gpus", "split", "copies"),
    [
        (16, 1, 1, 1),
        (16, 8, 1, 8),
        (141, 8, 4, 2),  # 131 GiB: 66 on each of two GPUs is more than 48
        (141, 4, 4, 1),
        (141, 6, 6, 0),  # 64 heads can't be split over 3 or 6
    ],
)
def test_as_many_copies_as_fit(
    tmp_path: Path, gigabytes: float, gpus: int, split: int, copies: int
) -> None:
    """Weights take at most 60% of 80 GiB: 48 GiB a GPU."""
    folder = checkpoint(tmp_path, gigabytes)
    if copies == 0:
        with pytest.raises(ValueError, match="131 GiB of weights, which can't be split over 6"):
            vllm_command(folder, gpus)
        return
    words = vllm_command(folder, gpus)
    assert option(words, "--tensor-parallel-size") == str(split)
    assert option(words, "--data-parallel-size") == str(copies)
    assert option(words, "--generation-config") == "vllm"


def test_the_command_is_printed_as_a_shell_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    checkpoint(folder, 1)
    module = [sys.executable, "-m", "steerlm2.serving.vllm_command"]
    result = subprocess.run(
        [*module, folder, "--gpus", "0", "--max-seq-len", "512"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == (
        "env VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server "
        f"--model '{folder}' --host 127.0.0.1 --port 8000 --max-model-len 512 "
        "--generation-config vllm --dtype float32 --enforce-eager --no-enable-chunked-prefill\n"
    )


def test_the_newest_export_of_a_run_is_served(tmp_path: Path) -> None:
    for epoch in (2, 10):
        folder = tmp_path / f"epoch_{epoch}"
        folder.mkdir()
        checkpoint(folder, 1)
        index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").touch()
    assert option(vllm_command(tmp_path, 1), "--model") == str(tmp_path / "epoch_10")


def test_a_config_without_heads_is_named(tmp_path: Path) -> None:
    """A multimodal model's are in its text_config."""
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 8}}')
    with pytest.raises(ValueError, match=r"config\.json has no num_attention_heads"):
        vllm_command(tmp_path, 1)


@pytest.mark.parametrize("index", ["{}", '{"metadata": {}}', '{"metadata": []}', "[", "[]"])
def test_an_index_without_the_weights_size_is_named(index: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json .*: download it again"):
        vllm_command(folder, 1)


def test_damaged_weights_are_not_served(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_sums(folder, {"model.safetensors": sha256(b"weighty")})
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "steerlm2.serving.vllm_command",
            folder,
            "--gpus",
            "0",
            "--",
            "true",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "model.safetensors changed since SHA256SUMS was written" in result.stderr
    assert not (tmp_path / "vllm.log").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        vllm_command(tmp_path, 1)


# A command that runs while the server does

FAKE_PYTHON = """#!{python}
import http.server, os, subprocess, sys, time

port = int(sys.argv[sys.argv.index("--port") + 1])
print("a log of", os.environ["BEHAVIOUR"], flush=True)
if os.environ["BEHAVIOUR"] == "dies":
    sys.exit("no GPU here")
child = subprocess.Popen(["sleep", "300"])
with open("pids", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
if os.environ["BEHAVIOUR"] == "never answers":
    time.sleep(300)
asked = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(200 if self.path == "/health" and asked > 2 else 503)
        self.end_headers()
        if self.path == "/die":
            os._exit(3)


http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Stands for the interpreter of vLLM's environment: it answers /health from the third time on."""


class WithServer:
    """`python -m steerlm2.serving.vllm_command MODEL ... -- COMMAND` with a fake server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkpoint(folder, 1)
        self.python = folder / "fake python"
        self.python.write_text(FAKE_PYTHON.format(python=sys.executable))
        self.python.chmod(0o755)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def start(
        self, *command: str, behaviour: str = "serves", timeout: float = 30
    ) -> subprocess.Popen[str]:
        options = ["--gpus", "0", "--port", str(self.port), "--start_timeout", str(timeout)]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "steerlm2.serving.vllm_command", self.folder, *options),
                *("--python", self.python, "--", *command),
            ],
            cwd=self.folder,
            env=os.environ | {"BEHAVIOUR": behaviour},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, **options: Any) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        process = self.start(*command, **options)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def server_pids(self) -> list[int]:
        """Of the server and of a process that it started."""
        return [int(pid) for pid in (self.folder / "pids").read_text().split()]

    def command(self, code: str) -> list[str]:
        """A Python program; `answers(path)` asks the server."""
        lines = [
            "import sys, time, urllib.request",
            f"url = 'http://127.0.0.1:{self.port}'",
            "answers = lambda path: urllib.request.urlopen(url + path).status",
            code,
        ]
        return [sys.executable, "-c", "\n".join(lines)]


@pytest.fixture
def with_server(tmp_path: Path) -> WithServer:
    return WithServer(tmp_path)


def alive(pid: int) -> bool:
    """Neither gone nor waiting for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_runs_while_the_server_answers(with_server: WithServer) -> None:
    """Its output and arguments are its own, "--" among them; then nothing of the server is left."""
    command = with_server.command("print(answers('/health'), sys.argv[1:])")
    status, stdout, stderr = with_server.run(*command, "--", "a b")
    assert (status, stdout) == (0, "200 ['--', 'a b']\n"), stderr
    assert "the server answers, after" in stderr
    assert (with_server.folder / "vllm.log").read_text().startswith("a log of serves\n")
    assert [pid for pid in with_server.server_pids() if alive(pid)] == []


@pytest.mark.parametrize(
    ("code", "status"),
    [("sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9), ("1 / 0", 1)],
)
def test_the_status_is_the_commands(with_server: WithServer, code: str, status: int) -> None:
    assert with_server.run(*with_server.command(code))[0] == status
    assert [pid for pid in with_server.server_pids() if alive(pid)] == []


def test_a_proxy_in_the_environment_is_not_asked(
    with_server: WithServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing answers there; the server is healthy all the same."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    status, stdout, stderr = with_server.run(sys.executable, "-c", "print('ran')")
    assert (status, stdout) == (0, "ran\n"), stderr


def test_there_is_no_such_command(with_server: WithServer) -> None:
    """No server is started for it."""
    status, _, stderr = with_server.run("/no/such/command")
    assert status == 1
    assert "/no/such/command" in stderr
    assert "Traceback" not in stderr
    assert not (with_server.folder / "pids").exists()


def test_a_server_that_dies_at_its_start_shows_its_log(with_server: WithServer) -> None:
    status, stdout, stderr = with_server.run("echo", "never", behaviour="dies")
    assert (status, stdout) == (1, "")
    assert "error: the server ended before it answered; the end of vllm.log:" in stderr
    assert "  a log of dies\n  no GPU here\n  ended with status 1" in stderr
    assert "Traceback" not in stderr


def test_a_server_that_never_answers_is_stopped(with_server: WithServer) -> None:
    status, stdout, stderr = with_server.run("echo", "x", behaviour="never answers", timeout=3)
    assert (status, stdout) == (1, "")
    assert "the server doesn't answer at http://127.0.0.1:" in stderr
    assert "after 3 s (--start-timeout)" in stderr
    assert "  a log of never answers" in stderr
    assert [pid for pid in with_server.server_pids() if alive(pid)] == []


def test_a_server_that_dies_later_is_told(with_server: WithServer) -> None:
    code = "answers('/health')\ntry: answers('/die')\nexcept OSError: time.sleep(2)\nsys.exit(5)"
    status, _, stderr = with_server.run(*with_server.command(code))
    assert status == 5
    assert "the server ended before the command did" in stderr
    assert "ended with status 3" in stderr
    assert [pid for pid in with_server.server_pids() if alive(pid)] == []


SLEEP = "open('started', 'w').write(str(__import__('os').getpid())); time.sleep(300)"


def started(with_server: WithServer) -> tuple[subprocess.Popen[str], int]:
    """In the midst of a command: the process, and the command's pid."""
    file = with_server.folder / "started"
    process = with_server.start(*with_server.command(SLEEP))
    wait_until(lambda: file.exists() and file.read_text() != "")
    return process, int(file.read_text())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command_and_the_server(with_server: WithServer, signum: int) -> None:
    process, pid = started(with_server)
    process.send_signal(signum)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert [p for p in (pid, *with_server.server_pids()) if alive(p)] == []


def test_nothing_outlives_a_killed_process(with_server: WithServer) -> None:
    """SIGKILL, after which nothing can be done: the port is free for the next run."""
    process, pid = started(with_server)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, (pid, *with_server.server_pids()))))


def test_another_server_at_that_port_is_not_taken_for_ours(with_server: WithServer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", with_server.port))
        other.listen()
        status, stdout, stderr = with_server.run("echo", "never")
    assert (status, stdout) == (1, "")
    assert f"something answers at 127.0.0.1, port {with_server.port} already" in stderr
    assert not (with_server.folder / "pids").exists()


def test_nothing_behind_the_dashes(with_server: WithServer) -> None:
    status, _, stderr = with_server.run()
    assert status == 2
    assert "no COMMAND behind --" in stderr
