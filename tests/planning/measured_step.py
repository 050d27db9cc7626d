"""Trains with a real recipe and writes how much memory that took next to what planning says.

Started by torchrun, or alone: measured_step.py RECIPE CONFIG RESULT.json key=value ...

What was taken is the highest level during the recipe's own `train`. On a GPU the allocator counts
it; on a CPU one process asks the profiler, which sees kernels' workspaces too. Of several processes
the profiler misses what gloo's threads free, so there the tensors are tracked, real ones this time.
What is planned is a trace of the largest micro-batch that this rank computed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

from steerlm2.distributed.world import close_world, end_rank
from steerlm2.planning.jobs import JOBS, Job, PlannedMicrobatch
from steerlm2.planning.trace import fake_world, trace_step
from steerlm2.planning.tracker import StepTracker
from steerlm2.training.run import TrainingRun

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "tests" / "recipes")]
from ready_made import recipe_config  # noqa: E402

TRAINING = "the training"
CLASSES = {
    "steerlm2_distributed": "SteerLM2Recipe",
    "sft_distributed": "SFTRecipe",
    "reward_distributed": "RewardRecipe",
}


def highest_level(profiler: profile) -> int:
    """Bytes in use at the highest moment of the training, since the profiler began."""
    events = profiler.kineto_results.events()
    (training,) = [event for event in events if event.name() == TRAINING]
    end = training.start_ns() + training.duration_ns()
    level = highest = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        level += event.nbytes()
        if training.start_ns() <= event.start_ns() <= end:
            highest = max(highest, level)
    return highest


def microbatches_of_this_rank(job: Job[Any], recipe: Any) -> list[PlannedMicrobatch[Any]]:
    """Of the second step."""
    world = recipe.run.world
    records = [rebuilt(job, record) for record in recipe.prepare(2).records]
    return [ranks[world.dp_rank] for ranks in job.microbatches(records, world.dp_size)]


def planned(
    job: Job[Any], microbatches: list[PlannedMicrobatch[Any]], size: int
) -> dict[str, float]:
    largest = max(microbatches, key=lambda each: (each.trains, each.num_tokens))
    with fake_world(size, job.cfg) as fake:
        trace = trace_step(job, largest.records, fake, accumulates=len(microbatches) > 1)
    return dict(trace.peak)


def rebuilt(job: Job[Any], record: Any) -> Any:
    """A record of the data set as planning knows it: by its lengths."""
    if hasattr(record, "tokens"):
        start = record.target_positions[0]
        return job.record(start, [len(record.tokens) - start])
    return job.record(len(record.prompt), [len(response) for response in record.responses])


def main(name: str, config: str, result: str, *overrides: str) -> None:
    cfg = recipe_config(name, config, *overrides)
    run = TrainingRun(cfg)
    recipe = getattr(importlib.import_module(name), CLASSES[name])(cfg, run)
    on_gpu, alone = cfg.device == "cuda", run.world.size == 1
    tracker = StepTracker()
    profiler = profile(enabled=alone and not on_gpu, profile_memory=True)
    with profiler, contextlib.nullcontext() if alone or on_gpu else tracker:
        recipe.setup()
        recipe.checkpointer = None  # fresh weights: a whole model on the host
        tracker.forget_the_past()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with record_function(TRAINING):
            recipe.train()
    if on_gpu:
        measured = torch.cuda.max_memory_allocated()
    else:
        measured = highest_level(profiler) if alone else sum(tracker.at_peak().values())
    size, main_rank = run.world.size, run.world.is_main
    microbatches = microbatches_of_this_rank(JOBS[name](cfg), recipe)
    if not main_rank:
        end_rank()
    close_world()
    kinds = planned(JOBS[name](cfg), microbatches, size)
    Path(result).write_text(json.dumps({"measured": measured, "planned": kinds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
