"""Peak memory and time of the log-prob layer, forward and backward, against other ways.

    python tests/benchmarks/logprob_memory.py --vocabulary 128256 --tokens 8192 --json FILE
    python tests/benchmarks/logprob_memory.py --device cuda --dtype bf16 --hidden 4096

Every token's log-prob has a gradient of its own, as in the loss. The ways:

    full     keeps the logits and their log-softmax
    torch    torch.nn.functional.linear_cross_entropy, chunked (torch 2.13)
    liger    Liger's fused linear cross entropy; on a GPU, with liger-kernel installed (before
             its pull request 1298 gradients were wrong where tokens differ in theirs)
    ours     one chunk

Bytes are those above what exists before: hidden states, output matrix and their gradients, which
all ways have. `full_logits_bytes` is the size of the logits alone. Each way runs in a process of
its own, and one that fails ends no other; `gradient error` is relative to the gradient of `full`,
in float32, of a small case.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerlm2.models.logprobs import token_logps


def full_logps(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.t()).float()
    return logits_RV.log_softmax(dim=1).gather(1, targets_R[:, None]).squeeze(1)


def torch_logps(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    from torch.nn.functional import linear_cross_entropy

    options = nn.LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden_RD, weight_VD, targets_R, reduction="none", options=options)


def liger_logps(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VD, hidden_RD, targets_R)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full": full_logps,
    "torch": torch_logps,
    "liger": liger_logps,
    "ours": token_logps,
}


def runs_here(way: str, device: str) -> bool:
    if way == "torch":
        return hasattr(nn.functional, "linear_cross_entropy")  # torch 2.13
    return way != "liger" or (device == "cuda" and find_spec("liger_kernel") is not None)


def gradient_error(way: str, device: str) -> float:
    """Against `full`, 300 tokens with gradients of their own, relative to the norm."""
    torch.manual_seed(0)
    hidden_RD = torch.randn(300, 64, device=device, requires_grad=True)
    weight_VD = (torch.randn(1000, 64, device=device) / 8).requires_grad_()
    targets_R = torch.randint(1000, (300,), device=device)
    coefficient_R = torch.randn(300, device=device)

    def gradients(way: str) -> Tensor:
        loss = (WAYS[way](hidden_RD, weight_VD, targets_R) * coefficient_R).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (hidden_RD, weight_VD))])

    expected = gradients("full")
    return ((gradients(way) - expected).norm() / expected.norm()).item()


def resident_bytes(key: str) -> int:
    """Of this process, now (VmRSS) or at most so far (VmHWM); Linux has both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    error = gradient_error(way, args.device)
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    hidden_RD = torch.randn(args.tokens, args.hidden).to(args.device, dtype).requires_grad_()
    weight_VD = torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5
    weight_VD = weight_VD.to(args.device, dtype).requires_grad_()
    weight_VD.grad = torch.zeros_like(weight_VD)
    hidden_RD.grad = torch.zeros_like(hidden_RD)
    targets_R = torch.randint(args.vocabulary, (args.tokens,)).to(args.device)
    coefficient_R = torch.randn(args.tokens).to(args.device)
    on_gpu = args.device == "cuda"

    def step() -> Tensor:
        logps_R = WAYS[way](hidden_RD, weight_VD, targets_R)
        (logps_R * coefficient_R).sum().backward()
        return logps_R

    if on_gpu:
        step()  # compiles kernels
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
    started = time.perf_counter() if on_gpu else time.process_time()
    logps_R = step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() if on_gpu else time.process_time()) - started
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    return {
        "peak_bytes": peak - before,
        "seconds": seconds,
        "logp": logps_R.detach().mean().item(),
        "gradient_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logits_bytes = args.tokens * args.vocabulary * 4
    result: dict[str, Any] = {
        "vocabulary": args.vocabulary,
        "tokens": args.tokens,
        "hidden": args.hidden,
        "dtype": args.dtype,
        "device": args.device,
        "full_logits_bytes": logits_bytes,
    }
    ways = []
    for way in WAYS:
        if not runs_here(way, args.device):
            continue
        with multiprocessing.get_context("fork").Pool(1) as process:
            try:
                found = process.apply(measure, (way, args))
            except Exception as error:
                if way == "ours":
                    raise
                result[f"{way}_failure"] = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"{way} is left out: {result[f'{way}_failure']}")
                continue
        ways.append(way)
        result |= {f"{way}_{key}": value for key, value in found.items()}
    result["peak_to_full_logits"] = result["ours_peak_bytes"] / logits_bytes
    clock = "seconds" if args.device == "cuda" else "CPU seconds"
    print(f"| | peak MB | of the logits' | {clock} | mean log-prob | gradient error |")
    print("|---|---|---|---|---|---|")
    for way in ways:
        peak = result[f"{way}_peak_bytes"]
        print(
            f"| {way} | {peak / 1e6:.0f} | 1 / {logits_bytes / peak:.1f} "
            f"| {result[f'{way}_seconds']:.4g} | {result[f'{way}_logp']:.5f} "
            f"| {result[f'{way}_gradient_error']:.1e} |"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
