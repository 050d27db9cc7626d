"""n samples of a prompt: the local engine against n generations of torchtune, in one process.

    python tests/benchmarks/sampling.py            # the tiny model
    python tests/benchmarks/sampling.py --embed-dim 512 --layers 8 --heads 8

Four ways to sample n responses of so many tokens, in turns, the best of `--rounds` each:

    shared      our engine: the prompt is computed once, the samples' next tokens together
    cached      n x torchtune.generation.generate, with its key/value cache
    batch       torchtune's generate once, with its cache, the prompt repeated n times
    uncached    n x generate without a cache (one is measured, and counted n times)

No sample ends before its last token.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchtune.generation import generate
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.inference.engines import Request, SamplingSettings
from steerlm2.inference.local import LocalEngine

VOCABULARY = 512


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--embed-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 512], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=VOCABULARY,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.heads // 2,
        embed_dim=args.embed_dim,
        intermediate_dim=3 * args.embed_dim,
        max_seq_len=4096,
    ).eval()
    settings = SamplingSettings(args.n, 1.0, 1.0, args.new_tokens, stop_id=-1, forbidden_ids=())
    engine = LocalEngine(copy.deepcopy(decoder), settings, max_cache_tokens=1)
    parameters = sum(p.numel() for p in decoder.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {args.n} x {args.new_tokens} tokens")
    print("prompt    shared    cached     batch  uncached   cached/shared batch/ uncached/")
    for length in args.prompts:
        best = measure(decoder, engine, torch.randint(VOCABULARY, (length,)), args)
        ours, *others = best
        times = "".join(f"{value:9.3f}s" for value in best)
        print(f"{length:6}{times}", "".join(f"{value / ours:9.1f}x" for value in others))


def measure(
    decoder: TransformerDecoder, engine: LocalEngine, prompt: Tensor, args: argparse.Namespace
) -> list[float]:
    """Seconds of the four ways."""
    one, many = (copy.deepcopy(decoder) for _ in range(2))
    for model, size in ((one, 1), (many, args.n)):
        cached_tokens = len(prompt) + args.new_tokens
        model.setup_caches(size, torch.float32, decoder_max_seq_len=cached_tokens)

    def generated(model: TransformerDecoder, rows: Tensor) -> None:
        if model.caches_are_enabled():
            model.reset_caches()
        # a pad_id that no token has: nothing is masked
        generate(model, rows, max_generated_tokens=args.new_tokens, pad_id=VOCABULARY)

    ways: list[tuple[int, Callable[[], object]]] = [
        (1, lambda: engine.sample([Request(prompt.tolist(), 0)])),
        (1, lambda: [generated(one, prompt) for _ in range(args.n)]),
        (1, lambda: generated(many, prompt.expand(args.n, -1))),
        (args.n, lambda: generated(decoder, prompt)),
    ]
    best = [float("inf")] * len(ways)
    for _ in range(args.rounds):
        for way, (times, action) in enumerate(ways):
            best[way] = min(best[way], times * seconds(action))
    return best


if __name__ == "__main__":
    main()
