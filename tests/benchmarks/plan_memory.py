"""Planned against measured memory on a GPU: the allocator's peak in a recipe's real training.

    python tests/benchmarks/plan_memory.py                    # one GPU, fresh weights, no download
    python tests/benchmarks/plan_memory.py --processes 8

Each row is a run of tests/planning/measured_step.py. The model is Llama 3.2 1B's shape with the
tiny tokenizer's vocabulary; the synthetic data fills micro-batches up to the token budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "planning" / "measured_step.py"
MODEL = (
    *("model.embed_dim=2048", "model.num_layers=16", "model.num_heads=32"),
    *("model.num_kv_heads=8", "model.intermediate_dim=8192"),
)
STEPS = (
    *("max_steps=2", "lr_scheduler.warmup_steps=0", "dataset.num_records=1600"),
    *("dataset_val=null", "val_every_n_steps=null", "save_every_n_steps=null", "device=cuda"),
    *("global_batch_size=512", "dtype=bf16", "param_dtype=fp32", "optimizer.fused=true"),
)
BUDGET = 8192
RUNS = {
    "SteerLM 2.0": (
        *("steerlm2_distributed", "tiny/steerlm2", "generation=null"),
        f"steerlm2.max_tokens_per_microbatch={BUDGET}",
    ),
    "SteerLM 2.0, checkpointing": (
        *("steerlm2_distributed", "tiny/steerlm2", "generation=null"),
        *(f"steerlm2.max_tokens_per_microbatch={BUDGET}", "enable_activation_checkpointing=true"),
    ),
    "SFT": (
        *("sft_distributed", "tiny/sft", "generation=null"),
        f"max_tokens_per_microbatch={BUDGET}",
    ),
    "attribute model": (
        *("reward_distributed", "tiny/reward"),
        f"max_tokens_per_microbatch={BUDGET}",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    processes = parser.parse_args().processes
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    print("| | measured GiB | planned GiB | ratio |\n|---|---|---|---|")
    for name, (recipe, config, *overrides) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            subprocess.run(
                [
                    *(sys.executable, *launcher, SCRIPT, recipe, config, result),
                    *(*MODEL, *STEPS, *overrides, f"output_dir={folder}/run"),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found = json.loads(result.read_text())
        measured, planned = found["measured"], sum(found["planned"].values())
        print(
            f"| {name} | {measured / 2**30:.2f} | {planned / 2**30:.2f} | "
            f"{planned / measured:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
