"""Plans a training run's memory and time, without GPUs and weights.

    tune run plan_memory --config llama3_1/70B_steerlm2_multinode world_size=256 gpu=H100

takes any config of steerlm2_distributed, sft_distributed or reward_distributed, with their keys and
its own. The model is built on the meta device, laid out by the recipes' own function over a fake
process group, and a step of it runs with fake tensors: operations and collectives are real, data is
not. For 70B that takes half a minute to three minutes of a CPU core, and under a GiB of memory.

Memory is counted, time is estimated: from the counted FLOPs and bytes, the card's data sheet, and
the efficiencies below. compile is off in the trace, so a compiled run takes less memory than this.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig

from steerlm2._tune import RECIPES, recipe_directories
from steerlm2.config.keys import above_zero, at_least_one
from steerlm2.config.loader import CONFIG_CLASS, REST, config_problems, load_config, load_recipe
from steerlm2.distributed.world import mesh_shape
from steerlm2.planning.advice import Change, changes
from steerlm2.planning.estimate import (
    PAPER_NODE_HOURS,
    Cluster,
    Iteration,
    StepTime,
    collectives,
    iteration_hours,
    needed_flops,
    step_time,
)
from steerlm2.planning.gpus import find_gpu
from steerlm2.planning.jobs import (
    JOBS,
    Job,
    Lengths,
    PlannedMicrobatch,
    planned_without_checkpoint,
)
from steerlm2.planning.trace import Trace, fake_world, trace_step
from steerlm2.planning.tracker import KINDS
from steerlm2.runs.entry import recipe_main
from steerlm2.torchtune_private import merge_arguments
from steerlm2.training.batches import steps_per_epoch

GIB = 2**30
DRAWN_STEPS = 4
"""Optimizer steps that the step time is averaged over. A choice: planning takes longer with more,
and has more spread with fewer."""

LABELS = {
    "parameters": "parameters (this GPU's shards)",
    "gradients": "gradients (shards)",
    "optimizer": "optimizer state (shards)",
    "activations": "activations, unreduced gradients",
    "logits": "logits of a chunk",
    "communication": "gathered layers, collectives",
    "other": "gradient norm and other",
    "runtime": "CUDA, NCCL, fragments (assumed)",
    "total": "total",
}


@dataclass(kw_only=True)
class PlanConfig:
    """The keys of planning; all others are those of the training recipe."""

    world_size: int
    """GPUs of the run."""
    training: dict[str, Any] = field(metadata={REST: True}, default_factory=dict)
    """Every other key: the training recipe's config."""
    recipe: str | None = None
    """The recipe whose config this is; null: found out."""
    gpu: str = "H100"
    """The card: A100 and H100 have 80 GB; A100-40GB, H200, B200, L40S, RTX4090."""
    gpu_gib: float | None = None
    """Memory of a GPU, in GiB; null: the card's."""
    gpus_per_node: int = 8
    """GPUs that NVLink connects."""
    output: str | None = None
    """A JSON file for the plan; null: none."""

    prompts: int = 20_000
    """Records of the data set: prompts, conversations, texts or pairs."""
    n: int = 10
    """Responses of a prompt, of SteerLM 2.0."""
    prompt_tokens: int = 250
    """Tokens of a prompt, in the mean."""
    response_tokens: int = 350
    """Tokens of a response, in the mean."""

    efficiency: float = 0.45
    """Share of the card's peak FLOP rate that computation reaches."""
    sampling_efficiency: float = 0.05
    """The same of a sampling engine."""
    runtime_gib: float = 4.0
    """GiB of a GPU that no tensor shows: CUDA context, NCCL's buffers, fragments."""
    suggest: bool = True
    """Try changes where the run doesn't fit."""

    def problems(self) -> list[str]:
        found = [
            *at_least_one(self, "world_size", "gpus_per_node", "prompts", "n"),
            *at_least_one(self, "prompt_tokens", "response_tokens"),
            *above_zero(self, "gpu_gib"),
        ]
        for key in ("efficiency", "sampling_efficiency"):
            if not 0 < getattr(self, key) <= 1:
                found.append(f"'{key}' must be above 0 and at most 1, got {getattr(self, key)}")
        if self.runtime_gib < 0:
            found.append(f"'runtime_gib' must not be negative, got {self.runtime_gib}")
        if self.recipe is not None and self.recipe not in JOBS:
            found.append(f"'recipe' must be one of {', '.join(JOBS)}, got {self.recipe!r}")
        try:
            find_gpu(self.gpu)
        except ValueError as error:
            found.append(f"'gpu': {error}")
        return found


@dataclass
class Plan:
    """A traced run: the memory of one of its GPUs, and the time of its steps."""

    job: Job[Any]
    cluster: Cluster
    trace: Trace
    time: StepTime
    records: list[Any]
    """Of the drawn steps."""
    micro_batches: int
    per_gpu_gib: dict[str, float]
    host_gib: float
    fits: bool


class PlanRecipe:
    """Trace -> memory -> time -> job -> suggestion."""

    def __init__(self, cfg: PlanConfig) -> None:
        self.cfg = cfg
        self.gpu = find_gpu(cfg.gpu)
        self.gpu_gib = cfg.gpu_gib or self.gpu.memory_gib
        self.started = time.perf_counter()

    def run(self) -> None:
        cfg = self.cfg
        recipe, config = training_config(cfg.training, cfg.recipe)
        if planned := planned_without_checkpoint(config):
            print(planned)
        plan = self.plan(JOBS[recipe](config), cfg.world_size)
        job_hours = self.gpu_hours(plan)
        iteration = self.iteration(plan, job_hours)
        self._print(plan, job_hours, iteration)
        suggestion = None
        if not plan.fits and cfg.suggest:
            suggestion = self.suggest(plan, config)
            print(suggestion_text(suggestion))
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds = time.perf_counter() - self.started
        print(f"\nplanned in {seconds:.0f} s and {used:.1f} GiB of this machine's memory")
        if cfg.output:
            self._write(Path(cfg.output), plan, job_hours, iteration, suggestion)

    def plan(self, job: Job[Any], world_size: int) -> Plan:
        """Trace the largest micro-batch that data could fill; estimate the time of drawn ones."""
        cfg, batch = self.cfg, job.cfg.global_batch_size
        lengths = Lengths(
            cfg.prompt_tokens,
            cfg.response_tokens,
            job.responses or cfg.n,
            job.cfg.dataset.get("max_seq_len", job.budget),
        )
        drawn = lengths.draw(DRAWN_STEPS * batch)
        records = [job.record(prompt, responses) for prompt, responses in drawn]
        with fake_world(world_size, job.cfg) as world:
            steps = [
                job.microbatches(records[start : start + batch], world.dp_size)
                for start in range(0, len(records), batch)
            ]
            largest = job.largest_microbatch(
                [each for microbatches in steps for each in microbatches]
            )
            trace = trace_step(
                job,
                largest.records,
                world,
                accumulates=max(num_backwards(microbatches) for microbatches in steps) > 1,
            )
        shape = mesh_shape(
            world_size,
            job.cfg.data_parallel_replicate_dim,
            job.cfg.data_parallel_shard_dim,
            job.cfg.tensor_parallel_dim,
        )
        cluster = Cluster(self.gpu, cfg.gpus_per_node, *shape)
        offload = job.cfg.fsdp_cpu_offload
        seconds = step_time(
            trace,
            steps,
            cluster,
            job.dtype,
            cfg.efficiency,
            cpu_offload=offload,
            reduce_every_microbatch=job.cfg.fsdp_reduce_every_microbatch,
        )
        gib: dict[str, float] = {kind: trace.peak.get(kind, 0) / GIB for kind in KINDS}
        host_gib = 0.0
        if offload:  # the trace leaves the shards on the GPU
            host_gib = sum(trace.state.values()) / GIB
            gib |= dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0)
        gib["runtime"] = cfg.runtime_gib
        gib["total"] = sum(gib.values())
        return Plan(
            job=job,
            cluster=cluster,
            trace=trace,
            time=seconds,
            records=records,
            micro_batches=max(num_backwards(microbatches) for microbatches in steps),
            per_gpu_gib=gib,
            host_gib=host_gib,
            fits=gib["total"] <= self.gpu_gib,
        )

    def gpu_hours(self, plan: Plan) -> float:
        """Hours of the whole training, without validation and checkpoints."""
        return self.num_steps(plan) * plan.time.seconds * plan.cluster.num_gpus / 3600

    def num_steps(self, plan: Plan) -> int:
        cfg = plan.job.cfg
        in_epoch = steps_per_epoch(self.cfg.prompts, cfg.global_batch_size)
        limits = [cfg.max_steps, cfg.epochs and cfg.epochs * in_epoch]
        return min(limit for limit in limits if limit is not None)

    def iteration(self, plan: Plan, training_hours: float) -> Iteration | None:
        """GPU-hours of an iteration of SteerLM 2.0: sampling, scoring and training."""
        if plan.job.recipe != "steerlm2_distributed":
            return None
        cfg = self.cfg
        packed = sum(group.num_tokens for group in plan.records) / len(plan.records)
        return iteration_hours(
            plan.trace,
            plan.cluster,
            plan.job.dtype,
            cfg.efficiency,
            num_parameters=sum(p.numel() for p in plan.job.build().parameters()),
            sampling_efficiency=cfg.sampling_efficiency,
            sampled_tokens=cfg.prompts * cfg.n * cfg.response_tokens,
            packed_tokens=cfg.prompts * packed,
            training=training_hours,
        )

    def suggest(self, plan: Plan, config: Any) -> tuple[Change, Plan] | None:
        """The cheapest change with which the run fits."""
        state = sum(plan.per_gpu_gib[kind] for kind in ("parameters", "gradients", "optimizer"))
        for change in changes(plan.job, self.cfg.gpus_per_node):
            if not change.shrinks_state and state + self.cfg.runtime_gib > self.gpu_gib:
                continue
            world_size = self.cfg.world_size * change.more_gpus
            values = with_overrides(self.cfg.training, change.overrides)
            print(f"trying {text_of(change, world_size)}", flush=True)
            try:
                changed = load_config(type(config), values)
                tried = self.plan(JOBS[plan.job.recipe](changed), world_size)
            except ValueError:
                continue  # the parallel dimensions don't fit each other
            if tried.fits:
                return change, tried
        return None

    # Helpers

    def _print(self, plan: Plan, job_hours: float, iteration: Iteration | None) -> None:
        cfg, job, cluster, seconds = self.cfg, plan.job, plan.cluster, plan.time
        print(
            f"{job.recipe} on {cluster.num_gpus} x {self.gpu.name}: replicas {cluster.replicate}, "
            f"FSDP2 over {cluster.shard}, tensor parallel over {cluster.tp}\n\n"
            f"memory of a GPU in GiB, in a micro-batch of {plan.trace.tokens} tokens "
            f"({plan.micro_batches} a step):"
        )
        for kind, gib in plan.per_gpu_gib.items():
            print(f"  {LABELS[kind]:<36}{gib:>8.2f}")
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        print(f"  {'of ' + self.gpu.name:<36}{self.gpu_gib:>8.2f}  {verdict}")
        if plan.host_gib:
            print(f"  {'on the host, for each GPU':<36}{plan.host_gib:>8.2f}")
        if job.cfg.compile:
            print("  (compile is off in the trace; compiled layers keep less)")

        print("\ncollectives of a micro-batch and its update, by mesh dimension:")
        for row in collectives(plan.trace):
            print(
                f"  {row['dimension']:<13}{row['operation']:<15}{row['count']:>6} x"
                f"{row['gib']:>10.3f} GiB, of which a GPU sends {row['sent_gib']:.3f}"
            )

        executed, needed, mfu = self._flops(plan)
        print(
            f"\na step of {job.cfg.global_batch_size} {job.record_name}, "
            f"{seconds.tokens:.0f} tokens:\n"
            f"  FLOPs, all GPUs      {executed:.3g} as traced, recomputed and waiting ranks' too\n"
            f"                       {needed:.3g} needed (by formula)\n"
            f"  seconds              {seconds.seconds:.2f}: computation {seconds.compute:.2f} (at "
            f"{cfg.efficiency:.0%} of the peak rate),\n"
            f"                       tensor parallel {seconds.tensor_parallel:.2f}, FSDP2 not "
            f"hidden {seconds.data_parallel:.2f}, update {seconds.update:.2f}\n"
            f"  tokens per second    {seconds.tokens / seconds.seconds:.0f}\n"
            f"  needed FLOPs / peak  {mfu:.1%}"
        )
        print(
            f"\nthe training: {self.num_steps(plan)} steps, "
            f"{self.num_steps(plan) * seconds.seconds / 3600:.1f} hours, {job_hours:.0f} GPU-hours"
        )
        if iteration:
            print(
                f"an iteration of SteerLM 2.0 ({cfg.prompts} prompts, n={cfg.n}): sampling "
                f"{iteration.sampling:.0f} (at {cfg.sampling_efficiency:.0%} of the peak), "
                f"scoring {iteration.scoring:.0f}, training {iteration.training:.0f}:\n"
                f"  {iteration.total:.0f} GPU-hours, {iteration.total / 8:.0f} node-hours; the "
                f"HelpSteer2 paper's two iterations took {PAPER_NODE_HOURS} H100 node-hours,\n"
                "  most of them for generation that wasn't optimised"
            )

    def _flops(self, plan: Plan) -> tuple[float, float, float]:
        """FLOPs of a step on all GPUs: executed, needed, and needed as a share of the peak."""
        cfg, cluster = self.cfg, plan.cluster
        rate = self.gpu.flops(plan.job.dtype)
        executed = plan.time.compute * rate * cfg.efficiency * cluster.num_gpus
        needed = needed_flops(plan.job.build(), plan.records) / DRAWN_STEPS
        return executed, needed, needed / (plan.time.seconds * rate * cluster.num_gpus)

    def _write(
        self,
        path: Path,
        plan: Plan,
        job_hours: float,
        iteration: Iteration | None,
        suggestion: tuple[Change, Plan] | None,
    ) -> None:
        cluster, seconds = plan.cluster, plan.time
        executed, needed, mfu = self._flops(plan)
        values: dict[str, Any] = {
            "recipe": plan.job.recipe,
            "world_size": cluster.num_gpus,
            "data_parallel_replicate_dim": cluster.replicate,
            "data_parallel_shard_dim": cluster.shard,
            "tensor_parallel_dim": cluster.tp,
            "gpu": self.gpu.name,
            "gpu_gib": self.gpu_gib,
            "per_gpu_gib": plan.per_gpu_gib,
            "host_gib_per_gpu": plan.host_gib,
            "fits": plan.fits,
            "tokens_of_traced_microbatch": plan.trace.tokens,
            "microbatches": plan.micro_batches,
            "collectives": collectives(plan.trace),
            "flops": {"executed": executed, "needed": needed, "needed_of_peak": mfu},
            "efficiency": self.cfg.efficiency,
            "step_seconds": seconds.seconds,
            "step_seconds_of": vars(seconds),
            "tokens_per_second": seconds.tokens / seconds.seconds,
            "steps": self.num_steps(plan),
            "gpu_hours": job_hours,
        }
        if iteration:
            values["iteration_gpu_hours"] = vars(iteration) | {"total": iteration.total}
        if suggestion:
            change, tried = suggestion
            values["suggestion"] = {
                "overrides": list(change.overrides),
                "world_size": tried.cluster.num_gpus,
                "price": change.price,
                "per_gpu_gib": tried.per_gpu_gib,
                "step_seconds": tried.time.seconds,
            }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")
        print(f"written to {path}")


def training_config(values: Mapping[str, Any], recipe: str | None) -> tuple[str, Any]:
    """The training recipe that a config is of, and the checked config.

    Raises:
        ValueError: where it is of none of them, or could be of several.
    """
    given = cast(dict[str, Any], filled_in(values))
    names = [recipe] if recipe else [named_recipe(sys.argv)] if named_recipe(sys.argv) else JOBS
    mains = {name: recipe_main_of(name) for name in names if name}
    problems = {name: config_problems(main, given) for name, main in mains.items()}
    nearest = min(problems, key=lambda name: len(problems[name]))
    if problems[nearest]:
        raise ValueError(
            f"the config is none of {', '.join(JOBS)}; it is nearest to {nearest}, with problems:"
            + "".join(f"\n  - {problem}" for problem in problems[nearest])
            if len(mains) > 1
            else "the config has problems:\n  - " + "\n  - ".join(problems[nearest])
        )
    fitting = [name for name, found in problems.items() if not found]
    if len(fitting) > 1:
        raise ValueError(
            f"the config could be of {' and of '.join(fitting)}: add recipe={fitting[0]}"
        )
    return nearest, load_config(getattr(mains[nearest], CONFIG_CLASS), given)


def named_recipe(arguments: list[str]) -> str | None:
    """The training recipe whose ready-made config the command line names.

    Raises:
        ValueError: where it is a ready-made config of a recipe that isn't one of training.
    """
    if "--config" not in arguments[:-1]:
        return None
    path = Path(arguments[arguments.index("--config") + 1]).resolve()
    for recipe, configs in RECIPES.items():
        for config in configs:
            if path == recipe_directories()[1] / f"{config}.yaml":
                if recipe not in JOBS:
                    raise ValueError(
                        f"{config} is a config of {recipe}: plan_memory takes those of "
                        f"{', '.join(JOBS)}"
                    )
                return recipe
    return None


def recipe_main_of(name: str) -> Any:
    """The `main` of a ready-made recipe."""
    return load_recipe(recipe_directories()[0] / f"{name}.py").main


def filled_in(value: Any) -> Any:
    """Fill in values that a config leaves to the command line, such as paths of data."""
    if isinstance(value, Mapping):
        return {key: filled_in(item) for key, item in value.items()}
    return "left_open" if value == "???" else value


def with_overrides(values: Mapping[str, Any], overrides: tuple[str, ...]) -> DictConfig:
    plain = json.loads(json.dumps(filled_in(values)))
    return merge_arguments(plain, overrides)


def num_backwards(microbatches: list[list[PlannedMicrobatch[Any]]]) -> int:
    return sum(ranks[0].trains for ranks in microbatches)


def text_of(change: Change, world_size: int) -> str:
    return " ".join(change.overrides) or f"world_size={world_size}"


def suggestion_text(suggestion: tuple[Change, Plan] | None) -> str:
    if suggestion is None:
        return "\nnone of the changes alone makes it fit: combine them, or take more GPUs"
    change, tried = suggestion
    return (
        f"\nthe cheapest change that fits: {text_of(change, tried.cluster.num_gpus)}\n"
        f"  ({change.price}; {tried.per_gpu_gib['total']:.1f} GiB a GPU, "
        f"{tried.time.seconds:.2f} s a step)"
    )


@recipe_main(PlanConfig)
def main(cfg: PlanConfig) -> None:
    torch.manual_seed(0)
    PlanRecipe(cfg).run()


if __name__ == "__main__":
    main()
