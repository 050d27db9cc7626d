"""What a response token costs in our training step as n, prompt and responses grow.

    python tests/benchmarks/scaling.py --json FILE

CPU milliseconds of a step (train_step.py: 33M-parameter Llama, float32) per response token and per
packed token, three series from one base of n=10, a prompt of 256 tokens and responses of 128 on
average. In n, the first should fall, because the prompt is shared by more; the second should hardly
change in any series: attention, which grows with the length, is a small part of the work. The cells
take turns; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from train_step import Cell, Way, our_step, ours_of, small_llama, with_own_log_q

BASE = Cell(n=10, prompt=256, response=128)
SERIES = {
    "n": [replace(BASE, n=n) for n in (2, 4, 8, 16, 32)],
    "prompt": [replace(BASE, prompt=prompt) for prompt in (64, 256, 1024, 2048)],
    "response": [replace(BASE, response=response) for response in (32, 128, 512)],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = Way(ours_of(small_llama()), our_step)
    cells = list(dict.fromkeys(cell for series in SERIES.values() for cell in series))
    groups = {cell: with_own_log_q(ours.model, cell.group()) for cell in cells}
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    ours(groups[cells[0]])  # warm up
    for round_ in range(args.rounds):
        for cell in cells:
            started = time.process_time()
            ours(groups[cell])
            seconds[cell].append(time.process_time() - started)
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {}
    for name, series in SERIES.items():
        print(f"\n| {name} | packed tokens | ms per response token | ms per packed token |")
        print("|---|---|---|---|")
        results[name] = []
        for cell in series:
            milliseconds = 1000 * statistics.median(seconds[cell])
            packed = groups[cell].num_tokens
            row = {
                "packed_tokens": packed,
                "ms_per_response_token": milliseconds / sum(map(len, groups[cell].responses)),
                "ms_per_packed_token": milliseconds / packed,
            }
            results[name].append(vars(cell) | row)
            values = " | ".join(f"{row[key]:.2f}" for key in list(row)[1:])
            print(f"| {getattr(cell, name)} | {packed} | {values} |")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads} | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
