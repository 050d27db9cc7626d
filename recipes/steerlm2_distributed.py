"""SteerLM 2.0 training: make a model's relative probabilities of n answers match target weights.

For every prompt x with a wanted label a and n sampled answers y_i,

    w'_i = softmax_i(log P(a|x,y_i) + log P(y_i|x) - log Q'(y_i|a,x))    fixed, from the data
    b'_i = softmax_i(log Q_theta(y_i|a,x) - log Q'(y_i|a,x))             the model being trained

and the loss is the mean over prompts of KL(w' || b') / mean answer length (HelpSteer2 paper,
section 4.5, and NeMo-Aligner; `steerlm2/losses.py` has the arithmetic).

    tune run steerlm2_distributed --config tiny/steerlm2
    tune run --nproc_per_node 8 steerlm2_distributed --config llama3_1/8B_steerlm2 lr=2e-7

One file for every world size: alone it is one process on a CPU or GPU, under torchrun arguments
FSDP2 x tensor parallel with replicas.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import DummyProfiler
from tqdm import tqdm

from steerlm2.attributes import parse_label
from steerlm2.checkpoints.training_state import StateWriter, resume_training
from steerlm2.checkpoints.weights import (
    check_context,
    check_vocabulary,
    load_weights,
    open_checkpointer,
    save_weights,
)
from steerlm2.config.loader import Component, as_yaml, instantiate, takes
from steerlm2.data.packing import Group, PackedRow, Targets, pack, targets_of
from steerlm2.data.records import Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import encode_prompt
from steerlm2.datasets import SteerLM2Dataset, with_log_probs
from steerlm2.distributed.parallelize import (
    DTYPES,
    ActivationCheckpointing,
    check_finite,
    clip_gradients,
    parallelize,
    reduce_gradients,
)
from steerlm2.distributed.world import init_world
from steerlm2.inference.engines import response_end
from steerlm2.inference.sampling import sample_tokens
from steerlm2.losses import METRIC_NAMES, metric_sums
from steerlm2.models.llama import pair_cost
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.lock import RunLock
from steerlm2.runs.logs import LOG_FOLDER, Progress, open_rank_log
from steerlm2.runs.metrics import (
    JsonLines,
    lacks_validation,
    peak_memory_gib,
    plot_curves,
    summary_table,
)
from steerlm2.runs.output import (
    check_not_own_run,
    check_shared,
    make_output_dir,
    set_aside_earlier_run,
)
from steerlm2.runs.record import (
    describe_run,
    log_path,
    open_metric_logger,
    restarted_run,
    write_run,
)
from steerlm2.runs.stopping import StopRequest
from steerlm2.runs.stragglers import Stragglers
from steerlm2.training.batches import batch_of_step, steps_per_epoch
from steerlm2.training.float8 import (
    check_float8_device,
    float8_config_problems,
    use_float8,
)
from steerlm2.training.forward import response_logps, score_groups
from steerlm2.training.prefetch import ahead
from steerlm2.training.schedules import is_due
from steerlm2.training.step_plan import Strategy, plan_step, slices

LOGGED = ("loss", *METRIC_NAMES)


@dataclass
class SteerLM2Options:
    """The `steerlm2:` section."""

    strategy: Strategy = "auto"  # two_pass only for groups over the token budget
    max_tokens_per_microbatch: int = 4096
    micro_batch_size: int = 1  # responses of a backward of two_pass
    forward_micro_batch_size: int = 1  # responses of a no-grad forward of two_pass
    normalize: Literal["mean_response_length", "none"] = "mean_response_length"
    log_q_tolerance: float = 0.05  # nats per token between stored log Q' and the start weights
    score_with_start_model: bool = False  # log P(y|x) and log Q' from the start weights


@dataclass
class DataOptions:
    """The `data:` section."""

    sample: bool = False  # load only the max_steps * global_batch_size records that are needed
    shuffle: bool = True


@dataclass
class GenerationOptions:
    """The `generation:` section: answers sampled at every validation."""

    prompts: list[str]
    label: str | None = None
    system: str = DEFAULT_SYSTEM_PROMPT
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9

    def problems(self) -> list[str]:
        found = []
        if self.temperature < 0:
            found.append(f"'generation.temperature' must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            found.append(f"'generation.top_p' must be above 0 and at most 1, got {self.top_p}")
        if self.label is not None:
            try:
                parse_label(self.label)
            except ValueError as error:
                found.append(f"'generation.label': {error}")
        return found


@dataclass
class SteerLM2Config:
    """Every key of the recipe, with its default."""

    output_dir: str
    tokenizer: Component
    model: Component
    dataset: Component
    optimizer: Component
    lr: float | None = None  # shorthand for optimizer.lr
    template: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.data.extra_id_template")
    )
    checkpointer: Component | None = None  # none: fresh weights from the seed
    dataset_val: Component | None = None
    lr_scheduler: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.training.warmup_cosine_hold")
    )
    loss: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.losses.SteerLM2Loss")
    )
    steerlm2: SteerLM2Options = field(default_factory=SteerLM2Options)
    data: DataOptions = field(default_factory=DataOptions)
    generation: GenerationOptions | None = None

    global_batch_size: int = 128  # prompts of an optimizer step, all ranks together
    epochs: int | None = None
    max_steps: int | None = None
    clip_grad_norm: float | None = None
    seed: int = 0

    val_every_n_steps: int | None = None
    limit_val_batches: int | None = None  # in global batches
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int | None = None
    resume_from_checkpoint: bool = False
    save_adapter_weights_only: bool = False

    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["fp32", "bf16"] = "bf16"  # of the computation
    param_dtype: Literal["fp32", "bf16"] | None = None  # of the trained weights; none: `dtype`
    save_dtype: Literal["fp32", "bf16"] | None = None  # of the exported weights; none: param_dtype
    compile: bool = False
    float8: bool = False  # products of the layers in 8 bits; H100 and newer, not with adapters
    enable_activation_checkpointing: bool = False
    ac_mode: ActivationCheckpointing = "full"  # selective: outputs of matrix products are kept
    tensor_parallel_dim: int = 1
    data_parallel_replicate_dim: int = 1
    data_parallel_shard_dim: int = -1
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    fsdp_reduce_every_microbatch: bool = True  # false: once a step, from whole gradients

    metric_logger: Component | None = None
    log_every_n_steps: int = 1
    log_peak_memory_stats: bool = True
    profiler: Component | None = None
    hang_timeout_seconds: float | None = 45.0  # without progress; then the missing ranks are named
    collective_timeout_seconds: float = 3600.0  # after which a collective that hangs ends the run

    def problems(self) -> list[str]:
        """What is wrong between keys that are right by themselves."""
        found = []
        if self.epochs is None and self.max_steps is None:
            found.append("set 'epochs' or 'max_steps' (the smaller of the two ends the run)")
        if self.lr is None and "lr" not in self.optimizer:
            found.append("'lr' is missing")
        if self.lr is not None and self.optimizer.get("lr", self.lr) != self.lr:
            found.append(
                f"lr={self.lr} and optimizer.lr={self.optimizer['lr']} disagree: set only 'lr'"
            )
        taken: list[tuple[dict[str, Any], str, str]] = [
            (self.loss, "normalize", "steerlm2.normalize"),
            (self.dataset, "template", "template"),
            (self.dataset_val or {}, "template", "template"),
            (self.lr_scheduler, "num_training_steps", "max_steps and epochs"),
        ]
        for section, argument, origin in taken:
            if argument in section:
                found.append(f"'{argument}' of {section['_component_']} is taken from {origin}")
        if self.data.sample and self.max_steps is None:
            found.append("'data.sample' needs 'max_steps'")
        if self.val_every_n_steps and not (self.dataset_val or self.generation):
            found.append("'val_every_n_steps' needs 'dataset_val' or 'generation'")
        if self.generation:
            found += self.generation.problems()
        found += float8_config_problems(self)
        if self.fsdp_cpu_offload and self.device == "cpu":
            found.append("'fsdp_cpu_offload' needs 'device: cuda'")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            found.append(f"'clip_grad_norm' must be above 0, got {self.clip_grad_norm}")
        positive = {
            "global_batch_size": self.global_batch_size,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "log_every_n_steps": self.log_every_n_steps,
            "hang_timeout_seconds": self.hang_timeout_seconds,
            "collective_timeout_seconds": self.collective_timeout_seconds,
            "val_every_n_steps": self.val_every_n_steps,
            "limit_val_batches": self.limit_val_batches,
            "save_every_n_steps": self.save_every_n_steps,
            "keep_last_n_checkpoints": self.keep_last_n_checkpoints,
            "steerlm2.max_tokens_per_microbatch": self.steerlm2.max_tokens_per_microbatch,
            "steerlm2.micro_batch_size": self.steerlm2.micro_batch_size,
            "steerlm2.forward_micro_batch_size": self.steerlm2.forward_micro_batch_size,
        }
        found += [
            f"'{key}' must be at least 1, got {value}"
            for key, value in positive.items()
            if value is not None and value < 1
        ]
        return found


@dataclass(frozen=True)
class StepRows:
    """What one rank computes in one optimizer step, as rows on the host."""

    groups: list[Group]
    """Of all ranks."""
    seen: list[Group]
    """Of this rank, in the order of its log-probs."""
    two_pass: list[Group]
    forward: list[PackedRow]
    """Of the two-pass groups, for the pass without a graph."""
    slices: list[PackedRow]
    """The same for the pass with one."""
    single_pass: list[PackedRow]
    imbalance: float
    """How much more the busiest rank has to do than the average one, estimated."""


class SteerLM2Recipe:
    """The run: setup -> train (with validate and save) -> export."""

    def __init__(self, cfg: SteerLM2Config) -> None:
        self.cfg = cfg
        self.dtype = DTYPES[cfg.dtype]
        self.param_dtype = DTYPES[cfg.param_dtype or cfg.dtype]
        self.output_dir = Path(cfg.output_dir)
        self.metric_logger: Any = None
        self.lock: RunLock | None = None
        self.stopped = False  # by SIGTERM, before the last step or at it
        self.world = init_world(
            cfg.device,
            tensor_parallel_dim=cfg.tensor_parallel_dim,
            data_parallel_replicate_dim=cfg.data_parallel_replicate_dim,
            data_parallel_shard_dim=cfg.data_parallel_shard_dim,
            needs_mesh=self.param_dtype != self.dtype or cfg.fsdp_cpu_offload,
            timeout_seconds=cfg.collective_timeout_seconds,
            flight_records=self.output_dir / LOG_FOLDER,
        )
        self.watch = HangWatch(self.world, cfg.hang_timeout_seconds)
        torch.manual_seed(cfg.seed)

    def setup(self) -> None:
        cfg, world = self.cfg, self.world
        world.on_main(lambda: check_not_own_run(self.output_dir, cfg.checkpointer))
        world.on_main(lambda: make_output_dir(self.output_dir))
        self.lock = world.on_main(lambda: RunLock(self.output_dir))
        check_shared(self.output_dir, world)
        open_rank_log(self.output_dir, world)
        self.tokenizer = instantiate(cfg.tokenizer)
        self.template = instantiate(cfg.template)
        train_set = self._dataset(cfg.dataset)
        val = cfg.dataset_val if cfg.val_every_n_steps else None
        val_set = self._dataset(val) if val else None
        self.prompts = self._generation_prompts()

        self.steps_per_epoch = steps_per_epoch(len(train_set), cfg.global_batch_size)
        limits = [cfg.max_steps, cfg.epochs and cfg.epochs * self.steps_per_epoch]
        self.total_steps = min(limit for limit in limits if limit is not None)
        lr = cfg.optimizer.get("lr", cfg.lr)
        assert lr is not None
        self._schedule(torch.optim.SGD([torch.zeros(1)], lr=lr))  # its mistakes, before the model

        with torch.device("meta"):
            self.model = instantiate(cfg.model).to(self.param_dtype)
        if adapters := get_adapter_params(self.model):
            set_trainable_params(self.model, adapters)
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(self.dtype)
        elif cfg.save_adapter_weights_only:
            raise ValueError("save_adapter_weights_only needs a `model` with LoRA adapters")
        check_vocabulary(self.model, self.tokenizer)
        generated = self.cfg.generation.max_new_tokens if self.cfg.generation else 0
        longest = [data.longest() for data in (train_set, val_set) if data]
        check_context(self.model, max(*longest, *(len(p) + generated for p in self.prompts), 0))
        self.checkpointer = world.on_main(
            lambda: open_checkpointer(
                cfg.checkpointer,
                self.model,
                self.tokenizer,
                seed=cfg.seed,
                output_dir=cfg.output_dir,
            )
        )
        self.pair_cost = pair_cost(self.model)
        if cfg.float8:
            check_float8_device(world.device)
            use_float8(self.model)
        parallelize(
            self.model,
            world,
            dtype=self.dtype,
            activation_checkpointing=cfg.ac_mode if cfg.enable_activation_checkpointing else None,
            compile=cfg.compile,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        load_weights(
            self.model, self.checkpointer, world, seed=cfg.seed, cpu_offload=cfg.fsdp_cpu_offload
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.loss_fn = instantiate(cfg.loss, normalize=cfg.steerlm2.normalize)
        self.optimizer = instantiate(cfg.optimizer, self.parameters, lr=lr)
        self.lr_scheduler = self._schedule(self.optimizer)
        self.stragglers = Stragglers(self.model, world)
        self.watch.follow(self.model)

        # Q_theta is Q' only now: after a checkpoint is loaded it has moved on.
        self.train_groups = self._scored(train_set, "dataset")
        self.val_groups = self._scored(val_set, "dataset_val") if val_set else []

        self.metrics_file = JsonLines(self.output_dir / "metrics.jsonl")
        self.samples_file = JsonLines(self.output_dir / "samples.jsonl")
        self.states = StateWriter(
            self.output_dir / "checkpoints",
            world,
            keep_last_n=cfg.keep_last_n_checkpoints,
            on_complete=lambda path: log_path(self.metric_logger, "newest_checkpoint", path),
        )
        self.watch.at("start", patience=LONG)
        resume = cfg.resume_from_checkpoint or restarted_run(self.output_dir, world)
        self.first_step = self._resume() if resume else 0
        run = describe_run(cfg, world)
        if world.is_main:
            if self.first_step == 0:
                set_aside_earlier_run(self.output_dir)
            (self.output_dir / "config.yaml").write_text(as_yaml(cfg))
            write_run(self.output_dir, run)
            self.metric_logger = open_metric_logger(cfg.metric_logger, run)
        self._say(
            f"training set: {train_set.summary()}\n"
            + (f"validation set: {val_set.summary()}\n" if val_set else "")
            + f"{self.total_steps} steps of {cfg.global_batch_size} prompts, "
            f"{world.size} process(es): data parallel {world.dp_size}, "
            f"tensor parallel {world.tp_size}"
        )
        if self.first_step == 0:
            self._check_drift()

    def train(self) -> None:
        """Every optimizer step, from the groups to the log line."""
        cfg, world = self.cfg, self.world
        profiler = instantiate(cfg.profiler)[0] if cfg.profiler else DummyProfiler()
        bar = Progress(self.total_steps, self.first_step, world)
        self.model.train()
        tokens, seconds = 0, 0.0
        first = looked_at = self.first_step
        steps = range(first, self.total_steps)
        due = is_due(first, cfg.val_every_n_steps, self.total_steps)
        if due and (
            first == 0 or (self.val_groups and lacks_validation(self.metrics_file, first, world))
        ):
            self.validate(first)
        with profiler, bar, StopRequest(world) as stop, closing(self.states):
            for step, work in ahead(self._prepared, steps):
                started = time.perf_counter()
                patience = LONG if step == self.first_step else 1.0  # it may compile
                # Groups too large for one micro-batch: log Q_theta of all their responses without a
                # graph, then the gradient of the loss with respect to each.
                self.watch.at(f"step {step + 1}, pass without a graph", patience=patience)
                with torch.no_grad():
                    logps = [
                        response_logps(self.model, row.to(world.device), world)
                        for row in work.forward
                    ]
                rows: list[tuple[PackedRow, torch.Tensor | None]] = []
                if work.two_pass:
                    whole = targets_of(work.two_pass).to(world.device)
                    grad_N = self._loss_gradient(torch.cat(logps), whole, len(work.groups))
                    grads = grad_N.split([row.num_responses for row in work.slices])
                    rows += zip(work.slices, grads, strict=True)

                # All others: forward, gradient of the loss, backward.
                rows += [(row, None) for row in work.single_pass]
                for i, (row, known_grad_N) in enumerate(rows):
                    self.watch.at(f"step {step + 1}, micro-batch {i + 1}", patience=patience)
                    reduce_gradients(
                        self.model,
                        world,
                        last=i + 1 == len(rows),
                        every_time=cfg.fsdp_reduce_every_microbatch,
                    )
                    row = row.to(world.device)
                    logps_N = response_logps(self.model, row, world)
                    if known_grad_N is not None:
                        grad_N = known_grad_N
                    else:
                        grad_N = self._loss_gradient(logps_N, row, len(work.groups))
                        logps.append(logps_N.detach())
                    # FSDP2 takes the mean over the data-parallel ranks; the loss has the whole
                    # step's number of groups in it already.
                    logps_N.backward(grad_N * world.dp_size)

                done = step + 1
                self.watch.at(f"step {done}, update", patience=patience)
                grad_norm = clip_gradients(self.parameters, cfg.clip_grad_norm)
                logged = done % cfg.log_every_n_steps == 0
                validated = is_due(done, cfg.val_every_n_steps, self.total_steps)
                self.stopped = stop.asked()
                saved = self.stopped or is_due(done, cfg.save_every_n_steps, self.total_steps)
                # Looking waits for the GPU, so not at every step.
                if logged or validated or saved or done == self.total_steps:
                    check_finite(grad_norm, done, looked_at)
                    looked_at = done
                lr = float(self.optimizer.param_groups[0]["lr"])  # torchao keeps it in a tensor
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.lr_scheduler.step()
                profiler.step()

                tokens += sum(group.num_tokens for group in work.groups)
                if logged:
                    sums = world.sum(self._metric_sums(torch.cat(logps), work.seen))
                    metrics = dict(zip(LOGGED, (sums / len(work.groups)).tolist(), strict=True))
                    seconds += time.perf_counter() - started
                    metrics |= {"grad_norm": grad_norm.item(), "lr": lr}
                    metrics["rank_imbalance"] = work.imbalance
                    metrics["tokens_per_second"] = tokens / seconds
                    metrics |= self.stragglers.look(done)
                    if pause := self.states.take_pause():
                        metrics["checkpoint_pause_seconds"] = pause
                    if cfg.log_peak_memory_stats:
                        metrics["peak_memory_gib"] = peak_memory_gib(world.device)
                    self._log({"step": done, "epoch": done / self.steps_per_epoch} | metrics)
                    bar.logged(
                        done,
                        f"loss {metrics['loss']:.3g}, distance {metrics['distance']:.3g}, "
                        f"{metrics['tokens_per_second']:.0f} tokens/s",
                    )
                    tokens, seconds = 0, 0.0
                else:
                    seconds += time.perf_counter() - started
                bar.update()
                if self.stopped:  # before anything else: the time until SIGKILL may be short
                    self.save(done)
                if validated:
                    self.validate(done)
                if self.stopped:
                    break
                if saved:
                    self.save(done)
            self.watch.at("the last checkpoint", patience=LONG)
            self.states.wait()
        if self.stopped:
            self._say(
                f"SIGTERM: stopped after step {done}, which is saved; the same command with "
                "resume_from_checkpoint=true goes on from there"
            )

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Loss and distance on validation groups, and answers to a few prompts."""
        cfg, world = self.cfg, self.world
        self.watch.at(f"validation after step {step}", patience=LONG)
        self.model.eval()
        if self.val_groups:
            limit = (cfg.limit_val_batches or len(self.val_groups)) * cfg.global_batch_size
            groups = self.val_groups[:limit]
            logps = [logp for scores in self._score(groups) for logp in scores]
            logps_N = torch.tensor(logps, dtype=torch.float64, device=world.device)
            means = (self._metric_sums(logps_N, groups) / len(groups)).tolist()
            names = (f"val_{name}" for name in LOGGED)
            self._log({"step": step} | dict(zip(names, means, strict=True)))
        if cfg.generation:
            answers = sample_tokens(
                self.model,
                self.prompts,
                world,
                stop_id=response_end(self.template, self.tokenizer)[1],
                max_new_tokens=cfg.generation.max_new_tokens,
                temperature=cfg.generation.temperature,
                top_p=cfg.generation.top_p,
                seed=cfg.seed + step,
            )
            if world.is_main:
                for prompt, answer in zip(cfg.generation.prompts, answers, strict=True):
                    sample = {"step": step, "label": cfg.generation.label, "prompt": prompt}
                    self.samples_file.append(sample | {"response": self.tokenizer.decode(answer)})
        self.model.train()

    def save(self, step: int) -> None:
        """The state to continue from, `output_dir/checkpoints/step_...`."""
        self.watch.at(f"saving step {step}", patience=LONG)
        self.states.save(step, self.model, self.optimizer, {"data": self._data_state()})

    def export(self) -> None:
        """The trained weights as Hugging Face safetensors, and the run's table and plot."""
        cfg = self.cfg
        self.watch.at("export", patience=LONG)
        folder = save_weights(
            self.model,
            self.checkpointer,
            self.world,
            epoch=-(-self.total_steps // self.steps_per_epoch),
            dtype=DTYPES[cfg.save_dtype] if cfg.save_dtype else self.param_dtype,
            output_dir=self.output_dir,
            stop_id=response_end(self.template, self.tokenizer)[1],
            adapter_only=cfg.save_adapter_weights_only,
        )
        log_path(self.metric_logger, "exported_weights", folder)
        if self.world.is_main:
            rows = self.metrics_file.read()
            plot = self.output_dir / "training_curves.png"
            plot_curves(rows, ("distance", "loss"), plot)
            keys = ("distance", "loss", *METRIC_NAMES[1:], "grad_norm", "lr")
            self._say(
                f"\n{summary_table(rows, keys)}\n\nplot:    {plot}\n"
                f"metrics: {self.metrics_file.path}\nweights: {self.output_dir}/epoch_*"
            )

    def cleanup(self) -> None:
        self.watch.close()
        if self.metric_logger is not None:
            self.metric_logger.close()
        if self.lock is not None:
            self.lock.release()

    # What follows is small print that the methods above call by name.

    def _dataset(self, component: Component) -> SteerLM2Dataset:
        cfg = self.cfg
        arguments: dict[str, Any] = {"template": self.template}
        if cfg.steerlm2.score_with_start_model and takes(component, "require"):
            arguments["require"] = ("log_p_attributes",)
        if cfg.data.sample and component is cfg.dataset and cfg.max_steps:
            arguments["num_samples"] = cfg.max_steps * cfg.global_batch_size
            arguments["seed"] = cfg.seed
        return instantiate(component, self.tokenizer, **arguments)

    def _generation_prompts(self) -> list[list[int]]:
        wanted = self.cfg.generation
        if wanted is None:
            return []
        conversations = [[Turn("User", text)] for text in wanted.prompts]
        return [
            encode_prompt(self.template, self.tokenizer, wanted.system, turns, wanted.label)
            for turns in conversations
        ]

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return instantiate(self.cfg.lr_scheduler, optimizer, num_training_steps=self.total_steps)

    def _batch(self, step: int) -> list[Group]:
        cfg = self.cfg
        indices = batch_of_step(
            step, len(self.train_groups), cfg.global_batch_size, cfg.seed, cfg.data.shuffle
        )
        return [self.train_groups[i] for i in indices]

    def _prepared(self, step: int) -> StepRows:
        """What this rank computes in a step. Every rank has as many rows: those it lacks are empty,
        because under FSDP all take part in every forward and backward.
        """
        options, world = self.cfg.steerlm2, self.world
        groups = self._batch(step)
        plan = plan_step(
            groups,
            rank=world.dp_rank,
            num_ranks=world.dp_size,
            strategy=options.strategy,
            max_tokens_per_microbatch=options.max_tokens_per_microbatch,
            micro_batch_size=options.micro_batch_size,
            forward_micro_batch_size=options.forward_micro_batch_size,
            pair_cost=self.pair_cost,
        )
        forward = [[part] for part in slices(plan.two_pass, options.forward_micro_batch_size)]
        parts = [[part] for part in slices(plan.two_pass, options.micro_batch_size)]
        num_empty = plan.backward_rows - len(parts) - len(plan.single_pass)
        return StepRows(
            groups,
            seen=plan.two_pass + [g for microbatch in plan.single_pass for g in microbatch],
            two_pass=plan.two_pass,
            forward=self._rows(forward + [[]] * (plan.forward_rows - len(forward))),
            slices=self._rows(parts),
            single_pass=self._rows(plan.single_pass + [[]] * num_empty),
            imbalance=plan.imbalance,
        )

    def _rows(self, microbatches: list[list[Group]]) -> list[PackedRow]:
        return [pack(groups, multiple_of=self.world.tp_size) for groups in microbatches]

    def _score(self, groups: list[Group]) -> list[list[float]]:
        budget = self.cfg.steerlm2.max_tokens_per_microbatch
        return score_groups(self.model, groups, self.world, max_tokens_per_microbatch=budget)

    def _scored(self, dataset: SteerLM2Dataset, key: str) -> list[Group]:
        """The groups with log-probs and target weights, stored or from the start weights."""
        if self.cfg.steerlm2.score_with_start_model:
            self.watch.at("scoring with the start weights", patience=math.inf)
            log_p, log_q = self._score(dataset.without_label()), self._score(dataset.groups)
            return [
                with_log_probs(group, log_p_response=p, log_q=q)
                for group, p, q in zip(dataset.groups, log_p, log_q, strict=True)
            ]
        if any(group.weights is None for group in dataset.groups):
            raise ValueError(
                f"`{key}` has no log P(y|x) and log Q'(y|a,x): run score_responses on it, or set "
                "steerlm2.score_with_start_model=true if the start weights are both the P and the "
                "Q' of this run"
            )
        return dataset.groups

    def _loss(self, logps_N: torch.Tensor, targets: Targets) -> torch.Tensor:
        return self.loss_fn(
            logps_N,
            targets.log_q_N,
            targets.w_N,
            targets.sizes_G,
            targets.response_lengths_N,
        )

    def _loss_gradient(
        self, logps_N: torch.Tensor, targets: Targets, num_groups: int
    ) -> torch.Tensor:
        """d loss / d log Q_theta [N], the loss being the mean over all groups of the step."""
        leaf_N = logps_N.detach().requires_grad_()
        loss = self._loss(leaf_N, targets) * (len(targets.sizes_G) / num_groups)
        return torch.autograd.grad(loss, leaf_N)[0]

    def _metric_sums(self, logps_N: torch.Tensor, groups: list[Group]) -> torch.Tensor:
        """Sums over groups of the loss and of METRIC_NAMES."""
        targets = targets_of(groups).to(self.world.device)
        assert targets.log_q_N is not None
        assert targets.w_N is not None
        loss_sum = self._loss(logps_N, targets) * len(groups)
        sums = metric_sums(logps_N, targets.log_q_N, targets.w_N, targets.sizes_G)
        return torch.cat([loss_sum[None], sums])

    def _check_drift(self) -> None:
        """Before the first update Q_theta is Q': its log-probs must be the stored ones."""
        groups = self._batch(0)
        drifts = [
            abs(logp - log_q) / len(response)
            for group, logps in zip(groups, self._score(groups), strict=True)
            for logp, log_q, response in zip(logps, group.log_q or (), group.responses, strict=True)
        ]
        mean, worst = sum(drifts) / len(drifts), max(drifts)
        self._say(f"log Q' drift on the first batch: mean {mean:.2g}, max {worst:.2g} nats a token")
        tolerance = self.cfg.steerlm2.log_q_tolerance
        if not mean <= tolerance:
            raise ValueError(
                f"the start weights give log-probs that differ from the stored log(Q(y|a,x)) by "
                f"{mean:.3g} nats per token (max {worst:.3g}), more than "
                f"steerlm2.log_q_tolerance={tolerance}. Likely causes: another checkpoint, "
                "template, tokenizer or system prompt than the one that scored the data, or "
                "log-probs taken from a sampler (they are tempered, or renormalised by top-p). "
                "Score the data again with score_responses and this checkpoint."
            )

    def _data_state(self) -> dict[str, int]:
        """What the order of the batches depends on: a step's batch follows from these."""
        return {
            "groups": len(self.train_groups),
            "tokens": sum(group.num_tokens for group in self.train_groups),
            "global_batch_size": self.cfg.global_batch_size,
            "seed": self.cfg.seed,
            "shuffle": self.cfg.data.shuffle,
        }

    def _resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; returns its step."""
        folder = self.output_dir / "checkpoints"
        found = resume_training(
            folder, self.model, self.optimizer, self.lr_scheduler, self._data_state(), self.world
        )
        if found is None:
            self._say(f"no checkpoint in {folder}: starting at step 0")
            return 0
        checkpoint, step = found
        if self.world.is_main:
            self.metrics_file.keep_until(step)
            self.samples_file.keep_until(step)
        self._say(f"resumed from {checkpoint}")
        return step

    def _log(self, row: dict[str, Any]) -> None:
        if self.world.is_main:
            self.metrics_file.append(row)
            if self.metric_logger is not None:
                values = {key: value for key, value in row.items() if key != "step"}
                self.metric_logger.log_dict(values, step=row["step"])

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text)


@recipe_main(SteerLM2Config)
def main(cfg: SteerLM2Config) -> None:
    recipe = SteerLM2Recipe(cfg)
    try:
        recipe.setup()
        recipe.train()
        if not recipe.stopped:
            recipe.export()
    finally:
        recipe.cleanup()


if __name__ == "__main__":
    main()
