"""The command that serves a checkpoint with vLLM, for the `server` of a recipe.

    python -m steerlm2.serving.vllm_command DIR --gpus 8 -- \\
        tune run sample_responses ... server.url=http://127.0.0.1:8000
    python -m steerlm2.serving.vllm_command DIR --gpus 8
    $(python -m steerlm2.serving.vllm_command DIR --gpus 8 --port 8001) > vllm.log 2>&1 &

The first starts the server, waits until it answers, runs the command after `--`, stops the server,
and exits with the command's status. Without `--` the server's command is printed.

vLLM requires other versions of packages than steerlm2, so it needs a separate virtual environment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from steerlm2.checkpoint_dirs import (
    INDEX_FILE,
    WEIGHT_SUFFIXES,
    read_json,
    resolve_checkpoint_dir,
)
from steerlm2.escaping import shown
from steerlm2.files import check_unchanged, read_sums
from steerlm2.runs.child_process import ChildProcess

SHARE_FOR_WEIGHTS = 0.6
"""The largest share of a GPU's memory for weights. A choice: the rest is for activations and the
key/value cache, whose size limits the number of concurrent requests."""

SECONDS_TO_END = 20.0
"""That the server and the command have after SIGTERM."""


def vllm_command(
    checkpoint_dir: str | Path,
    gpus: int,
    *,
    max_seq_len: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8000,
    gpu_gib: float = 80,
    python: str = "python",
) -> list[str]:
    """The words of the command.

    A copy of the model is split over as few GPUs as have the memory (tensor parallel), and there
    are as many copies as fit onto all GPUs (data parallel).

    Args:
        checkpoint_dir: a Hugging Face folder: downloaded, or exported by a recipe; or the
            output_dir of a run, for its newest complete epoch_N folder.
        gpus: 0 serves on the CPU, in float32.
        max_seq_len: tokens of a prompt with a response.
        gpu_gib: memory of one GPU.
        python: the interpreter of the environment that has vLLM.

    Raises:
        FileNotFoundError: where there is no checkpoint.
        ValueError: where its weights don't fit, or its heads can't be split over enough GPUs.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir)
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    words += ["--host", host, "--port", str(port), "--max-model-len", str(max_seq_len)]
    # Otherwise vLLM takes sampling defaults from the checkpoint.
    words += ["--generation-config", "vllm"]
    if gpus == 0:
        environment = ["env", "VLLM_CPU_KVCACHE_SPACE=1"]
        return [
            *environment,
            *words,
            *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"),
        ]
    gpus_of_a_copy = _tensor_parallel(folder, gpus, gpu_gib)
    words += ["--dtype", "bfloat16", "--tensor-parallel-size", str(gpus_of_a_copy)]
    return [*words, "--data-parallel-size", str(gpus // gpus_of_a_copy)]


def _tensor_parallel(folder: Path, gpus: int, gpu_gib: float) -> int:
    config = read_json(folder / "config.json")
    if "num_attention_heads" not in config:
        raise ValueError(
            f"{(folder / 'config.json').absolute()} has no num_attention_heads: it must be a "
            "language model's"
        )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    gib = _served_bytes(folder, config) / 2**30
    for size in range(1, gpus + 1):
        splits = gpus % size == 0 and config["num_attention_heads"] % size == 0
        # With more ranks than key/value heads vLLM replicates the heads.
        splits = splits and (heads % size == 0 or size % heads == 0)
        if splits and gib / size <= SHARE_FOR_WEIGHTS * gpu_gib:
            return size
    raise ValueError(
        f"{folder} has {gib:.0f} GiB of weights, which can't be split over {gpus} GPUs of "
        f"{gpu_gib:g} GiB so that they take at most {SHARE_FOR_WEIGHTS:.0%} of each: use more GPUs"
    )


def _served_bytes(folder: Path, config: Mapping[str, Any]) -> float:
    """Bytes of the weights in bfloat16, from the index if there is one (also before the files)."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            stored = float(read_json(index)["metadata"]["total_size"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{index.absolute()} has no metadata.total_size: download it again"
            ) from error
    else:
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = config.get("dtype") or config.get("torch_dtype")
    return stored / 2 if dtype == "float32" else stored


def run_with_server(
    server_command: Sequence[str],
    command: Sequence[str],
    *,
    host: str,
    port: int,
    log: Path,
    start_timeout: float,
) -> int:
    """Run a command while a server runs; the server is stopped after it, and with this process.

    Args:
        server_command: answers GET /health with 200 at host and port when it is ready.
        log: file for the server's output; an earlier one is overwritten.
        start_timeout: seconds until it must be ready.

    Returns:
        The command's exit status (128 + n where signal n ended it).

    Raises:
        ValueError: where the port is in use, or the server doesn't become ready.
        OSError: where the log can't be written, or there is no such command.
    """
    address = ("127.0.0.1" if host in ("0.0.0.0", "") else host, port)
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
        raise ValueError(
            f"something answers at {address[0]}, port {port} already: stop it, or choose another "
            "--port"
        )
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no command {command[0]}")
    with _signals_as_exits(), log.open("wb") as output:
        _say(f"starting the server, whose output goes to {log}")
        with ChildProcess(
            server_command, seconds_to_end=SECONDS_TO_END, own_group=True, output=output
        ) as server:
            _wait_until_healthy(server, f"http://{address[0]}:{port}/health", log, start_timeout)
            # None: whoever starts us may give the command something to read.
            with ChildProcess(command, seconds_to_end=SECONDS_TO_END, stdin=None) as running:
                status = running.wait()
            if server.has_ended():
                _say(f"the server ended before the command did:\n{_last_lines(log)}")
            return status


def _wait_until_healthy(server: ChildProcess, url: str, log: Path, start_timeout: float) -> None:
    started = time.monotonic()
    # One client: each reads all certificates. No proxy stands between this process and its server.
    with httpx.Client(timeout=5, trust_env=False) as client:
        while not server.has_ended():
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    _say(f"the server answers, after {time.monotonic() - started:.0f} s")
                    return
            if time.monotonic() - started > start_timeout:
                raise ValueError(
                    f"the server doesn't answer at {url} after {start_timeout:g} s "
                    f"(--start-timeout); the end of {log}:\n{_last_lines(log)}"
                )
            time.sleep(0.2)
    raise ValueError(f"the server ended before it answered; the end of {log}:\n{_last_lines(log)}")


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise SystemExit, once: further ones don't interrupt the cleanup."""

    def leave(signum: int, frame: object) -> None:
        for other in earlier:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + signum)

    earlier = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for signum in earlier:
        signal.signal(signum, leave)
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _last_lines(log: Path, count: int = 20) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:])


def _say(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def check_weights(checkpoint_dir: str) -> None:
    """Check that the weights are those that were exported: vLLM itself doesn't look.

    Raises:
        ValueError: where they aren't.
        FileNotFoundError: where there is no checkpoint.
    """
    folder = resolve_checkpoint_dir(checkpoint_dir)
    weights = [name for name in read_sums(folder) if Path(name).suffix in WEIGHT_SUFFIXES]
    check_unchanged(folder, weights)


def main() -> None:
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    command = words[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m steerlm2.serving.vllm_command",
        usage="%(prog)s [options] --gpus GPUS checkpoint_dir [-- COMMAND ...]",
        description="Print the command that serves a checkpoint with vLLM; or, with a COMMAND, run "
        "that while the server runs.",
    )
    parser.add_argument("checkpoint_dir")
    parser.add_argument("--gpus", type=int, required=True, help="0: serve on the CPU")
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-gib", type=float, default=80, help="memory of one GPU")
    parser.add_argument(
        "--python",
        type=os.path.expanduser,
        default="python",
        help="of the environment that has vLLM",
    )
    parser.add_argument("--log", type=_path, default=Path("vllm.log"), help="of the server")
    parser.add_argument(
        *("--start-timeout", "--start_timeout"),
        type=float,
        default=1800,
        help="seconds until the server must answer",
    )
    args = parser.parse_args(words[:at])
    if at < len(words) and not command:
        parser.error("no COMMAND behind --")
    try:
        server_command = vllm_command(
            args.checkpoint_dir,
            args.gpus,
            max_seq_len=args.max_seq_len,
            host=args.host,
            port=args.port,
            gpu_gib=args.gpu_gib,
            python=args.python,
        )
        if not command:
            print(shlex.join(server_command))
            return
        check_weights(args.checkpoint_dir)
        status = run_with_server(
            server_command,
            command,
            host=args.host,
            port=args.port,
            log=args.log,
            start_timeout=args.start_timeout,
        )
    except (ValueError, OSError) as error:
        parser.exit(1, shown(f"error: {error}\n"))
    sys.exit(status)


if __name__ == "__main__":
    main()
