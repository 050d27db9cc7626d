"""Peak memory of the log-prob layer, forward and backward, against full float32 logits.

    python tests/benchmarks/logprob_memory.py --vocabulary 128256 --tokens 8192 --json FILE

Bytes above what exists before: hidden states, output matrix and its gradient, which both ways have.
`full` keeps the logits and their log-softmax, `ours` one chunk. `full_logits_bytes` is the size of
the logits alone. Each way runs in a process of its own. Also the seconds of each, and the largest
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlm2.logprobs import token_logps


def full_logps(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    logits_RV = (hidden_RD @ weight_VD.t()).float()
    return logits_RV.log_softmax(dim=1).gather(1, targets_R[:, None]).squeeze(1)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full": full_logps,
    "ours": token_logps,
}


def resident_bytes(key: str) -> int:
    """Of this process, now (VmRSS) or at most so far (VmHWM); Linux has both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    hidden_RD = torch.randn(args.tokens, args.hidden).to(dtype).requires_grad_()
    weight_VD = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).to(dtype)
    weight_VD.requires_grad_().grad = torch.zeros_like(weight_VD)
    hidden_RD.grad = torch.zeros_like(hidden_RD)
    targets_R = torch.randint(args.vocabulary, (args.tokens,))
    small = hidden_RD[:1].detach(), weight_VD[:1].detach(), targets_R[:1] * 0
    WAYS[way](*small)  # what the libraries set up at their first use

    before, started = resident_bytes("VmRSS"), time.process_time()
    logps_R = WAYS[way](hidden_RD, weight_VD, targets_R)
    logps_R.sum().backward()
    return {
        "peak_bytes": resident_bytes("VmHWM") - before,
        "cpu_seconds": time.process_time() - started,
        "logp": logps_R.detach().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    logits_bytes = args.tokens * args.vocabulary * 4
    result: dict[str, Any] = {
        "vocabulary": args.vocabulary,
        "tokens": args.tokens,
        "hidden": args.hidden,
        "dtype": args.dtype,
        "full_logits_bytes": logits_bytes,
    }
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result |= {f"{way}_{key}": value for key, value in json.loads(done.stdout).items()}
    result["peak_to_full_logits"] = result["ours_peak_bytes"] / logits_bytes
    print("| | peak MB | of the logits' | CPU seconds | mean log-prob |\n|---|---|---|---|---|")
    for way in WAYS:
        peak = result[f"{way}_peak_bytes"]
        print(
            f"| {way} | {peak / 1e6:.0f} | 1 / {logits_bytes / peak:.1f} "
            f"| {result[f'{way}_cpu_seconds']:.1f} | {result[f'{way}_logp']:.5f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
