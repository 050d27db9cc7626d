"""n samples of a prompt: the local engine against torchtune's and transformers' generate.

    python tests/benchmarks/sampling.py            # the tiny model
    python tests/benchmarks/sampling.py --embed-dim 512 --layers 8 --heads 8
    python tests/benchmarks/sampling.py --device cuda --dtype bf16 --model 1b --prompts 256 \\
        --new-tokens 128 --ways shared batch transformers --json FILE

Ways to sample n responses of so many tokens, in one process and in turns, the best of `--rounds`
each:

    shared         our engine: the prompt is computed once, the samples' next tokens together
    cached         n x torchtune.generation.generate, with its key/value cache
    batch          torchtune's generate once, with its cache, the prompt repeated n times
    uncached       n x generate without a cache (one is measured, and counted n times)
    transformers   generate of a model of the same shape, with num_return_sequences (where
                   transformers is installed)

No sample ends before its last token. Weights are random. On a GPU a round before the first one
isn't measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.generation import generate
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.inference.engines import Request, SamplingSettings
from steerlm2.inference.local import LocalEngine

WAYS = ("shared", "cached", "batch", "uncached", "transformers")
CONTEXT = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_1B = {
    "vocabulary": 128_256,
    "layers": 16,
    "heads": 32,
    "kv_heads": 8,
    "embed_dim": 2048,
    "intermediate_dim": 8192,
}


@dataclass(frozen=True)
class Action:
    """One way to sample the responses."""

    run: Callable[[], object]
    times: int = 1
    """How often it would have to be called for all of them."""


@dataclass(frozen=True)
class Ways:
    """What samples with models of one shape."""

    args: argparse.Namespace
    decoder: TransformerDecoder
    engine: LocalEngine
    hf_model: Any
    """None where it isn't wanted or can't be had."""

    @property
    def names(self) -> list[str]:
        wanted = self.args.ways
        return [way for way in wanted if way != "transformers" or self.hf_model is not None]

    def of_prompt(self, prompt: Tensor) -> dict[str, Action]:
        made = {
            "shared": self._shared,
            "cached": self._cached,
            "batch": self._batch,
            "uncached": self._uncached,
            "transformers": self._transformers,
        }
        return {way: made[way](prompt) for way in self.names}

    def _shared(self, prompt: Tensor) -> Action:
        request = Request(prompt.tolist(), 0)
        return Action(lambda: self.engine.sample([request]))

    def _cached(self, prompt: Tensor) -> Action:
        model = self._with_cache(prompt, 1)
        return Action(lambda: [self._generate(model, prompt) for _ in range(self.args.n)])

    def _batch(self, prompt: Tensor) -> Action:
        model = self._with_cache(prompt, self.args.n)
        return Action(lambda: self._generate(model, prompt.expand(self.args.n, -1)))

    def _uncached(self, prompt: Tensor) -> Action:
        return Action(lambda: self._generate(self.decoder, prompt), times=self.args.n)

    def _transformers(self, prompt: Tensor) -> Action:
        """At temperature 1, of all tokens."""
        wanted = (self.args.n, len(prompt) + self.args.new_tokens)

        def generate_all() -> None:
            made = self.hf_model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=self.args.n,
                max_new_tokens=self.args.new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert made.shape == wanted, made.shape

        return Action(generate_all)

    def _with_cache(self, prompt: Tensor, size: int) -> TransformerDecoder:
        model = copy.deepcopy(self.decoder)
        cached_tokens = len(prompt) + self.args.new_tokens
        with prompt.device:
            model.setup_caches(size, DTYPES[self.args.dtype], decoder_max_seq_len=cached_tokens)
        return model

    def _generate(self, model: TransformerDecoder, rows: Tensor) -> None:
        if model.caches_are_enabled():
            model.reset_caches()
        # a pad_id that no token has: nothing is masked
        pad_id = self.args.vocabulary
        generate(model, rows, max_generated_tokens=self.args.new_tokens, pad_id=pad_id)


def ways_of(args: argparse.Namespace) -> Ways:
    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    with torch.device(args.device):
        decoder = llama3(
            vocab_size=args.vocabulary,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            embed_dim=args.embed_dim,
            intermediate_dim=args.intermediate_dim,
            max_seq_len=CONTEXT,
        )
        hf_model = transformers_model(args) if "transformers" in args.ways else None
    decoder = decoder.to(dtype).eval()
    settings = SamplingSettings(args.n, 1.0, 1.0, args.new_tokens, stop_id=-1, forbidden_ids=())
    engine = LocalEngine(copy.deepcopy(decoder), settings, max_cache_tokens=1)
    return Ways(args, decoder, engine, None if hf_model is None else hf_model.to(dtype).eval())


def transformers_model(args: argparse.Namespace) -> Any:
    """Of the same shape, with other random weights; None without transformers."""
    if find_spec("transformers") is None:
        return None
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        hidden_size=args.embed_dim,
        intermediate_size=args.intermediate_dim,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def seconds(action: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(ways: Ways, length: int) -> dict[str, float]:
    """Seconds of each way for a prompt of so many tokens."""
    args = ways.args
    prompt = torch.randint(args.vocabulary, (length,)).to(args.device)
    actions = ways.of_prompt(prompt)
    best = dict.fromkeys(actions, float("inf"))
    for i in range(args.rounds + (args.device == "cuda")):
        for way, action in actions.items():
            took = action.times * seconds(action.run, args.device)
            if i > 0 or args.device != "cuda":
                best[way] = min(best[way], took)
    return best


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("small", "1b"), default="small", help="1b: all sizes")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 512], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.kv_heads, args.intermediate_dim = args.heads // 2, 3 * args.embed_dim
    if args.model == "1b":
        vars(args).update(LLAMA_1B)
    return args


@torch.no_grad()
def main() -> None:
    args = parsed_arguments()
    torch.set_num_threads(args.threads)
    ways = ways_of(args)
    on_gpu = args.device == "cuda"
    result: dict[str, Any] = vars(args) | {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in ways.decoder.parameters()),
        "ways": ways.names,
    }
    print(f"{result['parameters'] / 1e6:.1f}M parameters, {args.n} x {args.new_tokens} tokens")
    print("| prompt | " + " | ".join(ways.names) + " |\n" + "|---" * (1 + len(ways.names)) + "|")
    for length in args.prompts:
        found = measure(ways, length)
        result |= {f"{way}_{length}_seconds": took for way, took in found.items()}
        cells = {way: f"{took:.3f} s" for way, took in found.items()}
        for way in found.keys() - {"shared"} if "shared" in found else ():
            ratio = result[f"{way}_{length}_time_ratio"] = found[way] / found["shared"]
            cells[way] += f" ({ratio:.1f} times)"
        print(f"| {length} | " + " | ".join(cells.values()) + " |", flush=True)
    del result["json"]
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
