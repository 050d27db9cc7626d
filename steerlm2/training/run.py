"""What surrounds the steps of a training run, as one object that the recipe calls.

The recipe's loop stays inline; a `TrainingRun` owns the rest: processes, folder, lock, logs of the
ranks, the watch for hangs and stragglers, metrics, training states, the best weights, SIGTERM, the
progress bar and the export. It never calls back into the recipe, except to make the next step's
batch ahead of the step.

    with TrainingRun(cfg) as run:                       # joins the processes, takes the folder
        run.plan(len(dataset))                          # how many steps
        run.begin(model, optimizer, schedule, data)     # resumes
        with run.steps(prepare) as steps:
            for step, work in steps:                    # counted from 1
                ...
                due = run.due(step, grad_norm)          # log, save, validate: alike on all ranks
                ...
        run.export(model, checkpointer, facts)
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.modules import TransformerDecoder
from torchtune.training import DummyProfiler

from steerlm2.checkpoints.model_card import origin, source_name
from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.checkpoints.training_state import (
    DIGESTS,
    MODEL,
    TRAINING_ORDER,
    StateWriter,
    best_state,
    load_best_weights,
    resume_training,
)
from steerlm2.checkpoints.weights import Checkpointer, check_start, save_weights, start_digest
from steerlm2.config.keys import TrainingKeys
from steerlm2.config.loader import as_yaml, instantiate
from steerlm2.data.digest import ORDER, PARTS, data_digests, template_digest
from steerlm2.data.packing import Dialogue, Group, RewardGroup
from steerlm2.distributed.parallelize import DTYPES, check_finite
from steerlm2.facts import ModelFacts
from steerlm2.files import write_durably
from steerlm2.models.config_json import computation
from steerlm2.models.decoders import pair_cost
from steerlm2.runs.hangs import LONG, HangWatch
from steerlm2.runs.lock import RunLock
from steerlm2.runs.logs import Progress, open_rank_log, tell
from steerlm2.runs.metrics import (
    JsonLines,
    logged_validation_loss,
    peak_memory_gib,
    plot_curves,
    summary_table,
    validation_table,
)
from steerlm2.runs.output import (
    check_not_own_run,
    check_shared,
    make_output_dir,
    set_aside_earlier_run,
)
from steerlm2.runs.processes import use_cores_in_this_thread, world_of
from steerlm2.runs.record import (
    check_metric_logger,
    describe_run,
    log_path,
    open_metric_logger,
    restarted_run,
    write_run,
)
from steerlm2.runs.stopping import InterruptedRunError, StopRequest
from steerlm2.runs.stragglers import Stragglers
from steerlm2.training.batches import batch_of_step, steps_per_epoch
from steerlm2.training.prefetch import prefetch
from steerlm2.training.schedules import is_due
from steerlm2.training.setup import check_schedule, warmup_note


class Work(Protocol):
    """What a step computes, as `prepare` makes it."""

    @property
    def num_tokens(self) -> int:
        """Packed tokens of the step, of all ranks."""


WorkT = TypeVar("WorkT", bound=Work)
Record = Dialogue | Group | RewardGroup


@dataclass(frozen=True)
class Due:
    """What comes after a step; the same on all ranks."""

    log: bool
    save: bool
    """Before the validation: after SIGTERM the time may be short."""
    validate: bool


class TrainingRun:
    """A training run's processes and folder, from the config to the export.

    Attributes:
        world: this process's place among all.
        total_steps: optimizer steps of the whole run, after `plan`.
        pair_cost: what a pair of tokens costs, in tokens (`models.decoders.pair_cost`), after
            `begin`.
        first_step: steps that an earlier start has done, after `begin`.
        stopped: whether SIGTERM or Ctrl-C ended the run, before the last step or at it.
        best: `step` and `val_loss` of the best validation so far; None: none yet.

    Raises:
        ValueError: on every rank, where the processes don't form the config's layout, another run
            writes into the folder, or it can't be written to.
    """

    def __init__(self, cfg: TrainingKeys) -> None:
        self.cfg = cfg
        self.dtype = DTYPES[cfg.dtype]
        self.param_dtype = DTYPES[cfg.param_dtype or cfg.dtype]
        self.output_dir = Path(cfg.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.stopped = False
        self.first_step = 0
        self.best: dict[str, Any] | None = None
        self._logger: Any = None
        self._lock: RunLock | None = None
        self._files: list[JsonLines] = []
        self._patience = 1.0
        use_cores_in_this_thread()
        mixed = self.param_dtype != self.dtype
        self.world = world = world_of(cfg, self.output_dir, needs_mesh=mixed)
        self._watch = HangWatch(world, cfg.hang_timeout_seconds)
        torch.manual_seed(cfg.seed)
        try:
            self._open_folder()
        except BaseException:
            self.close()
            raise
        self.metrics = self.json_lines("metrics.jsonl")

    # Before the steps

    def plan(self, num_records: int) -> None:
        """Set `total_steps` from the config's limits, for a data set of so many records.

        Raises:
            ValueError: where the schedule doesn't fit.
        """
        cfg = self.cfg
        self.num_records = num_records
        self.steps_per_epoch = steps_per_epoch(num_records, cfg.global_batch_size)
        limits = [cfg.max_steps, cfg.epochs and cfg.epochs * self.steps_per_epoch]
        self.total_steps = min(limit for limit in limits if limit is not None)
        check_schedule(cfg, self.total_steps)

    def batch(self, step: int, shuffle: bool) -> list[int]:
        """Indices of the records of a step, all ranks together."""
        cfg = self.cfg
        return batch_of_step(step - 1, self.num_records, cfg.global_batch_size, cfg.seed, shuffle)

    def json_lines(self, name: str) -> JsonLines:
        """A .jsonl file of the run; a resumed run goes on in it."""
        self._files.append(JsonLines(self.output_dir / name))
        return self._files[-1]

    def begin(
        self,
        model: TransformerDecoder,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        data_state: Mapping[str, Any],
        train: Iterable[Record] = (),
        val: Iterable[Record] = (),
    ) -> None:
        """Continue from the newest training state or start anew, and write down what the run is.

        Args:
            model: laid out, with its weights.
            data_state: what the order of the batches depends on, beside batch size and seed.
            train: the training data as they were loaded, without what the model adds to them.
            val: the validation data.

        Raises:
            ValueError: where the folder's state is of another model, other data, another checkpoint
                or template, or the ranks have different data.
        """
        cfg, world = self.cfg, self.world
        self._model, self._optimizer = model, optimizer
        self._data_state = {
            **data_state,
            "global_batch_size": cfg.global_batch_size,
            "seed": cfg.seed,
            DIGESTS: self._digests(train, val),
            MODEL: computation(model),
        }
        self.pair_cost = pair_cost(model)
        self._stragglers = Stragglers(model, world)
        self._watch.follow(model)
        self._states = StateWriter(
            self.checkpoints,
            world,
            keep_last_n=cfg.keep_last_n_checkpoints,
            pin_memory=cfg.pin_checkpoint_memory,
            on_complete=lambda path: log_path(self._logger, "newest_checkpoint", path),
        )
        self.at("start", patience=LONG)
        if cfg.resume_from_checkpoint or restarted_run(self.output_dir, world):
            self._resume(lr_scheduler)
        run = describe_run(cfg, world)
        if world.is_main:
            if self.first_step == 0:
                set_aside_earlier_run(self.output_dir)
            write_durably(self.output_dir / "config.yaml", as_yaml(cfg))
            write_run(self.output_dir, run)
            self._logger = open_metric_logger(cfg.metric_logger, run, self.output_dir)
        world.barrier()
        # Also of a step that a killed run reached and this one hasn't yet.
        self.best = best_state(self.checkpoints, world)
        self._save_lost_best()
        self._last_checked = self.first_step
        self._tokens, self._seconds = 0, 0.0
        self._started: float | None = None

    def describe(self, train_summary: str, val_summary: str, records: str) -> None:
        """Say what is trained on, and on how many processes.

        Args:
            val_summary: "" where there is no validation.
            records: what `global_batch_size` counts.
        """
        cfg, world = self.cfg, self.world
        validation = f"validation set: {val_summary}" if val_summary else "no validation loss"
        self.say(
            f"training set: {train_summary}\n{validation}\n"
            f"{self.total_steps} steps of {cfg.global_batch_size} {records}, "
            f"{world.size} process(es): data parallel {world.dp_size}, "
            f"tensor parallel {world.tp_size}"
        )
        if note := warmup_note(cfg.lr_scheduler, self.total_steps):
            self.say(note)

    def validates_at_start(self, has_loss: bool = True) -> bool:
        """Whether a validation is due before the first step.

        Args:
            has_loss: a resumed run makes up for one whose loss is missing: a run that SIGTERM ends
                saves first, and may end before the validation that was due after it.
        """
        if not is_due(self.first_step, self.cfg.val_every_n_steps, self.total_steps):
            return False
        if self.first_step == 0:
            return True
        return has_loss and self._logged_loss() is None

    # The steps

    @contextmanager
    def steps(self, prepare: Callable[[int], WorkT]) -> Iterator[Iterator[tuple[int, WorkT]]]:
        """The steps that are left, counted from 1, each with what it computes.

        A step that SIGTERM or Ctrl-C came in is the last one. On leaving, the last state is
        complete.

        Args:
            prepare: called in a thread with the number of a step, while the one before it runs.

        Raises:
            ValueError: where the last state or the best weights couldn't be written.
            InterruptedRunError: after Ctrl-C in the only process.
        """
        profiler = instantiate(self.cfg.profiler)[0] if self.cfg.profiler else DummyProfiler()
        self._bar = Progress(self.total_steps, self.first_step, self.world)
        with profiler, self._bar, StopRequest(self.world) as self._stop, closing(self._states):
            yield self._steps(prepare, profiler)
            self.at("the last checkpoint", patience=LONG)
            self._states.wait()
        if self.stopped:
            name = (self._stop.received or signal.SIGTERM).name
            text = (
                f"{name}: stopped after step {self._last_step}, which is saved; the same command "
                "with resume_from_checkpoint=true goes on from there"
            )
            # Of several processes the launcher got it; torchrun takes another status for a failure.
            if self._stop.received == signal.SIGINT and self.world.size == 1:
                raise InterruptedRunError(text)
            self.say(text)

    def _steps(self, prepare: Callable[[int], WorkT], profiler: Any) -> Iterator[tuple[int, WorkT]]:
        left = range(self.first_step + 1, self.total_steps + 1)
        for step, work in prefetch(prepare, left):
            self._last_step = step
            self._tokens += work.num_tokens
            self._started = time.perf_counter()
            # The first step may compile.
            self._patience = LONG if step == self.first_step + 1 else 1.0
            self.at(f"step {step}")
            yield step, work
            self._stop_clock()
            self._bar.update()
            profiler.step()
            if self.stopped:
                return

    def at(self, position: str, patience: float | None = None) -> None:
        """Note for the hang watch where this rank is; all ranks come to the same positions.

        Args:
            patience: how many times longer than usual it may stay there; None: as the step.
        """
        self._watch.at(position, patience=self._patience if patience is None else patience)

    def due(self, step: int, grad_norm: Tensor) -> Due:
        """What comes after this step. Called by all ranks, before the optimizer's step.

        Raises:
            ValueError: where the gradient norm isn't finite, at steps with anything due: looking
                waits for the GPU.
        """
        cfg = self.cfg
        self.at(f"step {step}, update")
        self.stopped = self._stop.asked()
        due = Due(
            log=step % cfg.log_every_n_steps == 0,
            save=self.stopped or is_due(step, cfg.save_every_n_steps, self.total_steps),
            validate=is_due(step, cfg.val_every_n_steps, self.total_steps),
        )
        if due.log or due.save or due.validate or step == self.total_steps:
            check_finite(grad_norm, step, self._last_checked)
            self._last_checked = step
        self._grad_norm = grad_norm
        self._lr = float(self._optimizer.param_groups[0]["lr"])  # torchao keeps it in a tensor
        return due

    def log(self, step: int, metrics: Mapping[str, float], shown: Sequence[str]) -> None:
        """Log a step's metrics, with gradient norm, rate, speed and memory.

        Args:
            metrics: the same on all ranks.
            shown: names of those that the progress line shows.
        """
        world = self.world
        self._stop_clock()
        of_step = {"grad_norm": self._grad_norm.item(), "lr": self._lr}
        machine = {"tokens_per_second": self._tokens / self._seconds}
        self._tokens, self._seconds = 0, 0.0
        machine |= self._stragglers.look(step)
        if pause := self._states.take_pause():
            machine["checkpoint_pause_seconds"] = pause
        if self.cfg.log_peak_memory_stats:
            machine["peak_memory_gib"] = peak_memory_gib(world.device)
        numbers = {"step": step, "epoch": step / self.steps_per_epoch}
        self._log({**numbers, **metrics, **of_step, **machine})
        parts = [f"{name} {metrics[name]:.3g}" for name in shown]
        self._bar.logged(step, ", ".join([*parts, f"{machine['tokens_per_second']:.0f} tokens/s"]))

    def save(self, step: int) -> None:
        """Begin to write the state to continue from, `output_dir/checkpoints/step_...`."""
        self._stop_clock()
        self._check_folder()
        self.at(f"saving step {step}", patience=LONG)
        self._states.save(step, self._model, self._optimizer, {"data": self._data_state})

    @contextmanager
    def validation(self, step: int) -> Iterator[None]:
        """A validation after so many steps: without gradients, and not counted as training time."""
        self._stop_clock()
        self.at(f"validation after step {step}", patience=LONG)
        self._model.eval()
        with torch.no_grad():
            yield
        self._model.train()

    def log_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics as `val_*`; weights of the lowest `loss` so far are kept.

        Args:
            metrics: the same on all ranks, to the last bit where `loss` is among them.

        Raises:
            ValueError: where the loss isn't finite.
        """
        loss = metrics.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"step {step}: the validation loss is {loss}: the weights are broken. Lower lr, or "
                "check the checkpoint that the run started from."
            )
        self._log({"step": step} | {f"val_{name}": value for name, value in metrics.items()})
        if step == 0 or loss is None or (self.best and loss >= self.best["val_loss"]):
            return
        self._save_best(step, loss)

    # After the steps

    def export(
        self,
        model: TransformerDecoder,
        checkpointer: Checkpointer | None,
        facts: ModelFacts,
        text: TrainedText | None = None,
        *,
        method: str,
    ) -> int:
        """Write the weights of the best validation, or the last, as Hugging Face safetensors.

        Args:
            checkpointer: on rank 0; None on the others.
            facts: what the export says of itself; what it was trained on is added.
            text: of a language model, how its texts are written.
            method: how it was trained, for its model card.

        Returns:
            The step that the weights are of.
        """
        cfg = self.cfg
        self._check_folder()
        self.at("export", patience=LONG)
        last = step = max(self.first_step, self.total_steps)  # resumed beyond a smaller max_steps
        if cfg.export == "best" and self.best:
            step = self.best["step"]
            load_best_weights(self.checkpoints, model, self.world)
        trained = self.world.on_main(lambda: self._trained(step, method)) or {}
        folder = save_weights(
            model,
            checkpointer,
            self.world,
            epoch=-(-last // self.steps_per_epoch),
            dtype=DTYPES[cfg.save_dtype] if cfg.save_dtype else self.param_dtype,
            output_dir=self.output_dir,
            text=text,
            facts=dataclasses.replace(facts, trained=trained),
            adapter_only=cfg.save_adapter_weights_only,
        )
        log_path(self._logger, "exported_weights", folder)
        return step

    def report(
        self, step: int, *, table: Sequence[str], curves: Sequence[str], calibration: str = ""
    ) -> None:
        """Print and plot the run's metrics, and say where everything is.

        Args:
            step: that the exported weights are of; their validation is shown.
            table: metrics whose means are shown.
            curves: metrics that are plotted.
            calibration: a table that belongs to the validation.
        """
        if not self.world.is_main:
            return
        entries = self.metrics.read()
        plot = self.output_dir / "training_curves.png"
        plot_curves(entries, curves, plot)
        parts = [summary_table(entries, table), validation_table(entries, step), calibration]
        self.say(
            "\n".join(f"\n{part}" for part in parts if part)
            + f"\n\nplot:    {plot}\nmetrics: {self.metrics.path}\n"
            f"weights: {self.output_dir}/epoch_* (of step {step})"
        )

    def say(self, text: str) -> None:
        """Print something, once."""
        if self.world.is_main:
            tell(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; also after an error."""
        self._watch.close()
        if self._logger is not None:
            self._logger.close()
        if self._lock is not None:
            self._lock.release()

    # Helpers

    def _open_folder(self) -> None:
        cfg, world = self.cfg, self.world
        world.on_main(lambda: check_not_own_run(self.output_dir, cfg.checkpointer))
        world.on_main(lambda: check_start(cfg.checkpointer))
        world.on_main(lambda: make_output_dir(self.output_dir))
        world.on_main(lambda: check_metric_logger(cfg.metric_logger))
        self._lock = world.on_main(lambda: RunLock(self.output_dir))
        check_shared(self.output_dir, world)
        open_rank_log(self.output_dir, world)

    def _digests(self, train: Iterable[Record], val: Iterable[Record]) -> dict[str, str]:
        """What a resumed run must have in common with the one before, by the name for messages."""
        cfg, world = self.cfg, self.world
        of_train = data_digests(train)
        named = {f"training data ({part})": of_train[part] for part in PARTS}
        named[TRAINING_ORDER] = of_train[ORDER]
        if cfg.export == "best" and (val_records := list(val)):
            named["validation data (losses choose the weights with export=best)"] = (
                data_digests(val_records)[ORDER] + f" {cfg.limit_val_batches}"
            )
        named["template"] = template_digest(instantiate(cfg.template))
        if any(others != named for others in world.gather(named)):  # then on every rank
            raise ValueError(
                "the data are not the same on all nodes: `dataset` and `dataset_val` must name "
                "files on a file system that they share, or equal copies"
            )
        base = world.from_main(world.on_main(lambda: start_digest(cfg.checkpointer)))
        return named | {"base checkpoint (checkpointer)": str(base)}

    def _trained(self, step: int, method: str) -> dict[str, Any]:
        """What an export says of its training; nothing of where that was."""
        cfg = self.cfg
        entries = [entry for entry in self.metrics.read() if entry["step"] <= step]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        validation = {
            name.removeprefix("val_"): value
            for entry in entries
            if entry["step"] == step
            for name, value in entry.items()
            if name.startswith("val_")
        }
        known = {
            "method": method,
            **origin(cfg.checkpointer.get("checkpoint_dir") if cfg.checkpointer else None),
            "data": source_name(cfg.dataset.get("source") or cfg.dataset["_component_"]),
            "records": self.num_records,
            "steps": step,
            "loss": losses[-1] if losses else None,
            "validation": validation,
        }
        return {key: value for key, value in known.items() if value not in (None, {})}

    def _resume(self, lr_scheduler: LambdaLR) -> None:
        found = resume_training(
            self.checkpoints,
            self._model,
            self._optimizer,
            lr_scheduler,
            self._data_state,
            self.world,
        )
        if found is None:
            self.say(f"no checkpoint in {self.checkpoints}: starting at step 0")
            return
        checkpoint, self.first_step = found
        if self.world.is_main:
            for file in self._files:
                file.keep_until(self.first_step)
        self.say(f"resumed from {checkpoint}")

    def _logged_loss(self) -> float | None:
        return logged_validation_loss(self.metrics, self.first_step, self.world)

    def _save_best(self, step: int, loss: float) -> None:
        self.best = {"step": step, "val_loss": loss}
        if self.cfg.export == "best":
            self._states.save_best(step, self._model, self.best)

    def _save_lost_best(self) -> None:
        """Save the best weights that a kill prevented: they are written after their step's state
        and its logged validation, so the model that was resumed still has them."""
        loss = self._logged_loss() if self.first_step else None
        if loss is not None and (self.best is None or loss < self.best["val_loss"]):
            self._save_best(self.first_step, loss)

    def _stop_clock(self) -> None:
        """What follows isn't training time."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def _check_folder(self) -> None:
        """Writing would make it again, without what was in it."""
        if self._lock is not None:  # on rank 0
            self._lock.check()

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self.world.is_main:
            self._check_folder()
            self.metrics.append(entry)
            if self._logger is not None:
                values = {key: value for key, value in entry.items() if key != "step"}
                self._logger.log_dict(values, step=entry["step"])
