"""An export in llama.cpp, where STEERLM2_LLAMA_CPP names a checkout that was built in build/."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlm2.checkpoint_dirs import newest_export

# The converter knows a tokenizer by a hash of the ids that it gives: never one of our own.
CONVERT = """
import sys
sys.path[:0] = [sys.argv.pop(1), sys.argv[1] + "/gguf-py"]
del sys.argv[1]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


@pytest.fixture
def llama_cpp() -> Path:
    folder = Path(os.environ.get("STEERLM2_LLAMA_CPP", "/nowhere"))
    if not (folder / "build" / "bin" / "llama-server").exists():
        pytest.skip("STEERLM2_LLAMA_CPP names no checkout of llama.cpp with build/bin/llama-server")
    return folder


def test_greedy_answers_are_the_exports_and_end_at_the_stop_token(
    llama_cpp: Path, acsft_model: Path, tmp_path: Path
) -> None:
    export = newest_export(acsft_model) or acsft_model
    gguf = tmp_path / "model.gguf"
    words = [llama_cpp, llama_cpp, export, "--outtype", "f32", "--outfile", gguf]
    subprocess.run([sys.executable, "-c", CONVERT, *map(str, words)], check=True)
    tokenizer = AutoTokenizer.from_pretrained(export)
    asked = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "chat_template_kwargs": {"attributes": {"humor": 4, "verbosity": 0}},
    }
    ids = tokenizer.apply_chat_template(
        asked["messages"], **asked["chat_template_kwargs"], add_generation_prompt=True
    )["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    ours = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0, len(ids) :]
    assert ours[-1] == tokenizer.eos_token_id
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = llama_cpp / "build" / "bin" / "llama-server"
    process = subprocess.Popen(
        [str(word) for word in (server, "-m", gguf, "-c", 512, "--port", port, "-t", 1)]
    )
    try:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        body = asked | {"temperature": 0, "max_tokens": 64}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
    finally:
        process.kill()
        process.wait()
    (choice,) = answer.json()["choices"]
    assert choice["message"]["content"] == tokenizer.decode(ours[:-1])
    assert choice["finish_reason"] == "stop"
    assert answer.json()["usage"] == answer.json()["usage"] | {
        "prompt_tokens": len(ids),
        "completion_tokens": len(ours),
    }
