"""Our training step against the standard two-pass step, on a 33M-parameter Llama in float32.

    python tests/benchmarks/train_step.py --n 10 --prompt 256 --response 128 --json FILE
    python tests/benchmarks/train_step.py --grid --json FILE --plot FILE.png

A step is what it takes to get the gradient of one prompt with n responses, from token ids to
`.grad`; the optimizer is the same for all and left out. Response lengths are the quantiles of a
uniform distribution from half to one and a half times the mean. Three ways take turns:

    reference    two passes over padded rows (two_pass_reference.py)
    padded       one pass over the same rows; left out where they don't fit into memory
    ours         one pass over one packed sequence

The reference's micro-batches hold what fits into `--reference-tokens`, padding included. Peak
memory is that of one step above what the process has before it, each way in a process of its own:
gradients are in it, weights are not. Ratios are reference / ours, from the medians of the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder
from two_pass_reference import padded_length, padded_single_pass_step, two_pass_step

from steerlm2.data.packing import Group, pack
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.losses import SteerLM2Loss
from steerlm2.training.forward import response_logps

VOCABULARY = 8192
PADDED_TOKENS_IN_MEMORY = 16_384
"""One pass over padded rows keeps the activations of a whole group."""
GRADIENT_TOLERANCE = 1e-3
WAYS = ("reference", "padded", "ours")
CPU = World(torch.device("cpu"))


def small_llama() -> TransformerDecoder:
    """33.6M parameters, 4.2M of them embeddings and as many the output matrix."""
    torch.manual_seed(0)
    return llama3(
        vocab_size=VOCABULARY,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        embed_dim=512,
        intermediate_dim=1536,
        max_seq_len=4096,
        rope_base=10_000,
    )


def ours_of(model: TransformerDecoder) -> TransformerDecoder:
    """A copy of the model as our recipes lay it out."""
    ours = copy.deepcopy(model)
    parallelize(ours, CPU, dtype=torch.float32)
    return ours


@dataclass(frozen=True)
class Cell:
    n: int
    prompt: int
    response: int

    def group(self, vocabulary: int = VOCABULARY) -> Group:
        """Random tokens and target weights."""
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> list[int]:
            return torch.randint(vocabulary, (count,), generator=generator).tolist()

        quantiles = [(i + 0.5) / self.n for i in range(self.n)]
        lengths = [round(self.response * (0.5 + quantile)) for quantile in quantiles]
        return Group(
            tokens(self.prompt),
            [tokens(length) for length in lengths],
            log_q=[0.0] * self.n,
            weights=torch.randn(self.n, generator=generator).softmax(dim=0).tolist(),
        )


GRID = [Cell(n, p, r) for r in (64, 256) for p in (64, 256, 1024) for n in (2, 4, 10, 32)]


@torch.no_grad()
def with_own_log_q(model: TransformerDecoder, group: Group) -> Group:
    """The model as its own proposal, up to half a nat, so that no b' is 0 or 1."""
    log_q_N = response_logps(model, pack([group]), CPU)
    noise_N = torch.randn(len(log_q_N), generator=torch.Generator().manual_seed(1)) / 2
    return Group(
        group.prompt, group.responses, log_q=(log_q_N + noise_N).tolist(), weights=group.weights
    )


def our_step(model: TransformerDecoder, group: Group) -> None:
    """What recipes/steerlm2_distributed.py does with a micro-batch, up to the gradients."""
    batch = pack([group])
    assert batch.log_q_N is not None
    assert batch.w_N is not None
    logps_N = response_logps(model, batch, CPU)
    leaf_N = logps_N.detach().requires_grad_()
    loss = SteerLM2Loss()(leaf_N, batch.log_q_N, batch.w_N, batch.sizes_G, batch.response_lengths_N)
    logps_N.backward(torch.autograd.grad(loss, leaf_N)[0])


@dataclass
class Way:
    """A step, and a model of its own with the same weights."""

    model: TransformerDecoder
    step: Callable[[TransformerDecoder, Group], None]

    def __call__(self, group: Group) -> None:
        self.model.zero_grad(set_to_none=True)
        self.step(self.model, group)


def ways_of(model: TransformerDecoder, reference_tokens: int) -> dict[str, Way]:
    return {
        "reference": Way(
            copy.deepcopy(model),
            lambda model, group: two_pass_step(model, [group], reference_tokens),
        ),
        "padded": Way(
            copy.deepcopy(model), lambda model, group: padded_single_pass_step(model, [group])
        ),
        "ours": Way(ours_of(model), our_step),
    }


def fits(name: str, group: Group) -> bool:
    """Whether the activations of the way's micro-batch fit into memory."""
    return (
        name != "padded" or len(group.responses) * padded_length([group]) <= PADDED_TOKENS_IN_MEMORY
    )


def gradient_error(model: TransformerDecoder, reference: TransformerDecoder) -> float:
    """The largest difference of a parameter's gradient, relative to the norm of the reference's."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    errors = []
    for own, theirs in pairs:
        assert own.grad is not None
        assert theirs.grad is not None
        errors.append(((own.grad - theirs.grad).norm() / theirs.grad.norm()).item())
    return max(errors)


def measure(ways: dict[str, Way], group: Group, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and its gradients against the reference's."""
    group = with_own_log_q(ways["ours"].model, group)
    found: dict[str, Any] = {}
    cpu: dict[str, list[float]] = {name: [] for name in ways if fits(name, group)}
    wall: dict[str, list[float]] = {name: [] for name in cpu}
    for _ in range(rounds):
        for name in cpu:
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            ways[name](group)
            cpu[name].append(time.process_time() - cpu_start)
            wall[name].append(time.perf_counter() - wall_start)
    for name in cpu:
        found[f"{name}_cpu_seconds"] = statistics.median(cpu[name])
        found[f"{name}_wall_seconds"] = statistics.median(wall[name])
    reference = ways["reference"].model
    found["grad_relative_error"] = gradient_error(ways["ours"].model, reference)
    found["cpu_time_ratio"] = found["reference_cpu_seconds"] / found["ours_cpu_seconds"]
    found["wall_time_ratio"] = found["reference_wall_seconds"] / found["ours_wall_seconds"]
    if "padded" in cpu:
        found["padded_cpu_time_ratio"] = (
            found["reference_cpu_seconds"] / found["padded_cpu_seconds"]
        )
        found["padded_grad_relative_error"] = gradient_error(ways["padded"].model, reference)
    worst = max(found["grad_relative_error"], found.get("padded_grad_relative_error", 0))
    assert worst <= GRADIENT_TOLERANCE, f"the gradients differ by {worst:.2g}"
    return found


def peak_bytes(way: str, cell: Cell, threads: int, reference_tokens: int) -> int:
    """Peak memory of one step above what the process held before, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", way, "--threads", str(threads)]
    command += ["--n", str(cell.n), "--prompt", str(cell.prompt), "--response", str(cell.response)]
    command += ["--reference-tokens", str(reference_tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_bytes(step: Way, group: Group) -> None:
    before = resident_bytes("VmRSS")
    step(group)
    print(resident_bytes("VmHWM") - before)


def resident_bytes(key: str) -> int:
    """Of this process, now (VmRSS) or at most so far (VmHWM); Linux has both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def plot(cells: list[dict[str, Any]], path: Path) -> None:
    """CPU time ratio over n, a line for each prompt length, a panel for each response length."""
    responses = sorted({cell["response"] for cell in cells})
    figure, axes = plt.subplots(
        1, len(responses), figsize=(5 * len(responses), 4), sharey=True, squeeze=False
    )
    for axis, response in zip(axes[0], responses, strict=True):
        for prompt in sorted({cell["prompt"] for cell in cells}):
            line = [c for c in cells if (c["prompt"], c["response"]) == (prompt, response)]
            xs, ys = [c["n"] for c in line], [c["cpu_time_ratio"] for c in line]
            axis.plot(xs, ys, marker="o", label=f"prompt {prompt}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"responses of {response} tokens (mean)", xlabel="n", xscale="log")
        numbers = sorted({cell["n"] for cell in cells})
        axis.set_xticks(numbers, [str(n) for n in numbers])
        axis.minorticks_off()
        axis.legend()
    axes[0][0].set_ylabel("CPU time, two-pass reference / ours")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| n | prompt | response | CPU time | wall time | padded single pass, CPU | memory | "
        "gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        padded = cell.get("padded_cpu_time_ratio")
        lines.append(
            f"| {cell['n']} | {cell['prompt']} | {cell['response']} "
            f"| {cell['cpu_time_ratio']:.2f} | {cell['wall_time_ratio']:.2f} "
            f"| {f'{padded:.2f}' if padded else '-'} "
            f"| {cell.get('peak_memory_ratio', float('nan')):.2f} "
            f"| {cell['grad_relative_error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10, help="responses")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens, on average")
    parser.add_argument("--grid", action="store_true", help="all cells instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reference-tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG of the grid")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = GRID if args.grid else [Cell(args.n, args.prompt, args.response)]
    ways = ways_of(small_llama(), args.reference_tokens)
    if args.memory_of:
        print_peak_bytes(ways[args.memory_of], cells[0].group())
        return
    measure(ways, Cell(2, 32, 32).group(), rounds=1)  # warm up
    results = []
    for cell in cells:
        result = vars(cell) | measure(ways, cell.group(), args.rounds)
        if not args.no_memory:
            for way in ("reference", "ours"):
                result[f"{way}_peak_bytes"] = peak_bytes(
                    way, cell, args.threads, args.reference_tokens
                )
            result["peak_memory_ratio"] = result["reference_peak_bytes"] / result["ours_peak_bytes"]
        results.append(result)
        print(table([result]).splitlines()[-1], file=sys.stderr)
    print(table(results))
    if args.json:
        made = {
            "threads": args.threads,
            "rounds": args.rounds,
            "reference_tokens": args.reference_tokens,
            "torch": torch.__version__,
        }
        whole = made | ({"cells": results} if args.grid else results[0])
        args.json.write_text(json.dumps(whole, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
