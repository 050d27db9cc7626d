"""Attention, the decoder's gradients and the log-prob layer against exact references."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from checking import (
    CONTEXT,
    GIB,
    ask_card,
    call,
    check,
    expect,
    milliseconds,
    note,
    on_gpu,
    relative,
    waiting,
)


@check(90)
def environment() -> None:
    """Versions, the machine, `tune ls`, a compiled function."""
    import importlib.metadata as metadata

    import torch

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    note(python=sys.version.split()[0], torch=torch.__version__, cpus=os.cpu_count())
    packages = "torchtune torchao torchdata datasets omegaconf triton transformers pyarrow numpy"
    note(**{name: version(name) for name in packages.split()})
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        note(gpu=properties.name, gib=properties.total_memory / GIB, cuda=torch.version.cuda)
        note(capability=".".join(map(str, torch.cuda.get_device_capability())))
        note(nccl=".".join(map(str, torch.cuda.nccl.version())))
        note(driver=ask_card("driver_version"), compute_mode=ask_card("compute_mode"))
    listed = call([sys.executable, "-m", "torchtune._cli.tune", "ls"])
    found = [name for name in ("steerlm2_distributed", "tiny/steerlm2") if name in listed]
    note(tune_ls=f"{len(found)} of 2 names")
    expect(len(found) == 2, "`tune ls` doesn't show the recipes")

    started = time.perf_counter()
    backend = "inductor" if on_gpu() else "eager"
    function = torch.compile(lambda x: (x.sin() + x.cos()).sum(), dynamic=True, backend=backend)
    x = torch.randn(100, device=CONTEXT.device)
    torch.testing.assert_close(function(x), (x.sin() + x.cos()).sum(), rtol=1e-3, atol=1e-3)
    note(first_compile_seconds=time.perf_counter() - started)


@check(130)
def flex_gradients() -> None:
    """`attend` on packed sequences of many lengths against a dense mask in float64, value and
    gradients; how often it compiles, and that lengths seen before compile nothing."""
    import torch
    from torch._dynamo.utils import counters

    from steerlm2.data.packing import pack
    from steerlm2.models.attention import attend, flex_mask

    torch._dynamo.config.recompile_limit = 64
    packed = [pack(groups) for groups in [*groups_of_many_lengths(), *random_groups()]]
    note(lengths=[len(row.tokens_T) for row in packed])

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v

    def errors(heads: int, size: int, dtype: torch.dtype) -> tuple[float, float]:
        value, gradient = 0.0, 0.0
        for i, row in enumerate(packed):
            length = len(row.tokens_T)
            torch.manual_seed(i)
            draws = [torch.randn(1, heads, length, size, device=CONTEXT.device) for _ in range(4)]
            *qkv, upstream = (draw.to(dtype) for draw in draws)
            ours = [t.clone().requires_grad_() for t in qkv]
            exact = [t.double().requires_grad_() for t in qkv]
            row = row.to(torch.device(CONTEXT.device))
            mask = flex_mask(row.group_T, row.segment_T) if on_gpu() else row.blocks_X5
            out = attend(*ours, mask, 0.0, False)
            expected = dense(*exact, row.attention_mask_TT())
            # Padding sees itself at most; a token that sees nothing has no defined output.
            seen = row.attention_mask_TT().any(-1)[None, None, :, None]
            got = torch.autograd.grad(out, ours, upstream * seen)
            wanted = torch.autograd.grad(expected, exact, (upstream * seen).double())
            value = max(value, relative((out * seen).double(), expected * seen))
            gradient = max(gradient, *map(relative, got, wanted))
        return value, gradient

    cases = [
        (8, 128, torch.bfloat16, 2e-2),
        (4, 32, torch.float32, 1e-4),
        (8, 64, torch.bfloat16, 2e-2),
    ]
    for heads, size, dtype, tolerance in (
        cases if on_gpu() else [(2, 16, torch.bfloat16, 2e-2), (2, 16, torch.float32, 1e-4)]
    ):
        key = f"{str(dtype)[6:]}_{size}"
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        value, gradient = errors(heads, size, dtype)
        graphs = counters["stats"]["unique_graphs"]
        note(**{f"{key}_value": value, f"{key}_gradient": gradient})
        note(**{f"{key}_graphs": graphs - before})
        note(**{f"{key}_seconds": time.perf_counter() - started})
        errors(heads, size, dtype)
        again = counters["stats"]["unique_graphs"] - graphs
        note(**{f"{key}_graphs_again": again})
        expect(max(value, gradient) <= tolerance, f"{key}: {max(value, gradient):.3g} off")
        expect(again == 0, f"{key}: lengths seen before compile again")
        expect(graphs - before <= 8, f"{key}: compiled {graphs - before} times")


def groups_of_many_lengths(vocabulary: int = 400) -> Iterator[list[Any]]:
    """Of packed sequences short and long, at and beside multiples of 128, several groups, none."""
    import torch

    from steerlm2.data.packing import Group

    generator = torch.Generator().manual_seed(0)

    def group(prompt: int, *responses: int) -> Group:
        def tokens(count: int) -> list[int]:
            return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

        n = len(responses)
        weights = torch.randn(n, generator=generator).softmax(0).tolist()
        drawn = [tokens(length) for length in responses]
        return Group(tokens(prompt), drawn, log_q=[-2.0 * x for x in responses], weights=weights)

    yield [group(300, 64, 65, 66, 67) if on_gpu() else group(130, 64, 65)]
    yield [group(9, 6, 7)]
    yield []
    yield [group(64, 33, 32)]  # 127
    yield [group(64, 33, 33)]  # 128
    yield [group(64, 33, 34)]  # 129
    yield [group(100, 80, 79), group(40, 3, 9, 5)]
    yield [group(1, 2, 2)]
    if on_gpu():
        yield [group(200, 300, 200), group(5, 100, 120), group(90, 40, 1)]
        yield [group(384, 129, 129, 129)]  # 768
        yield [group(500, *range(100, 260, 16))]
        yield [group(1000, 700, 900, 800)]
        yield []


def random_groups(count: int = 40) -> Iterator[list[Any]]:
    """Of packed sequences of 2 to 1,500 tokens."""
    from steerlm2.data.packing import Group

    draw = random.Random(1)
    for _ in range(count if on_gpu() else 3):
        size = draw.choice([20, 60, 200, 700, 1500])
        groups = []
        for _ in range(draw.choice([1, 1, 2, 3])):
            prompt = draw.randint(1, max(size // 4, 2))
            lengths = [draw.randint(2, max(size // 6, 3)) for _ in range(draw.randint(2, 6))]
            groups.append(Group([1] * prompt, [[1] * n for n in lengths]))
        yield groups


@check(150, rehearsed_by="decoder_gradients_compiled")
def decoder_gradients() -> None:
    """A two-layer decoder with grouped queries through `response_logps`: gradients of all weights
    on the GPU against the CPU's, not compiled, with and without activation checkpointing."""
    modes = [None, "full", "selective"]
    compare_decoders({mode or "plain": {"activation_checkpointing": mode} for mode in modes})


@check(230)
def decoder_gradients_compiled() -> None:
    """The same compiled (not in a rehearsal). The last way sees short sequences first and without
    gradients, as a recipe does whose first step is a validation."""
    modes = [None, "full", "selective"] if on_gpu() else ["full"]
    ways = {mode or "plain": {"activation_checkpointing": mode} for mode in modes}
    compare_decoders(
        {name: options | {"compile": on_gpu()} for name, options in ways.items()},
        short_first=list(ways)[-1],
    )


def compare_decoders(ways: dict[str, dict[str, Any]], short_first: str | None = None) -> None:
    """Gradients of the ways to lay out a decoder; what waits for the GPU; compilations.

    Args:
        ways: options of `parallelize` by name.
        short_first: the way that begins with the shortest sequence, without gradients.
    """
    import torch
    from torch._dynamo.utils import counters
    from torchtune.models.llama3 import llama3

    from steerlm2.data.packing import pack
    from steerlm2.distributed.parallelize import parallelize
    from steerlm2.distributed.world import World
    from steerlm2.losses import SteerLM2Loss
    from steerlm2.training.forward import response_logps

    torch.manual_seed(0)
    model = llama3(
        vocab_size=1000, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=256,
        intermediate_dim=512, max_seq_len=4096, rope_base=10_000,
    )  # fmt: skip
    packed = [pack(groups) for groups in groups_of_many_lengths()]

    def laid_out(device: str, **options: Any) -> tuple[Any, World]:
        world = World(torch.device(device))
        ours = copy.deepcopy(model).to(device)
        parallelize(ours, world, dtype=torch.float32, **options)
        return ours, world

    def gradients(ours: Any, world: World, row: Any) -> list[torch.Tensor]:
        ours.zero_grad(set_to_none=True)
        row = row.to(world.device)
        logps_N = response_logps(ours, row, world)
        leaf_N = logps_N.detach().requires_grad_()
        loss = SteerLM2Loss()(leaf_N, row.log_q_N, row.w_N, row.sizes_G, row.response_lengths_N)
        logps_N.backward(torch.autograd.grad(loss, leaf_N)[0])
        return [p.grad for p in ours.parameters()]

    def flat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.double().cpu().flatten() for part in parts])

    def error(ours: Any, world: World, i: int) -> float:
        got, wanted = flat(gradients(ours, world, packed[i])), expected[i]
        if wanted.norm() > 0:
            return relative(got, wanted)
        return math.inf if got.norm() > 0 else 0.0  # an empty sequence has no gradients

    def run(name: str, options: dict[str, Any]) -> str:
        ours, world = laid_out(CONTEXT.device, **options)
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        order = range(len(packed))
        if name == short_first:
            order = sorted(order, key=lambda i: len(packed[i].tokens_T))
            with torch.no_grad():
                for i in order:
                    response_logps(ours, packed[i].to(world.device), world)
        worst = max(error(ours, world, i) for i in order)
        graphs = counters["stats"]["unique_graphs"]
        note(**{f"{name}_error": worst, f"{name}_graphs": graphs - before})
        note(**{f"{name}_seconds": time.perf_counter() - started})
        waits = waiting(lambda: [gradients(ours, world, row) for row in packed])
        again = counters["stats"]["unique_graphs"] - graphs
        note(**{f"{name}_waits": waits, f"{name}_graphs_again": again})
        if worst > 1e-4:
            return f"gradients {worst:.3g} off"
        if again:
            return "lengths seen before compile again"
        return f"waits for the GPU: {waits}" if waits else ""

    reference, cpu = laid_out("cpu")
    expected = [flat(gradients(reference, cpu, row)) for row in packed]
    problems = []
    for name, options in ways.items():
        torch._dynamo.reset()
        try:
            problem = run(name, options)
        except Exception as failure:  # the other ways are still worth their figures
            traceback.print_exc()
            problem = str(failure).strip().splitlines()[-1][:200] or type(failure).__name__
        if problem:
            problems.append(f"{name}: {problem}")
    expect(not problems, "; ".join(problems))


@check(90)
def token_logps_exact() -> None:
    """Log-probs and both gradients of bf16 and float32 inputs at Llama's vocabulary, several
    chunks, against float64."""
    import torch

    from steerlm2.models.logprobs import CHUNK_BYTES, token_logps

    V, D, R = (128_256, 2048, 3000) if on_gpu() else (4096, 64, 300)
    chunk = None if on_gpu() else 100
    device = CONTEXT.device
    note(vocabulary=V, tokens=R, chunk=chunk or CHUNK_BYTES["cuda"] // (4 * V))
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        hidden = torch.randn(R, D, device=device).to(dtype)
        weight = (torch.randn(V, D, device=device) * 4 / D**0.5).to(dtype)
        targets = torch.randint(V, (R,), device=device)
        upstream = torch.randn(R, device=device)
        ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def step(ours: Any = ours, targets: Any = targets, upstream: Any = upstream) -> Any:
            logps = token_logps(*ours, targets, chunk_size=chunk)
            return logps, torch.autograd.grad(logps, ours, upstream)

        logps, got = step()
        exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
        logits = exact[0] @ exact[1].t()
        wanted_logps = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        del logits
        wanted = torch.autograd.grad(wanted_logps, exact, upstream.double())
        key = str(dtype)[6:]
        nats = (logps - wanted_logps).abs().max().item()
        errors = [relative(*pair) for pair in zip(got, wanted, strict=True)]
        note(**{f"{key}_logps_nats": nats})
        note(**{f"{key}_hidden_gradient": errors[0], f"{key}_weight_gradient": errors[1]})
        del wanted, wanted_logps, exact, got
        waits = waiting(step)
        note(**{f"{key}_waits": waits, f"{key}_ms": milliseconds(step, 5)})
        expect(max(errors) <= tolerance, f"{key}: a gradient is {max(errors):.3g} off")
        expect(nats <= 2e-3, f"{key}: a log-prob is {nats:.3g} nats off")
        expect(not waits, f"{key}: waits for the GPU: {waits}")
