"""Five-fold cross-validation of a tiny attribute model on real Open Assistant trees.

    python tests/benchmarks/oasst_cross_validation.py oasst2_trees.jsonl.gz [key=value ...]

A tree is in one fold as a whole. Each fold is predicted by a two-layer model that was trained from
scratch, with the settings of tiny/reward and the overrides, on the other four, to the last step:
nothing is chosen by the fold that is predicted. Printed are mean and standard deviation over folds
of the error and the correlations of every attribute, next to the error of always predicting the
mean of the training labels.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from steerlm2.data.conversations import conversation_to_json
from steerlm2.data.jsonl import json_line
from steerlm2.data.sources.oasst import OASST_ATTRIBUTES, oasst_conversations

FOLDS = 5
SETTINGS = (
    f"schema.names=[{','.join(OASST_ATTRIBUTES)}]",
    "dataset=steerlm2.datasets.attribute_dataset",
    "dataset.max_seq_len=1024",
    "dataset_val=steerlm2.datasets.attribute_dataset",
    "dataset_val.max_seq_len=1024",
    *(f"~{name}.{key}" for name in ("dataset", "dataset_val")
      for key in ("num_records", "responses_per_prompt", "split")),
    "reward_attribute=quality",
    "max_tokens_per_microbatch=2048",
    "max_steps=100",
    "lr=5e-4",
    "export=last",
    "val_every_n_steps=100",
    "save_every_n_steps=null",
)  # fmt: skip


def main(source: str, *overrides: str) -> None:
    trees = [
        [json_line(conversation_to_json(each)) for each in unit.conversations]
        for unit in oasst_conversations(source)
    ]
    random.Random(0).shuffle(trees)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for fold in range(FOLDS):
            rows.append(train_and_predict(trees, fold, Path(folder), overrides))
            print(f"fold {fold}: {rows[-1]}", flush=True)
    print(f"\n{'':<34}{'mean':>9}{'std':>9}")
    for key in rows[0]:
        values = [row[key] for row in rows if key in row]
        print(f"{key:<34}{statistics.mean(values):>9.3f}{statistics.stdev(values):>9.3f}")


def train_and_predict(
    trees: list[list[bytes]], fold: int, folder: Path, overrides: tuple[str, ...]
) -> dict[str, float]:
    """The validation metrics of one fold."""
    files = {"dataset": folder / "train.jsonl", "dataset_val": folder / "val.jsonl"}
    for name, file in files.items():
        chosen = [t for i, t in enumerate(trees) if (i % FOLDS == fold) == (name == "dataset_val")]
        file.write_bytes(b"".join(line for tree in chosen for line in tree))
    output_dir = folder / f"fold{fold}"
    run = subprocess.run(
        [
            Path(sys.executable).with_name("tune"),
            *("run", "reward_distributed", "--config", "tiny/reward"),
            *SETTINGS,
            *(f"{name}.source={file}" for name, file in files.items()),
            f"output_dir={output_dir}",
            *overrides,
        ],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "val_loss" in row][-1]
    return {k.removeprefix("val_"): round(v, 4) for k, v in last.items() if k != "step"}


if __name__ == "__main__":
    main(*sys.argv[1:])
