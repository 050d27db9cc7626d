"""TRL's side of against_trl.py, run by the Python that has TRL; it imports nothing of ours.

    echo '["FOLDER", "sft", "packed", {SETTINGS}]' | python tests/benchmarks/trl_training.py

Trains the model of FOLDER/model on FOLDER/sft.json or FOLDER/reward.json, token ids that our own
data sets made, and prints what `measured` found as one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def measured(train: Callable[[], list[float]]) -> Json:
    """Losses of a training, its CPU and wall time in seconds, and its peak memory in bytes.

    CPU time is this process's, user and system. Memory is above what the process had before.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, cpu, wall = resident_bytes("VmRSS"), cpu_seconds(), time.perf_counter()
    losses = train()
    return {
        "losses": losses,
        "cpu_seconds": cpu_seconds() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_bytes": resident_bytes("VmHWM") - before,
    }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def resident_bytes(key: str) -> int:
    """Of this process, now (VmRSS) or at most so far (VmHWM); Linux has both."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def shared_arguments(settings: Json, way: str) -> Json:
    """Of TRL's configs. Where TRL has a faster setting than its default, that is taken."""
    rows = 1 if way == "packed" else min(int(way), settings["global_batch_size"])
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "num_train_epochs": 1,
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": settings["weight_decay"],
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "max_grad_norm": settings["clip_grad_norm"],
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def sft_trainer(folder: Path, records: list[Json], way: str, settings: Json, rows: int) -> Any:
    """Fine-tuning on token ids, of which TRL masks what `completion_mask` says."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = shared_arguments(settings, way)
    args = SFTConfig(
        **arguments,
        gradient_accumulation_steps=rows // arguments["per_device_train_batch_size"],
        packing=way == "packed",
        max_length=settings["packed_row"] if way == "packed" else None,
        completion_only_loss=True,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=args,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def reward_trainer(folder: Path, records: list[Json], way: str, settings: Json, rows: int) -> Any:
    """Bradley-Terry on pairs of token ids."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    arguments = shared_arguments(settings, way)
    args = RewardConfig(
        **arguments,
        gradient_accumulation_steps=rows // arguments["per_device_train_batch_size"],
        max_length=None,
    )
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "reward_model"),
        args=args,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder / "reward_model"),
    )


TRAINERS = {"sft": sft_trainer, "reward": reward_trainer}


def losses_of(trainer: Any) -> list[float]:
    """Train, and return each step's loss."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rows_of_step(records: list[Json], way: str, settings: Json) -> int:
    """Records of an optimizer step, or the packed rows that hold about as many."""
    if way != "packed":
        return int(settings["global_batch_size"])
    tokens = sum(len(record["input_ids"]) for record in records)
    steps = -(-len(records) // settings["global_batch_size"])
    return -(-tokens // (steps * settings["packed_row"]))


def train_trl(folder: Path, task: str, way: str, settings: Json) -> Json:
    """What `measured` says of a training, and the loss of its first batch before it."""
    import torch

    torch.set_num_threads(settings["threads"])
    records = json.loads((folder / f"{task}.json").read_text())
    make = TRAINERS[task]
    trainer = make(folder, records, way, settings, rows_of_step(records, way, settings))
    found = measured(lambda: losses_of(trainer))
    if way == "packed":  # its first rows hold other conversations than the first batch
        first = records[: settings["global_batch_size"]]
        trainer = make(folder, first, way, settings, rows=1_000)
        return {"step_0": losses_of(trainer)[0], **found}
    return {"step_0": found["losses"][0], **found}


def work(train: Callable[[Path, str, str, Json], Json]) -> None:
    """Trainings of one process, whose imports come once: a line of JSON in, a line of JSON out."""
    for line in sys.stdin:
        folder, task, way, settings = json.loads(line)
        print(json.dumps(train(Path(folder), task, way, settings)), flush=True)


if __name__ == "__main__":
    work(train_trl)
