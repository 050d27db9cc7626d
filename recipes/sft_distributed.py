"""Supervised fine-tuning, plain or attribute-conditioned: P(y|x) and Q'(y|a,x) of SteerLM.

Next-token prediction on the assistant's text and its stop token. With `dataset.use_labels=true` a
response's label stands in its prompt, and the model learns to answer under a label: the proposal
Q'(y|a,x) of SteerLM 2.0. Without, it is the P(y|x) of its target weights (HelpSteer2 paper,
section 4.5).

    tune run sft_distributed --config tiny/sft
    tune run --nproc_per_node 8 sft_distributed --config llama3_1/8B_acsft lr=5e-6

The loss is the mean over all target tokens of a step, on all ranks. One file for every world size:
alone it is one process on a CPU or GPU, under torchrun arguments FSDP2 x tensor parallel with
replicas.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import DummyProfiler
from tqdm import tqdm

from steerlm2.attributes import parse_label
from steerlm2.checkpoints.training_state import (
    StateWriter,
    best_state,
    load_best_weights,
    resume_training,
)
from steerlm2.checkpoints.weights import (
    check_context,
    check_vocabulary,
    load_weights,
    open_checkpointer,
    save_weights,
)
from steerlm2.config.loader import Component, as_yaml, instantiate
from steerlm2.data.conversations import Conversation
from steerlm2.data.packing import Dialogue, DialogueRow, pack_dialogues
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.templates import encode_prompt
from steerlm2.datasets import DialogueDataset
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
from steerlm2.models.llama import pair_cost
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.lock import RunLock
from steerlm2.runs.logs import LOG_FOLDER, Progress, open_rank_log
from steerlm2.runs.metrics import (
    JsonLines,
    answer_metrics,
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
from steerlm2.training.forward import target_logps
from steerlm2.training.prefetch import ahead
from steerlm2.training.schedules import is_due
from steerlm2.training.step_plan import rows_by_rank


@dataclass
class DataOptions:
    """The `data:` section."""

    shuffle: bool = True


@dataclass
class GenerationOptions:
    """The `generation:` section: answers sampled at every validation."""

    prompts: list[str] = field(default_factory=list)
    label: str | None = None  # of `prompts`
    system: str = DEFAULT_SYSTEM_PROMPT  # of `prompts`
    from_dataset_val: int = 0  # the first so many conversations too, each with its own label
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.9
    metrics: list[Component] = field(default_factory=list)
    # Each is called with (prompts, labels, responses), lists of one length, and gives a mapping
    # from names to numbers; they are logged as val_NAME.

    def problems(self) -> list[str]:
        found = []
        if not self.prompts and not self.from_dataset_val:
            found.append("'generation' needs 'prompts' or 'from_dataset_val'")
        if self.from_dataset_val < 0:
            found.append(f"'generation.from_dataset_val' is negative: {self.from_dataset_val}")
        if self.max_new_tokens < 1:
            found.append(
                f"'generation.max_new_tokens' must be at least 1, got {self.max_new_tokens}"
            )
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
class SFTConfig:
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
    data: DataOptions = field(default_factory=DataOptions)
    generation: GenerationOptions | None = None

    max_tokens_per_microbatch: int = 4096
    global_batch_size: int = 128  # conversations of an optimizer step, all ranks together
    epochs: int | None = None
    max_steps: int | None = None
    clip_grad_norm: float | None = None
    seed: int = 0

    val_every_n_steps: int | None = None
    limit_val_batches: int | None = None  # in global batches
    export: Literal["best", "last"] = "best"  # best: of the lowest val_loss
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
        sections = {"dataset": self.dataset, "dataset_val": self.dataset_val or Component()}
        for section, component in sections.items():
            if "template" in component:
                found.append(f"'{section}.template' is taken from 'template': set that")
        if "num_training_steps" in self.lr_scheduler:
            found.append("'lr_scheduler.num_training_steps' is taken from max_steps and epochs")
        if self.val_every_n_steps and not self.dataset_val:
            found.append("'val_every_n_steps' needs 'dataset_val'")
        if self.generation:
            found += self.generation.problems()
            if not self.val_every_n_steps:
                found.append("'generation' needs 'val_every_n_steps'")
        found += float8_config_problems(self)
        if self.fsdp_cpu_offload and self.device == "cpu":
            found.append("'fsdp_cpu_offload' needs 'device: cuda'")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            found.append(f"'clip_grad_norm' must be above 0, got {self.clip_grad_norm}")
        positive = {
            "max_tokens_per_microbatch": self.max_tokens_per_microbatch,
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
        }
        found += [
            f"'{key}' must be at least 1, got {value}"
            for key, value in positive.items()
            if value is not None and value < 1
        ]
        return found


class Question(NamedTuple):
    """A prompt to answer at validation, as people and as the model read it."""

    prompt: str
    label: str | None
    tokens: list[int]


class SFTRecipe:
    """The run: setup -> train (with validate and save) -> export."""

    def __init__(self, cfg: SFTConfig) -> None:
        self.cfg = cfg
        self.dtype = DTYPES[cfg.dtype]
        self.param_dtype = DTYPES[cfg.param_dtype or cfg.dtype]
        self.output_dir = Path(cfg.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
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
        self.train_set = self._dataset(cfg.dataset)
        val = cfg.dataset_val if cfg.val_every_n_steps else None
        self.val_set = self._dataset(val) if val else None
        self.questions = self._questions()

        self.steps_per_epoch = steps_per_epoch(len(self.train_set), cfg.global_batch_size)
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
        generated = cfg.generation.max_new_tokens if cfg.generation else 0
        longest = [data.longest() for data in (self.train_set, self.val_set) if data]
        longest += [len(question.tokens) + generated for question in self.questions]
        check_context(self.model, max(longest))
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
            self.model,
            self.checkpointer,
            world,
            seed=cfg.seed,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = instantiate(cfg.optimizer, self.parameters, lr=lr)
        self.lr_scheduler = self._schedule(self.optimizer)
        self.stragglers = Stragglers(self.model, world)
        self.watch.follow(self.model)

        self.metrics_file = JsonLines(self.output_dir / "metrics.jsonl")
        self.samples_file = JsonLines(self.output_dir / "samples.jsonl")
        self.states = StateWriter(
            self.checkpoints,
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
        world.barrier()
        # Also of a step that a killed run reached and this one hasn't yet.
        self.best = world.from_main(world.on_main(lambda: best_state(self.checkpoints)))
        self._say(
            f"training set: {self.train_set.summary()}\n"
            + (f"validation set: {self.val_set.summary()}\n" if self.val_set else "")
            + f"{self.total_steps} steps of {cfg.global_batch_size} conversations, "
            f"{world.size} process(es): data parallel {world.dp_size}, "
            f"tensor parallel {world.tp_size}"
        )

    def train(self) -> None:
        """Every optimizer step, from the conversations to the log line."""
        cfg, world = self.cfg, self.world
        profiler = instantiate(cfg.profiler)[0] if cfg.profiler else DummyProfiler()
        bar = Progress(self.total_steps, self.first_step, world)
        self.model.train()
        tokens, seconds = 0, 0.0
        first = looked_at = self.first_step
        steps = range(first, self.total_steps)
        due = is_due(first, cfg.val_every_n_steps, self.total_steps)
        if due and (first == 0 or lacks_validation(self.metrics_file, first, world)):
            self.validate(first)
        with profiler, bar, StopRequest(world) as stop, closing(self.states):
            for step, work in ahead(self._prepared, steps):
                started = time.perf_counter()
                patience = LONG if step == self.first_step else 1.0  # it may compile
                dialogues, rows = work
                # Every rank knows the whole step's number of targets: a micro-batch's sum divided
                # by it is that micro-batch's part of the step's mean.
                num_targets = sum(len(dialogue.target_places) for dialogue in dialogues)
                loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
                for i, row in enumerate(rows):
                    self.watch.at(f"step {step + 1}, micro-batch {i + 1}", patience=patience)
                    row = row.to(world.device)
                    reduce_gradients(
                        self.model,
                        world,
                        last=i + 1 == len(rows),
                        every_time=cfg.fsdp_reduce_every_microbatch,
                    )
                    logps_R = target_logps(self.model, row, world)
                    loss = -logps_R.double().sum() / num_targets
                    # FSDP2 takes the mean over the data-parallel ranks.
                    (loss * world.dp_size).backward()
                    loss_sum += loss.detach()

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

                tokens += sum(dialogue.num_tokens for dialogue in dialogues)
                if logged:
                    metrics = {"loss": world.sum(loss_sum).item()}
                    seconds += time.perf_counter() - started
                    metrics |= {"grad_norm": grad_norm.item(), "lr": lr}
                    metrics["tokens_per_second"] = tokens / seconds
                    metrics |= self.stragglers.look(done)
                    if pause := self.states.take_pause():
                        metrics["checkpoint_pause_seconds"] = pause
                    if cfg.log_peak_memory_stats:
                        metrics["peak_memory_gib"] = peak_memory_gib(world.device)
                    self._log({"step": done, "epoch": done / self.steps_per_epoch} | metrics)
                    bar.logged(
                        done,
                        f"loss {metrics['loss']:.3g}, {metrics['tokens_per_second']:.0f} tokens/s",
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
        """Loss on validation conversations, and answers; the best weights so far are kept."""
        cfg, world = self.cfg, self.world
        assert self.val_set is not None
        self.watch.at(f"validation after step {step}", patience=LONG)
        self.model.eval()
        limit = (cfg.limit_val_batches or len(self.val_set)) * cfg.global_batch_size
        dialogues = self.val_set.dialogues[:limit]
        loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        rows = rows_by_rank(dialogues, world.dp_size, cfg.max_tokens_per_microbatch)
        for microbatch in rows[world.dp_rank]:
            row = pack_dialogues(microbatch, multiple_of=world.tp_size).to(world.device)
            loss_sum -= target_logps(self.model, row, world).double().sum()
        num_targets = sum(len(dialogue.target_places) for dialogue in dialogues)
        loss = world.sum(loss_sum).item() / num_targets
        if not math.isfinite(loss):
            raise ValueError(
                f"step {step}: the validation loss is {loss}: the weights are broken. Lower lr, or "
                "check the checkpoint that the run started from."
            )
        metrics = {"loss": loss} | self._generate(step)
        self.model.train()

        self._log({"step": step} | {f"val_{name}": value for name, value in metrics.items()})
        if step > 0 and (self.best is None or loss < self.best["val_loss"]):
            self.best = {"step": step, "val_loss": loss}
            if cfg.export == "best":
                self.states.save_best(step, self.model, self.best)

    def save(self, step: int) -> None:
        """The state to continue from, `output_dir/checkpoints/step_...`."""
        self.watch.at(f"saving step {step}", patience=LONG)
        self.states.save(step, self.model, self.optimizer, {"data": self._data_state()})

    def export(self) -> None:
        """The weights as Hugging Face safetensors, and the run's table and plot."""
        cfg = self.cfg
        step = self.total_steps
        if cfg.export == "best" and self.best:
            step = self.best["step"]
            load_best_weights(self.checkpoints, self.model, self.world)
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
            plot_curves(rows, ("loss",), plot)
            self._say(
                f"\n{summary_table(rows, ('loss', 'grad_norm', 'lr'))}\n\n"
                f"{self._validation(rows, step)}plot:    {plot}\n"
                f"metrics: {self.metrics_file.path}\n"
                f"weights: {self.output_dir}/epoch_* (of step {step})"
            )

    def cleanup(self) -> None:
        self.watch.close()
        if self.metric_logger is not None:
            self.metric_logger.close()
        if self.lock is not None:
            self.lock.release()

    # What follows is small print that the methods above call by name.

    def _dataset(self, component: Component) -> DialogueDataset:
        return instantiate(component, self.tokenizer, template=self.template)

    def _questions(self) -> list[Question]:
        """What is asked at every validation."""
        wanted = self.cfg.generation
        if wanted is None:
            return []
        asked = [
            Conversation([Turn(USER, text), Turn(ASSISTANT, "", wanted.label)], wanted.system)
            for text in wanted.prompts
        ]
        if self.val_set:
            asked += self.val_set.conversations[: wanted.from_dataset_val]
        return [
            Question(
                prompt="\n".join(turn.value for turn in each.turns[:-1]),
                label=each.turns[-1].label,
                tokens=encode_prompt(
                    self.template,
                    self.tokenizer,
                    each.system,
                    each.turns[:-1],
                    each.turns[-1].label,
                ),
            )
            for each in asked
        ]

    def _generate(self, step: int) -> dict[str, float]:
        """Sample an answer to every question; the metrics that the config names."""
        wanted = self.cfg.generation
        if wanted is None:
            return {}
        end_of_turn, stop_id = response_end(self.template, self.tokenizer)
        answers = sample_tokens(
            self.model,
            [question.tokens for question in self.questions],
            self.world,
            stop_id=stop_id,
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=self.cfg.seed + step,
        )
        prompts = [question.prompt for question in self.questions]
        labels = [question.label for question in self.questions]
        responses = [self.tokenizer.decode(answer).removesuffix(end_of_turn) for answer in answers]
        if self.world.is_main:
            for prompt, label, response in zip(prompts, labels, responses, strict=True):
                sample = {"step": step, "label": label, "prompt": prompt, "response": response}
                self.samples_file.append(sample)
        # On one rank: they may ask a server.
        found = self.world.on_main(
            lambda: answer_metrics(wanted.metrics, prompts, labels, responses)
        )
        return found or {}

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return instantiate(self.cfg.lr_scheduler, optimizer, num_training_steps=self.total_steps)

    def _prepared(self, step: int) -> tuple[list[Dialogue], list[DialogueRow]]:
        """A step's dialogues of all ranks, and this rank's rows of them."""
        cfg, world = self.cfg, self.world
        indices = batch_of_step(
            step, len(self.train_set), cfg.global_batch_size, cfg.seed, cfg.data.shuffle
        )
        dialogues = [self.train_set.dialogues[i] for i in indices]
        rows = rows_by_rank(dialogues, world.dp_size, cfg.max_tokens_per_microbatch, self.pair_cost)
        own = rows[world.dp_rank]
        return dialogues, [pack_dialogues(row, multiple_of=world.tp_size) for row in own]

    def _data_state(self) -> dict[str, Any]:
        """What the order of the batches depends on: a step's batch follows from these."""
        return {
            "dialogues": len(self.train_set),
            "tokens": sum(dialogue.num_tokens for dialogue in self.train_set.dialogues),
            "targets": sum(len(dialogue.target_places) for dialogue in self.train_set.dialogues),
            "global_batch_size": self.cfg.global_batch_size,
            "seed": self.cfg.seed,
            "shuffle": self.cfg.data.shuffle,
        }

    def _resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; returns its step."""
        found = resume_training(
            self.checkpoints,
            self.model,
            self.optimizer,
            self.lr_scheduler,
            self._data_state(),
            self.world,
        )
        if found is None:
            self._say(f"no checkpoint in {self.checkpoints}: starting at step 0")
            return 0
        checkpoint, step = found
        if self.world.is_main:
            self.metrics_file.keep_until(step)
            self.samples_file.keep_until(step)
        self._say(f"resumed from {checkpoint}")
        return step

    def _validation(self, rows: list[dict[str, Any]], step: int) -> str:
        """The validation of the exported weights as text; empty where there was none."""
        found = [row for row in rows if "val_loss" in row and row["step"] == step]
        lines = [
            f"  {name.removeprefix('val_'):<34}{value:>10.4g}"
            for row in found
            for name, value in row.items()
            if name != "step"
        ]
        return "\n".join([f"validation at step {step}", *lines, "", ""]) if lines else ""

    def _log(self, row: dict[str, Any]) -> None:
        if self.world.is_main:
            self.metrics_file.append(row)
            if self.metric_logger is not None:
                values = {key: value for key, value in row.items() if key != "step"}
                self.metric_logger.log_dict(values, step=row["step"])

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text)


@recipe_main(SFTConfig)
def main(cfg: SFTConfig) -> None:
    recipe = SFTRecipe(cfg)
    try:
        recipe.setup()
        recipe.train()
        if not recipe.stopped:
            recipe.export()
    finally:
        recipe.cleanup()


if __name__ == "__main__":
    main()
