"""The command for a vLLM server: how GPUs are used, and what can't be served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm2.generation.vllm_command import vllm_command


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
    module = [sys.executable, "-m", "steerlm2.generation.vllm_command"]
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


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        vllm_command(tmp_path, 1)
