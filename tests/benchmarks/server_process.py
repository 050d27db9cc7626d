"""Processes that the benchmarks start, and what they hold."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TUNE = Path(sys.executable).with_name("tune")
VLLM_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(recipe: str, threads: int, *overrides: str) -> Iterator[Server]:
    """The server of a recipe's tiny config, on any free port; SIGTERM ends it."""
    command = [TUNE, "run", recipe, "--config", f"tiny/{recipe}", "port=0", *overrides]
    with _running(command, threads) as process:
        port = _printed(process, r"serving .* on http://127\.0\.0\.1:(\d+)")
        yield Server(process, int(port))


@contextmanager
def serving_vllm(model: Path, threads: int, max_seq_len: int) -> Iterator[str]:
    """The URL of a vLLM server of an export, started as the docs say."""
    default = Path.home() / ".cache" / "steerlm2" / "vllm-0.32.0"
    python = Path(os.environ.get("STEERLM2_VLLM_VENV", default)) / "bin" / "python"
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [
            *(sys.executable, "-m", "steerlm2.serving.vllm_command", model, "--gpus", "0"),
            *("--python", python, "--port", port, "--max-seq-len", max_seq_len),
            *("--log", Path(folder) / "vllm.txt", "--", "sh", "-c", "echo ready; exec sleep 1d"),
        ]
        with _running(command, threads) as process:
            _printed(process, "(ready)")
            yield f"http://127.0.0.1:{port}"


def usage(process: int) -> dict[str, float]:
    """Of a process: megabytes of memory, descriptors, threads."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {
        "MB": int(status["VmRSS"].removesuffix("kB")) / 1024,
        "descriptors": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


@contextmanager
def _running(command: list[object], threads: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | VLLM_VARIABLES | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _printed(process: subprocess.Popen[str], pattern: str) -> str:
    """What a server says once it answers."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found[1]
    raise SystemExit("the server didn't start")
