"""Time and memory of steps at real sizes; those that measure time run one at a time."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from checking import (
    CONTEXT,
    GIB,
    ROOT,
    call,
    check,
    expect,
    folder,
    milliseconds,
    note,
    on_gpu,
)
from checks_training import MASTER

BENCHMARKS = ROOT / "tests" / "benchmarks"
PEAK_BF16 = 989e12
"""FLOP/s of an H100 or H200 (SXM), dense: NVIDIA's data sheets."""


def benchmark(script: str, *arguments: Any) -> dict[str, Any]:
    """A script of tests/benchmarks on the check's device: its figures."""
    file = folder() / f"{Path(script).stem}.json"
    device = ("--device", CONTEXT.device)
    call([sys.executable, BENCHMARKS / script, *device, *arguments, "--json", file])
    return json.loads(file.read_text())


def note_speed(n: int, prompt: int, response: int, rounds: int, *more: Any) -> None:
    """The figures of tests/benchmarks/gpu.py for groups of a shape."""
    shape = ("--n", n, "--prompt", prompt, "--response", response, "--rounds", rounds)
    tiny = () if on_gpu() else ("--no-compile", "--warm-up", 1)
    found = benchmark("gpu.py", *shape, *more, *tiny)
    kept = ("recompilations", "waits", "n", "prompt", "response")
    note(**{k: v for k, v in found.items() if isinstance(v, float) or k in kept})
    expect(not found["waits"], f"our step waits for the GPU: {found['waits']}")


def note_ceilings() -> None:
    """The rates of a large product and a large copy."""
    import torch

    size, length = (8192, 2**29) if on_gpu() else (128, 2**16)
    device = CONTEXT.device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    note(bf16_tflops=2 * size**3 / milliseconds(lambda: a @ b) / 1e9)
    large = torch.randn(length, device=device)
    copied = torch.empty_like(large)
    note(copy_tb_per_second=2 * large.nbytes / milliseconds(lambda: copied.copy_(large)) / 1e9)


@check(150, least=100, alone=True)
def speed_1b() -> None:
    """tests/benchmarks/gpu.py: 1B, compiled, against the two-pass reference and the padded pass;
    and the card's two ceilings."""
    note_ceilings()
    if on_gpu():
        import torch

        torch.cuda.empty_cache()
    shape = (10, 256, 128, 6) if on_gpu() else (3, 16, 8, 1)
    note_speed(*shape)


@check(120, least=60, alone=True)
def speed_1b_long() -> None:
    """tests/benchmarks/gpu.py with long groups: 10 answers of about 1,024 tokens."""
    shape = (10, 1024, 1024, 4) if on_gpu() else (2, 24, 24, 1)
    note_speed(*shape, "--groups", 2, "--reference-tokens", 8192)


@check(280, least=120, alone=True, named=True)
def speed_8b_lora() -> None:
    """tests/benchmarks/gpu.py with adapters on 8B: all ways without FSDP2 and optimizer, which
    lora_8b has."""
    shape = (10, 256, 128, 4) if on_gpu() else (2, 16, 8, 1)
    tokens = ("--max-tokens", 8192, "--reference-tokens", 8192)
    note_speed(*shape, *tokens, "--model", "8b_lora", "--activation-checkpointing", "full")


@check(200, least=60, alone=True, named=True)
def speed_sampling() -> None:
    """tests/benchmarks/sampling.py: 10 samples of a 1B model by our engine, by torchtune's and by
    transformers' generate."""
    tiny = ("--n", 2, "--prompts", 8, "--new-tokens", 3, "--rounds", 1)
    full = ("--model", "1b", "--prompts", 256, 1024, "--new-tokens", 128, "--rounds", 2)
    ways = ("shared", "batch", "transformers")
    found = benchmark(
        "sampling.py", *(full if on_gpu() else tiny), "--dtype", "bf16", "--ways", *ways
    )
    note(**{k: v for k, v in found.items() if isinstance(v, float)})
    missing = [way for way in ways if way not in found["ways"]]
    expect(not missing, f"not measured, since it isn't installed: {', '.join(missing)}")


@check(120, least=75, alone=True)
def lora_8b() -> None:
    """A step of llama3_1/8B_steerlm2_lora with random weights made on the GPU: bf16, compiled,
    full checkpointing, float32 adapters (FSDP2 on a mesh of one)."""
    import torch

    from steerlm2.data.packing import Group, pack
    from steerlm2.distributed.parallelize import clip_gradients
    from steerlm2.distributed.world import init_world
    from steerlm2.losses import SteerLM2Loss
    from steerlm2.training.forward import response_logps
    from steerlm2.training.step_plan import fill_microbatches

    world = init_world(CONTEXT.device, needs_mesh=True)
    model, weights = lora_model(world)
    trained = [p for p in model.parameters() if p.requires_grad]
    note(adapters=sum(p.numel() for p in trained))
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    scale, n, num_groups = (10, 10, 4) if on_gpu() else (1, 2, 2)

    def group(shift: int) -> Group:
        def tokens(count: int) -> list[int]:
            return torch.randint(1000, (count,), generator=generator).tolist()

        responses = [tokens((20 + 3 * i) * scale + shift) for i in range(n)]
        return Group(tokens(25 * scale), responses, log_q=[0.0] * n, weights=[1 / n] * n)

    def wait() -> None:
        if on_gpu():
            torch.cuda.synchronize()

    losses, rates = [], []
    for step in range(5 if on_gpu() else 2):
        groups = [group(5 * step + i) for i in range(num_groups)]
        packed = [
            pack(parts, multiple_of=world.padding_multiple)
            for parts in fill_microbatches(groups, 8192)
        ]
        wait()
        if on_gpu() and step == 2:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for row in packed:
            row = row.to(world.device)
            logps_N = response_logps(model, row, world)
            leaf_N = logps_N.detach().requires_grad_()
            lengths_N = row.response_lengths_N
            loss = SteerLM2Loss()(leaf_N, row.log_q_N, row.w_N, row.sizes_G, lengths_N)
            logps_N.backward(torch.autograd.grad(loss, leaf_N)[0])
        norm = clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        wait()
        rates.append(sum(g.num_tokens for g in groups) / (time.perf_counter() - started))
        note(**{f"step_{step}_tokens_per_second": rates[-1]}, grad_norm=norm.item())
    if on_gpu():
        note(peak_gib=torch.cuda.max_memory_allocated() / GIB)
        # per weight of the layers and token: forward 2, again 2, gradients of activations 2
        note(flop_utilisation=statistics.median(rates[2:]) * 6 * weights / PEAK_BF16)
    expect(all(map(math.isfinite, losses)), "the loss is not finite")


def lora_model(world: Any) -> tuple[Any, int]:
    """Llama 3.1 8B with adapters, laid out, random; a tiny one in a rehearsal. And the number of
    weights of its layers."""
    import torch
    from torchtune.models.llama3 import lora_llama3
    from torchtune.models.llama3_1 import lora_llama3_1_8b
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    from steerlm2.distributed.parallelize import parallelize

    lora = {"apply_lora_to_mlp": True, "lora_rank": 8, "lora_alpha": 16}
    attention = ["q_proj", "v_proj", "output_proj"]
    with torch.device("meta"):
        if on_gpu():
            model = lora_llama3_1_8b(attention, **lora)
        else:
            model = lora_llama3(
                attention, vocab_size=1000, num_layers=2, num_heads=4, num_kv_heads=2,
                embed_dim=128, intermediate_dim=256, max_seq_len=4096, **lora,
            )  # fmt: skip
    weights = sum(p.numel() for p in model.layers.parameters())
    set_trainable_params(model, get_adapter_params(model))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    parallelize(
        model, world, dtype=torch.bfloat16, compile=on_gpu(), activation_checkpointing="full"
    )
    model.to_empty(device=world.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if local.dim() == 1:
                local.fill_(1)
            elif "lora_b" in name:
                local.zero_()
            else:
                local.normal_(std=0.02)
    with world.device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    return model, weights


@check(60, least=30, alone=True)
def logprob_memory() -> None:
    """tests/benchmarks/logprob_memory.py at 4096 hidden, bf16: every way that there is."""
    V, T, D = (128_256, 8192, 4096) if on_gpu() else (4096, 512, 64)
    sizes = ("--vocabulary", V, "--tokens", T, "--hidden", D)
    found = benchmark("logprob_memory.py", *sizes, "--dtype", "bf16")
    for key, value in found.items():
        if key.endswith("_peak_bytes"):
            note(**{key.replace("_peak_bytes", "_of_logits"): value / (4 * V * T)})
        elif isinstance(value, float) or key.endswith("_failure"):
            note(**{key: value})
    expect(found["ours_gradient_error"] < 1e-3, "gradients are off")


@check(160)
def planned_memory() -> None:
    """tests/benchmarks/plan_memory.py: the planner's bytes against the allocator's, 1B."""
    sys.path.insert(0, str(BENCHMARKS))
    import plan_memory  # tests/benchmarks/plan_memory.py

    problems = []
    for key in ("SteerLM 2.0", "SteerLM 2.0, checkpointing")[: 2 if on_gpu() else 1]:
        recipe, config, *overrides = plan_memory.RUNS[key]
        result = folder() / "result.json"
        run = folder() / key.replace(" ", "_").replace(",", "")
        arguments = [
            *plan_memory.MODEL, *plan_memory.STEPS, *overrides,
            *("dataset.num_records=1100", f"device={CONTEXT.device}", f"output_dir={run}"),
        ]  # fmt: skip
        if not on_gpu():
            arguments = [a for a in arguments if a not in (*plan_memory.MODEL, *MASTER)]
            arguments += ["dataset.num_records=32", "global_batch_size=8"]
        call([sys.executable, plan_memory.SCRIPT, recipe, config, result, *arguments])
        found = json.loads(result.read_text())
        measured, planned = found["measured"], sum(found["planned"].values())
        short = "checkpointing" if "checkpointing" in key else "plain"
        note(**{f"{short}_measured_gib": measured / GIB, f"{short}_planned_gib": planned / GIB})
        note(**{f"{short}_ratio": planned / measured})
        kinds = {kind: round(value / GIB, 2) for kind, value in found["planned"].items()}
        note(**{f"{short}_planned": kinds})
        if not 0.9 <= planned / measured <= 1.1:
            problems.append(f"{short}: planned / measured is {planned / measured:.2f}")
    expect(not problems, "; ".join(problems))
