"""Attribute models: a decoder with a linear head that scores a response on every attribute.

Regression on human labels (HelpSteer2 paper, section 3), or Bradley-Terry on preferences
(HelpSteer2-Preference paper), where the reward is one attribute's score. The scores are
read at the last token of the text, the one that would begin a label:

    [system, turns, response, label start] -> hidden state -> head -> one score an attribute

    tune run reward_distributed --config tiny/reward
    tune run --nproc_per_node 8 reward_distributed --config llama2/13B_reward

One file for every world size: alone it is one process on a CPU or GPU, under torchrun arguments
FSDP2 x tensor parallel with replicas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import DummyProfiler
from tqdm import tqdm

from steerlm2.attributes import as_schema
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
    open_reward_checkpointer,
    save_weights,
)
from steerlm2.config.loader import Component, as_yaml, instantiate
from steerlm2.data.packing import RewardGroup, RewardRow, pack_for_reward
from steerlm2.datasets import RewardDataset
from steerlm2.distributed.parallelize import (
    DTYPES,
    ActivationCheckpointing,
    check_finite,
    clip_gradients,
    parallelize,
    reduce_gradients,
)
from steerlm2.distributed.world import init_world
from steerlm2.evaluation.agreement import (
    Table,
    attribute_calibration,
    attribute_metrics,
    mean_baseline,
    preference_calibration,
    preference_metrics,
    table_text,
)
from steerlm2.losses import bradley_terry_sum, num_labelled, squared_error_sum
from steerlm2.models.llama import pair_cost
from steerlm2.models.reward_head import add_reward_head
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
from steerlm2.training.forward import attribute_scores, score_attributes
from steerlm2.training.prefetch import ahead
from steerlm2.training.schedules import is_due
from steerlm2.training.step_plan import rows_by_rank


@dataclass
class DataOptions:
    """The `data:` section."""

    shuffle: bool = True


@dataclass
class RewardConfig:
    """Every key of the recipe, with its default."""

    output_dir: str
    tokenizer: Component
    model: Component  # the backbone: its output layer gives way to the head
    dataset: Component
    optimizer: Component
    lr: float | None = None  # shorthand for optimizer.lr
    template: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.data.extra_id_template")
    )
    checkpointer: Component | None = None  # none: fresh weights from the seed
    load_reward_head: bool = False  # of a checkpoint that has one; else the head starts fresh
    dataset_val: Component | None = None
    lr_scheduler: Component = field(
        default_factory=lambda: Component(_component_="steerlm2.training.warmup_cosine_hold")
    )
    loss: Literal["regression", "regular_bt", "margin_bt", "scaled_bt"] = "regression"
    schema: dict[str, Any] | None = None  # names, min_value and max_value; none: the default ones
    reward_attribute: str = "helpfulness"  # whose score is the reward of the Bradley-Terry losses
    data: DataOptions = field(default_factory=DataOptions)

    max_tokens_per_microbatch: int = 4096
    global_batch_size: int = 128  # texts (pairs) of an optimizer step, all ranks together
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
            origins = {"template": "template", "schema": "schema", "pairs": "loss"}
            for argument, origin in origins.items():
                if argument in component:
                    found.append(f"'{section}.{argument}' is taken from '{origin}': set that")
        if "num_training_steps" in self.lr_scheduler:
            found.append("'lr_scheduler.num_training_steps' is taken from max_steps and epochs")
        if self.val_every_n_steps and not self.dataset_val:
            found.append("'val_every_n_steps' needs 'dataset_val'")
        if self.load_reward_head and self.checkpointer is None:
            found.append("'load_reward_head' needs a 'checkpointer'")
        try:
            names = as_schema(self.schema).names
        except (ValueError, TypeError) as error:
            found.append(f"'schema': {error}")
        else:
            if self.loss != "regression" and self.reward_attribute not in names:
                found.append(
                    f"'reward_attribute' must be one of schema.names ({', '.join(names)}), got "
                    f"{self.reward_attribute!r}"
                )
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


class RewardRecipe:
    """The run: setup -> train (with validate and save) -> export."""

    def __init__(self, cfg: RewardConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
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

        self.steps_per_epoch = steps_per_epoch(len(self.train_set), cfg.global_batch_size)
        limits = [cfg.max_steps, cfg.epochs and cfg.epochs * self.steps_per_epoch]
        self.total_steps = min(limit for limit in limits if limit is not None)
        lr = cfg.optimizer.get("lr", cfg.lr)
        assert lr is not None
        self._schedule(torch.optim.SGD([torch.zeros(1)], lr=lr))  # its mistakes, before the model

        with torch.device("meta"):
            self.model = instantiate(cfg.model)
            add_reward_head(self.model, len(self.schema.names))
            self.model = self.model.to(self.param_dtype)
        if adapters := get_adapter_params(self.model):
            set_trainable_params(self.model, adapters)
            self.model.output.requires_grad_()
            for parameter in self.model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(self.dtype)
        elif cfg.save_adapter_weights_only:
            raise ValueError("save_adapter_weights_only needs a `model` with LoRA adapters")
        check_vocabulary(self.model, self.tokenizer)
        check_context(
            self.model, max(data.longest() for data in (self.train_set, self.val_set) if data)
        )
        self.checkpointer = world.on_main(
            lambda: open_reward_checkpointer(
                cfg.checkpointer,
                self.model,
                self.tokenizer,
                self.template,
                self.schema,
                seed=cfg.seed,
                output_dir=cfg.output_dir,
                load_head=cfg.load_reward_head,
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
            fresh_head=cfg.checkpointer is not None and not cfg.load_reward_head,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = instantiate(cfg.optimizer, self.parameters, lr=lr)
        self.lr_scheduler = self._schedule(self.optimizer)
        self.stragglers = Stragglers(self.model, world)
        self.watch.follow(self.model)

        self.metrics_file = JsonLines(self.output_dir / "metrics.jsonl")
        self.calibration_file = JsonLines(self.output_dir / "calibration.jsonl")
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
        # Also one of a step that a killed run reached and this one hasn't yet.
        self.last: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = world.from_main(
            world.on_main(lambda: best_state(self.checkpoints))
        )
        self._say(
            f"training set: {self.train_set.summary()}\n"
            + (f"validation set: {self.val_set.summary()}\n" if self.val_set else "")
            + ("" if self.val_set else "no validation: val_every_n_steps is null\n")
            + f"reward head: {'of the checkpoint' if cfg.load_reward_head else 'fresh'}\n"
            + f"{self.total_steps} steps of {cfg.global_batch_size} "
            + ("texts, " if cfg.loss == "regression" else "pairs, ")
            + f"{world.size} process(es): data parallel {world.dp_size}, "
            f"tensor parallel {world.tp_size}"
        )

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
        if due and (first == 0 or lacks_validation(self.metrics_file, first, world)):
            self.validate(first)
        with profiler, bar, StopRequest(world) as stop, closing(self.states):
            for step, work in ahead(self._prepared, steps):
                started = time.perf_counter()
                patience = LONG if step == self.first_step else 1.0  # it may compile
                groups, rows = work
                # Every rank knows the whole step's number of labels (or pairs): a micro-batch's
                # sum divided by it is that micro-batch's part of the step's mean.
                count = self._loss_count(groups)
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
                    scores_NA = attribute_scores(self.model, row)
                    loss = self._loss_sum(scores_NA, row.labels_NA, row.strength_G) / count
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

                tokens += sum(group.num_tokens for group in groups)
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
        """Loss, agreement with the labels and calibration; the best weights so far are kept."""
        cfg = self.cfg
        assert self.val_set is not None
        self.watch.at(f"validation after step {step}", patience=LONG)
        self.model.eval()
        limit = (cfg.limit_val_batches or len(self.val_set)) * cfg.global_batch_size
        groups = self.val_set.groups[:limit]
        scored = score_attributes(
            self.model, groups, self.world, max_tokens_per_microbatch=cfg.max_tokens_per_microbatch
        )
        self.model.train()

        scores_NA = torch.tensor([scores for group in scored for scores in group])
        labels_NA = torch.tensor(_labels(groups), dtype=torch.float64)
        strength_P = torch.tensor([group.strength or 0.0 for group in groups], dtype=torch.float64)
        loss_sum = self._loss_sum(scores_NA, labels_NA, strength_P)
        # Rank 0's: what follows from it must not differ between ranks in the last bit.
        loss = self.world.from_main(loss_sum.item()) / self._loss_count(groups)
        if not math.isfinite(loss):
            raise ValueError(
                f"step {step}: the validation loss is {loss}: the weights are broken. Lower lr, or "
                "check the checkpoint that the run started from."
            )
        metrics = {"loss": loss}
        if cfg.loss == "regression":
            scores, labels = scores_NA.tolist(), labels_NA.tolist()
            metrics |= attribute_metrics(scores, labels, self.schema)
            metrics |= mean_baseline(_labels(self.train_set.groups), labels, self.schema)
            calibration = attribute_calibration(scores, labels, self.schema)
        else:
            rewards_P2 = scores_NA[:, self._reward_index()].view(-1, 2).tolist()
            metrics |= preference_metrics(rewards_P2, strength_P.tolist())
            calibration = preference_calibration(rewards_P2, strength_P.tolist())
        self._log({"step": step} | {f"val_{name}": value for name, value in metrics.items()})
        if self.world.is_main:
            self.calibration_file.append({"step": step, "calibration": calibration})
        self.last = {"step": step, "metrics": metrics, "calibration": calibration}
        if step > 0 and (self.best is None or loss < self.best["metrics"]["loss"]):
            self.best = self.last
            if cfg.export == "best":
                self.states.save_best(step, self.model, self.best)

    def save(self, step: int) -> None:
        """The state to continue from, `output_dir/checkpoints/step_...`."""
        self.watch.at(f"saving step {step}", patience=LONG)
        self.states.save(step, self.model, self.optimizer, {"data": self._data_state()})

    def export(self) -> None:
        """The weights as a Hugging Face LlamaForSequenceClassification, and the run's results."""
        cfg = self.cfg
        step, validation = max(self.first_step, self.total_steps), self.last
        if cfg.export == "best" and self.best:
            step, validation = self.best["step"], self.best
            load_best_weights(self.checkpoints, self.model, self.world)
        self.watch.at("export", patience=LONG)
        folder = save_weights(
            self.model,
            self.checkpointer,
            self.world,
            epoch=-(-max(self.first_step, self.total_steps) // self.steps_per_epoch),
            dtype=DTYPES[cfg.save_dtype] if cfg.save_dtype else self.param_dtype,
            output_dir=self.output_dir,
            adapter_only=cfg.save_adapter_weights_only,
        )
        log_path(self.metric_logger, "exported_weights", folder)
        if self.world.is_main:
            rows = self.metrics_file.read()
            plot = self.output_dir / "training_curves.png"
            plot_curves(rows, ("loss",), plot)
            self._say(f"\n{summary_table(rows, ('loss', 'grad_norm', 'lr'))}")
            if validation:
                self._say(validation_text(**validation))
            self._say(
                f"\nplot:    {plot}\nmetrics: {self.metrics_file.path}\n"
                f"weights: {self.output_dir}/epoch_* (of step {step})"
            )

    def cleanup(self) -> None:
        self.watch.close()
        if self.metric_logger is not None:
            self.metric_logger.close()
        if self.lock is not None:
            self.lock.release()

    # What follows is small print that the methods above call by name.

    def _dataset(self, component: Component) -> RewardDataset:
        arguments: dict[str, Any] = {"template": self.template, "schema": self.schema}
        if self.cfg.loss != "regression":
            arguments["pairs"] = True
        return instantiate(component, self.tokenizer, **arguments)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return instantiate(self.cfg.lr_scheduler, optimizer, num_training_steps=self.total_steps)

    def _prepared(self, step: int) -> tuple[list[RewardGroup], list[RewardRow]]:
        """A step's groups of all ranks, and this rank's rows of them."""
        cfg, world = self.cfg, self.world
        indices = batch_of_step(
            step, len(self.train_set), cfg.global_batch_size, cfg.seed, cfg.data.shuffle
        )
        groups = [self.train_set.groups[i] for i in indices]
        rows = rows_by_rank(groups, world.dp_size, cfg.max_tokens_per_microbatch, self.pair_cost)
        own = rows[world.dp_rank]
        return groups, [pack_for_reward(row, multiple_of=world.tp_size) for row in own]

    def _reward_index(self) -> int:
        return self.schema.names.index(self.cfg.reward_attribute)

    def _loss_count(self, groups: list[RewardGroup]) -> int:
        """What the loss is a mean over: the labels of these groups, or the pairs."""
        if self.cfg.loss != "regression":
            return len(groups)
        return num_labelled(torch.tensor(_labels(groups)))

    def _loss_sum(
        self,
        scores_NA: torch.Tensor,
        labels_NA: torch.Tensor | None,
        strength_P: torch.Tensor | None,
    ) -> torch.Tensor:
        kind = self.cfg.loss
        if kind == "regression":
            assert labels_NA is not None
            return squared_error_sum(scores_NA, labels_NA)
        assert strength_P is not None
        return bradley_terry_sum(scores_NA[:, self._reward_index()], strength_P, kind)

    def _data_state(self) -> dict[str, Any]:
        """What a resumed run must share: the order of the batches, and what is learned."""
        return {
            "groups": len(self.train_set),
            "tokens": sum(group.num_tokens for group in self.train_set.groups),
            "global_batch_size": self.cfg.global_batch_size,
            "seed": self.cfg.seed,
            "shuffle": self.cfg.data.shuffle,
            "attributes": list(self.schema.names),
            "loss": self.cfg.loss,
            "reward_attribute": self.cfg.reward_attribute if self.cfg.loss != "regression" else "",
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
            self.calibration_file.keep_until(step)
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


def validation_text(step: int, metrics: dict[str, float], calibration: Table) -> str:
    """The results of one validation, for people."""
    lines = [f"  {name:<34}{value:>10.4g}" for name, value in metrics.items()]
    return "\n".join([f"\nvalidation at step {step}", *lines, "", table_text(calibration)])


def _labels(groups: list[RewardGroup]) -> list[Sequence[float]]:
    return [labels for group in groups for labels in group.labels or ()]


@recipe_main(RewardConfig)
def main(cfg: RewardConfig) -> None:
    recipe = RewardRecipe(cfg)
    try:
        recipe.setup()
        recipe.train()
        if not recipe.stopped:
            recipe.export()
    finally:
        recipe.cleanup()


if __name__ == "__main__":
    main()
