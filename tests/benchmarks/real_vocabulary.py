"""n answers at a vocabulary of 128,256: the local engine, transformers' generate and vLLM on a CPU.

    python tests/benchmarks/real_vocabulary.py --json FILE

One small Llama with random weights, whose logits spread as those of a real model (4 nats of
entropy), in turns within one run. Tokens per second of CPU time and of wall time; no answer ends
before its last token. vLLM runs in a process of its own, by its `LLM` class (its server without
HTTP), where STEERLM2_VLLM_VENV or ~/.cache/steerlm2/vllm-0.32.0 has it (tests/recipes/test_vllm.py
makes it), and is left out elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder
from transformers import LlamaConfig, LlamaForCausalLM

from steerlm2.inference.engines import Request, SamplingSettings
from steerlm2.inference.local import LocalEngine

VOCABULARY = 128_256
LOGIT_SPREAD = 4.0
SETTINGS = ((1.0, 1.0), (0.7, 0.9))
"""Temperature and top-p."""

IN_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
folder, prompt, n, new_tokens, rounds, settings = json.loads(sys.argv[1])
llm = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
          max_model_len=len(prompt) + new_tokens, enable_prefix_caching=False)
for temperature, top_p in settings:
    wanted = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=new_tokens,
                            ignore_eos=True, detokenize=False, seed=1)
    best = [1e9, 1e9]
    for _ in range(rounds + 1):
        start = time.process_time(), time.perf_counter()
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], wanted, use_tqdm=False)
        assert [len(one.token_ids) for one in answer.outputs] == [new_tokens] * n
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
        best = [min(pair) for pair in zip(best, spent)]
    print("RESULT", json.dumps(best), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="the best of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(args)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=LOGIT_SPREAD / args.embed_dim**0.5)
    decoder = _decoder(model, args)
    prompt = torch.randint(VOCABULARY, (args.prompt,)).tolist()
    ways = {
        "local engine": [_ours(decoder, prompt, *each, args) for each in SETTINGS],
        "transformers": [_theirs(model, prompt, *each, args) for each in SETTINGS],
    }
    seconds = {name: [measured(way, args) for way in each] for name, each in ways.items()}
    if found := in_vllm(model, prompt, args):
        seconds["vLLM"] = found
    for i, (temperature, top_p) in enumerate(SETTINGS):
        print(f"temperature {temperature}, top-p {top_p}")
        for name, spent in seconds.items():
            cpu, wall = (args.n * args.new_tokens / each for each in spent[i])
            print(f"  {name:14}{cpu:9.1f} tokens per CPU second{wall:9.1f} per second")
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=1))


def _config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.embed_dim,
        intermediate_size=3 * args.embed_dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.embed_dim // 32,
        num_key_value_heads=args.embed_dim // 64,
        max_position_embeddings=4096,
        rope_theta=500_000.0,
        bos_token_id=None,
        eos_token_id=None,
    )


def _decoder(model: LlamaForCausalLM, args: argparse.Namespace) -> TransformerDecoder:
    """The same model for torchtune."""
    heads, kv_heads = args.embed_dim // 32, args.embed_dim // 64
    decoder = llama3(
        vocab_size=VOCABULARY,
        num_layers=args.layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=args.embed_dim,
        intermediate_dim=3 * args.embed_dim,
        max_seq_len=4096,
        norm_eps=model.config.rms_norm_eps,
    )
    weights = hf_to_tune(
        model.state_dict(), num_heads=heads, num_kv_heads=kv_heads, dim=args.embed_dim
    )
    decoder.load_state_dict(weights)
    text = torch.randint(VOCABULARY, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(decoder(text), model(text).logits, rtol=1e-3, atol=1e-3)
    return decoder


def measured(action: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of CPU time and of wall time, the best of each."""
    spent = []
    for _ in range(args.rounds + 1):
        start = time.process_time(), time.perf_counter()
        action()
        spent.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    cpu, wall = zip(*spent[1:], strict=True)
    return min(cpu), min(wall)


def _ours(
    decoder: TransformerDecoder,
    prompt: list[int],
    temperature: float,
    top_p: float,
    args: argparse.Namespace,
) -> Callable[[], object]:
    settings = SamplingSettings(args.n, temperature, top_p, args.new_tokens, -1, ())
    engine = LocalEngine(copy.deepcopy(decoder), settings, max_cache_tokens=1)
    return lambda: engine.sample([Request(prompt, 0)])


def _theirs(
    model: LlamaForCausalLM,
    prompt: list[int],
    temperature: float,
    top_p: float,
    args: argparse.Namespace,
) -> Callable[[], object]:
    ids = torch.tensor([prompt])
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        num_return_sequences=args.n,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=args.new_tokens,
        pad_token_id=0,
    )


def in_vllm(
    model: LlamaForCausalLM, prompt: list[int], args: argparse.Namespace
) -> list[tuple[float, float]]:
    """The same for vLLM; empty where it isn't installed."""
    default = Path.home() / ".cache" / "steerlm2" / "vllm-0.32.0"
    python = Path(os.environ.get("STEERLM2_VLLM_VENV", default)) / "bin" / "python"
    if not python.exists():
        print(f"without vLLM: there is no {python}")
        return []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        wanted = [folder, prompt, args.n, args.new_tokens, args.rounds, SETTINGS]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(args.threads),
        }
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
        result = subprocess.run(
            [python, "-c", IN_VLLM, json.dumps(wanted)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    if result.returncode != 0:
        print(f"without vLLM: {result.stderr[-2000:]}")
    return [tuple(json.loads(line.removeprefix("RESULT "))) for line in lines]


if __name__ == "__main__":
    main()
