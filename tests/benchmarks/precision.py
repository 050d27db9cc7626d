"""What the precision of weights and optimizer does to training at small learning rates.

    python tests/benchmarks/precision.py [--steps 40] [--json precision.json]

tiny/steerlm2 is trained from scratch and exported in bf16, as published checkpoints are. From there
each way trains it on, on the same batches, at two learning rates: one whose updates are small
against the spacing of bf16 numbers, as in runs of large models, and one whose updates aren't. Per
way: the total update of the weights against that of float32, its cosine and the ratio of the norms;
and the validation distance before and after, which says how alike the models are, not how good: the
few prompts are learned by heart. Bytes a parameter are those of the saved
state (weights and moments) and of the gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from server_process import TUNE
from torch import Tensor

TORCHAO = "optimizer._component_=torchao.optim"
WAYS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16, fp32 master weights": ("dtype=bf16", "param_dtype=fp32"),
    "bf16": ("dtype=bf16",),
    "bf16, stochastic rounding": (
        *("dtype=bf16", f"{TORCHAO}._AdamW", "optimizer.bf16_stochastic_round=true"),
    ),
    "bf16, fp32 master weights, AdamW8bit": (
        *("dtype=bf16", "param_dtype=fp32", f"{TORCHAO}.AdamW8bit"),
    ),
}
LEARNING_RATES = (1e-6, 1e-4)
START_STEPS = 60
RECORDS = 160


def train(folder: Path, *overrides: str) -> Path:
    """Runs the recipe; returns the folder of its weights."""
    command = (TUNE, "run", "steerlm2_distributed", "--config", "tiny/steerlm2", *overrides)
    done = subprocess.run(
        [*command, f"output_dir={folder}", "generation=null"],
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (weights,) = folder.glob("epoch_*")
    return weights


def flat(weights: Path) -> Tensor:
    """All weights as one vector."""
    tensors = load_file(weights / "model.safetensors")
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def saved_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("checkpoints/step_*/*.distcp"))


def measure(folder: Path, start: Path, steps: int) -> list[dict[str, object]]:
    """A row for each learning rate and way."""
    rows: list[dict[str, object]] = []
    start_P = flat(start)
    for lr in LEARNING_RATES:
        exact_P = None
        for way, overrides in WAYS.items():
            run = folder / f"{lr}_{way.replace(' ', '_')}"
            weights = train(
                run,
                "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
                *(f"checkpointer.checkpoint_dir={start}", "save_dtype=fp32"),
                *(f"lr={lr}", "lr_scheduler.warmup_steps=0", f"lr_scheduler.min_lr={lr}"),
                *(f"max_steps={steps}", f"val_every_n_steps={steps}"),
                f"save_every_n_steps={steps}",
                *(f"dataset.num_records={RECORDS}", "dataset_val.num_records=32", *overrides),
            )
            update_P = flat(weights) - start_P
            exact_P = update_P if exact_P is None else exact_P
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            distances = [line["val_distance"] for line in lines if "val_distance" in line]
            gradient = 4 if way == "fp32" or "master" in way else 2
            moved = update_P.norm() * exact_P.norm()
            rows.append(
                {
                    "lr": lr,
                    "way": way,
                    "val_distance_before": distances[0],
                    "val_distance_after": distances[-1],
                    "cosine": ((update_P @ exact_P) / moved).item() if moved else 0.0,
                    "norm_ratio": (update_P.norm() / exact_P.norm()).item(),
                    "moved_share": (update_P != 0).double().mean().item(),
                    "bytes_per_parameter": saved_bytes(run) / len(start_P) + gradient,
                }
            )
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, object]) -> str:
    return (
        f"| {row['lr']:g} | {row['way']} | {row['bytes_per_parameter']:.1f} "
        f"| {row['val_distance_before']:.4f} | {row['val_distance_after']:.4f} "
        f"| {row['cosine']:.3f} | {row['norm_ratio']:.3f} | {row['moved_share']:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = train(
            folder / "start",
            *(f"max_steps={START_STEPS}", "val_every_n_steps=null", "save_dtype=bf16"),
            *("save_every_n_steps=null", "dataset.num_records=320"),
        )
        print(
            "| LR | | bytes a parameter | distance before | after | cosine with fp32's update "
            "| norm / fp32's | weights that moved |\n|---|---|---|---|---|---|---|---|"
        )
        rows = measure(folder, start, args.steps)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
