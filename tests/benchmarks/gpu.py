"""Tokens per second, FLOP utilisation and memory on a GPU: ours against the standard two-pass step
and against a padded single pass.

    python tests/benchmarks/gpu.py --n 10 --prompt 256 --response 128 --json FILE
    python tests/benchmarks/gpu.py --n 10 --prompt 1024 --response 1024    # long groups
    python tests/benchmarks/gpu.py --model 8b_lora --activation-checkpointing full \\
        --max-tokens 8192 --reference-tokens 8192
    python tests/benchmarks/gpu.py --device cpu    # the same code with a tiny model, to try it

A Llama of 1B size with random weights, bfloat16 and compiled, each way, or one of 8B size with
adapters, of which the other weights are frozen; steps of `--groups` prompts as in train_step.py,
without the optimizer. Lengths differ from step to step, so that recompilations show:
`recompilations` counts ours after the warm-up. Our packed sequences are padded as the recipes pad
them. Tokens per second count what the method needs, prompts once and responses, the same for all
ways. Model FLOP utilisation counts needed FLOPs only (6 per weight of the layers and packed token,
12 per attention dimension and pair, 6 per weight of the output matrix and response token, 4 where
weights are frozen; nothing computed twice, no padding) over `--peak-tflops`, which is the device's
dense bfloat16 peak. The padded pass is left out where the memory doesn't hold the logits of a
group. `waits` says what synchronises host and device within our step, in a step that isn't timed;
"" where nothing does.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import noop_context_fn
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype
from train_step import Cell
from two_pass_reference import padded_single_pass_step, two_pass_step

from steerlm2.data.packing import Group, PackedGroups, pack
from steerlm2.distributed.parallelize import keep_products, parallelize
from steerlm2.distributed.world import World
from steerlm2.losses import SteerLM2Loss
from steerlm2.training.forward import response_logps
from steerlm2.training.step_plan import fill_microbatches

SIZES: dict[str, dict[str, int]] = {
    "1b": {
        "vocab_size": 128_256,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "embed_dim": 2048,
        "intermediate_dim": 8192,
    },
    "8b_lora": {
        "vocab_size": 128_256,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "embed_dim": 4096,
        "intermediate_dim": 14_336,
    },
}
"""Those of Llama 3.2 1B, output matrix untied: 1.5B weights, 0.97B of them in layers; and those of
Llama 3.1 8B."""
TINY = {
    "vocab_size": 400,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 128,
}
"""In place of all of them on a CPU."""
ADAPTERS: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 8,
    "lora_alpha": 16,
}
"""As in recipe_configs/llama3_1/8B_steerlm2_lora.yaml."""


def sizes_of(args: argparse.Namespace) -> dict[str, int]:
    return SIZES[args.model] if args.device == "cuda" else TINY


def llama(args: argparse.Namespace) -> TransformerDecoder:
    """Random weights; only adapters can be trained where there are any."""
    torch.manual_seed(0)
    sizes = {**sizes_of(args), "max_seq_len": 8192}
    with torch.device(args.device), set_default_dtype(torch.bfloat16):
        if not args.model.endswith("_lora"):
            return llama3(**sizes).bfloat16()
        model = lora_llama3(**ADAPTERS, **sizes).bfloat16()
    set_trainable_params(model, get_adapter_params(model))
    return model


def lay_out_reference(model: TransformerDecoder, args: argparse.Namespace) -> None:
    """Activation checkpointing and compilation as `parallelize` has them, for padded rows."""
    contexts = {"full": noop_context_fn, "selective": keep_products}
    for i, layer in enumerate(model.layers):
        if args.activation_checkpointing is not None:
            context_fn = contexts[args.activation_checkpointing]
            layer = checkpoint_wrapper(layer, preserve_rng_state=False, context_fn=context_fn)
        model.layers[i] = layer
        if not args.no_compile:
            layer.compile()


def needed_flops(model: TransformerDecoder, groups: list[Group]) -> float:
    """Of the layers, attention and the output matrix, forward and backward."""
    attention = len(model.layers) * model.num_heads * model.head_dim
    targets = sum(len(response) for group in groups for response in group.responses)
    return (
        _flops_of_a_token(model.layers) * sum(group.num_tokens for group in groups)
        + 12 * attention * sum(group.num_pairs for group in groups)
        + _flops_of_a_token(model.output) * targets
    )


def _flops_of_a_token(module: nn.Module) -> int:
    """A product with a weight takes 2 in the forward, 2 for the gradient of its input, and 2 for
    its own, which a frozen one hasn't."""
    return sum((6 if p.requires_grad else 4) * p.numel() for p in module.parameters())


def our_step(
    model: TransformerDecoder, batches: list[PackedGroups], num_groups: int, world: World
) -> None:
    loss_fn = SteerLM2Loss()
    for batch in batches:
        batch = batch.to(world.device)
        assert batch.log_q_N is not None
        assert batch.w_N is not None
        logps_N = response_logps(model, batch, world)
        leaf_N = logps_N.detach().requires_grad_()
        loss = loss_fn(leaf_N, batch.log_q_N, batch.w_N, batch.sizes_G, batch.response_lengths_N)
        loss = loss * (len(batch.sizes_G) / num_groups)
        logps_N.backward(torch.autograd.grad(loss, leaf_N)[0])


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds, and bytes at the peak above those before; 0 on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started, 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() - before


def waits_in(step: Callable[[], None], device: torch.device) -> str:
    """What synchronises host and device in a step; "" where nothing does."""
    if device.type != "cuda":
        step()
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return f"{str(error).splitlines()[0][:120]} at {where}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def steps_of(args: argparse.Namespace) -> list[list[Group]]:
    """Groups whose lengths differ from step to step."""
    vocabulary = sizes_of(args)["vocab_size"]
    return [
        [
            Cell(args.n, args.prompt + 8 * i, args.response + 8 * i + j).group(vocabulary)
            for j in range(args.groups)
        ]
        for i in range(args.warm_up + args.rounds)
    ]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    device = torch.device(args.device)
    world = World(device)
    model = llama(args)
    ours = copy.deepcopy(model)
    parallelize(
        ours,
        world,
        dtype=torch.bfloat16,
        compile=not args.no_compile,
        activation_checkpointing=args.activation_checkpointing,
    )
    lay_out_reference(model, args)
    seconds: dict[str, list[float]] = {"reference": [], "padded": [], "ours": []}
    peaks = dict.fromkeys(seconds, 0)
    recompilations = dict.fromkeys(seconds, 0)
    tokens, flops = [], []
    for i, groups in enumerate(steps_of(args)):
        batches = [
            pack(parts, multiple_of=world.padding_multiple)
            for parts in fill_microbatches(groups, args.max_tokens)
        ]

        def reference_step(groups: list[Group] = groups) -> None:
            two_pass_step(model, groups, args.reference_tokens)

        def padded_step(groups: list[Group] = groups) -> None:
            padded_single_pass_step(model, groups)

        def step(batches: list[PackedGroups] = batches, count: int = len(groups)) -> None:
            our_step(ours, batches, count, world)

        ways = {"reference": reference_step, "padded": padded_step, "ours": step}
        for name in list(seconds):
            ours.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
            graphs = counters["stats"]["unique_graphs"]
            try:
                elapsed, peak = timed(ways[name], device)
            except torch.OutOfMemoryError:
                if name != "padded":
                    raise
                del seconds[name]  # a whole group's logits at a time: not for every card
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()  # the pieces it leaves would be in the others' way
                continue
            if i >= args.warm_up:
                recompilations[name] += counters["stats"]["unique_graphs"] - graphs
                seconds[name].append(elapsed)
                peaks[name] = max(peaks[name], peak)
        if i >= args.warm_up:
            tokens.append(sum(group.num_tokens for group in groups))
            flops.append(needed_flops(model, groups))
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none: a tiny model",
        "torch": torch.__version__,
        "recompilations": recompilations["ours"],
        "reference_recompilations": recompilations["reference"],
        "waits": waits_in(step, device),
    }
    for name in seconds:
        per_second = [t / s for t, s in zip(tokens, seconds[name], strict=True)]
        rates = [f / s for f, s in zip(flops, seconds[name], strict=True)]
        result[f"{name}_tokens_per_second"] = statistics.median(per_second)
        result[f"{name}_flop_utilisation"] = statistics.median(rates) / (args.peak_tflops * 1e12)
        result[f"{name}_peak_bytes"] = peaks[name]
    for name in seconds.keys() - {"ours"}:
        ratio = result["ours_tokens_per_second"] / result[f"{name}_tokens_per_second"]
        result[f"{name}_time_ratio"] = ratio
        if device.type == "cuda":
            result[f"{name}_peak_memory_ratio"] = peaks[name] / peaks["ours"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10, help="responses")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens, on average")
    parser.add_argument("--groups", type=int, default=8, help="prompts of a step")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of our micro-batch")
    parser.add_argument("--reference-tokens", type=int, default=16_384, help="of its micro-batch")
    parser.add_argument("--activation-checkpointing", choices=("full", "selective"))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--model", choices=SIZES, default="1b")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model"
    )
    parser.add_argument("--peak-tflops", type=float, default=989, help="H100 and H200: 989")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu tries the code without one")
    result = vars(args) | measure(args)
    del result["json"]
    print("| | |\n|---|---|")
    for key, value in result.items():
        print(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
