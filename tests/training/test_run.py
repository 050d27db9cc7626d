"""What surrounds a training run's steps: how many, what is due, logged, saved and kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder

from steerlm2.checkpoints.training_state import best_state, load_best_weights
from steerlm2.config.keys import TrainingKeys
from steerlm2.config.loader import Component
from steerlm2.data.packing import Dialogue
from steerlm2.distributed.parallelize import clip_gradients
from steerlm2.distributed.world import World
from steerlm2.files import SUMS_FILE
from steerlm2.training import run as run_module
from steerlm2.training.run import TrainingRun
from steerlm2.training.setup import build_optimizer

NUM_RECORDS = 8
TOKENS = 100
"""Of every step."""


@dataclass(frozen=True)
class Work:
    num_tokens: int = TOKENS


def config(output_dir: Path, **keys: Any) -> TrainingKeys:
    unused = Component(_component_="builtins.dict")
    given: dict[str, Any] = {"max_steps": 6, "global_batch_size": 4, "device": "cpu"} | keys
    return TrainingKeys(
        output_dir=str(output_dir),
        tokenizer=unused,
        model=unused,
        dataset=unused,
        optimizer=Component(_component_="torch.optim.SGD"),
        lr=0.1,
        dtype="fp32",
        **given,
    )


TINY: dict[str, Any] = {
    "vocab_size": 11, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8,
    "intermediate_dim": 8, "max_seq_len": 16,
}  # fmt: skip
ADAPTED: dict[str, Any] = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 8}


def tiny_decoder(**changes: Any) -> TransformerDecoder:
    """With adapters where `changes` have LoRA arguments."""
    torch.manual_seed(0)
    build = lora_llama3 if "lora_rank" in changes else llama3
    return build(**(TINY | changes))


class Training:
    """A recipe's loop around a model whose loss is the sum of its squared weights."""

    def __init__(
        self,
        cfg: TrainingKeys,
        losses: dict[int, float] | None = None,
        train: Sequence[Dialogue] = (),
        val: Sequence[Dialogue] = (),
        model: dict[str, Any] | None = None,
    ) -> None:
        self.cfg, self.losses, self.arguments = cfg, losses or {}, model or {}
        self.data = train, val
        self.validated: list[int] = []
        self.steps_done: list[int] = []

    def __call__(self, in_step: Callable[[int], None] = lambda step: None) -> TrainingRun:
        with TrainingRun(self.cfg) as run:
            self.run = run
            run.plan(NUM_RECORDS)
            self.model = tiny_decoder(**self.arguments)
            self.optimizer, schedule = build_optimizer(self.cfg, self.model, run.total_steps)
            run.begin(self.model, self.optimizer, schedule, {"records": NUM_RECORDS}, *self.data)
            if run.validates_at_start():
                self.validate(run.first_step)
            with run.steps(lambda step: Work()) as steps:
                for step, _ in steps:
                    sum(p.square().sum() for p in self.model.parameters()).backward()
                    grad_norm = clip_gradients(self.model.parameters(), None)
                    in_step(step)
                    due = run.due(step, grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    schedule.step()
                    self.steps_done.append(step)
                    if due.log:
                        run.log(step, {"loss": float(step)}, shown=("loss",))
                    if due.save:
                        run.save(step)
                    if due.validate:
                        self.validate(step)
        return run

    def validate(self, step: int) -> None:
        with self.run.validation(step):
            assert not self.model.training
            assert not torch.is_grad_enabled()
        self.validated.append(step)
        self.run.log_validation(step, {"loss": self.losses.get(step, 1.0)})


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"max_steps": 5, "epochs": None}, 5),
        ({"max_steps": None, "epochs": 3}, 6),  # 8 records in batches of 4: 2 steps an epoch
        ({"max_steps": 5, "epochs": 3}, 5),
        ({"max_steps": 7, "epochs": 3}, 6),
    ],
)
def test_the_smaller_limit_ends_the_run(tmp_path: Path, limits: dict[str, Any], total: int) -> None:
    with TrainingRun(config(tmp_path, **limits)) as run:
        run.plan(NUM_RECORDS)
    assert run.total_steps == total


def test_a_schedule_that_does_not_fit_is_refused_before_the_model(tmp_path: Path) -> None:
    schedule = Component(_component_="steerlm2.training.warmup_cosine_hold", min_lr=0.5)
    with (
        TrainingRun(config(tmp_path, lr_scheduler=schedule)) as run,
        pytest.raises(ValueError, match=r"min_lr=0\.5 is above"),
    ):
        run.plan(NUM_RECORDS)


def test_batches_of_an_epoch_hold_every_record_once(tmp_path: Path) -> None:
    """Steps 1 and 2 are the first epoch; without shuffling in the order of the file."""
    with TrainingRun(config(tmp_path)) as run:
        run.plan(NUM_RECORDS)
        assert sorted(run.batch(1, True) + run.batch(2, True)) == list(range(NUM_RECORDS))
        assert run.batch(1, False) + run.batch(2, False) == list(range(NUM_RECORDS))


def test_steps_are_logged_saved_and_validated_when_they_are_due(tmp_path: Path) -> None:
    """6 steps: logged every 2, saved every 4 and at the end, validated before, every 3."""
    keys = {"log_every_n_steps": 2, "save_every_n_steps": 4, "val_every_n_steps": 3}
    training = Training(config(tmp_path, export="last", **keys))
    training()
    assert training.steps_done == [1, 2, 3, 4, 5, 6]
    assert training.validated == [0, 3, 6]
    assert [entry["step"] for entry in entries(tmp_path) if "loss" in entry] == [2, 4, 6]
    states = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert states == ["step_000004", "step_000006"]


def test_an_entry_has_the_steps_epoch_norm_and_rate(tmp_path: Path) -> None:
    """Step 3 of 2 steps an epoch is epoch 1.5; the rate is the one that the step was made with."""
    training = Training(config(tmp_path))
    training()
    third = entries(tmp_path)[2]
    assert third["epoch"] == 1.5
    assert third["loss"] == 3.0
    assert third["grad_norm"] > 0
    rates = [entry["lr"] for entry in entries(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.1


def test_only_steps_count_as_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s with validations of 50 s between them: 2 steps of 100 tokens in 4 s."""
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: clock[0])

    class Slow(Training):
        def validate(self, step: int) -> None:
            with self.run.validation(step):
                clock[0] += 50
            self.run.log_validation(step, {"loss": 1.0})

    def in_step(step: int) -> None:
        clock[0] += 2

    keys = {"log_every_n_steps": 2, "val_every_n_steps": 1, "export": "last"}
    Slow(config(tmp_path, **keys))(in_step)
    speeds = [entry["tokens_per_second"] for entry in entries(tmp_path) if "loss" in entry]
    assert speeds == [2 * TOKENS / 4] * 3


def test_a_step_that_sigterm_comes_in_is_the_last_and_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    training = Training(config(tmp_path))
    run = training(stop)
    assert run.stopped
    assert training.steps_done == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "step_000003" / "state.json").exists()
    assert "SIGTERM: stopped after step 3, which is saved" in capsys.readouterr().out


def test_a_resumed_run_does_the_steps_that_are_left(tmp_path: Path) -> None:
    """4 of 6 steps, then the others: the same weights as of 6 in one go, at a constant rate."""
    constant = Component(_component_="steerlm2.training.warmup_cosine_hold", min_lr=0.1)
    keys: dict[str, Any] = {"save_every_n_steps": 2, "lr_scheduler": constant}
    whole = Training(config(tmp_path / "whole", **keys))
    whole()
    Training(config(tmp_path / "run", max_steps=4, **keys))()
    rest = Training(config(tmp_path / "run", resume_from_checkpoint=True, **keys))
    run = rest()
    assert run.first_step == 4
    assert rest.steps_done == [5, 6]
    assert [entry["step"] for entry in entries(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(rest.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


DATA = [Dialogue([1, 2, 3], [1]), Dialogue([4, 5, 6], [2])]
VAL = [Dialogue([7, 8], [1])]


def base(folder: Path, value: float = 0.0, **config: Any) -> Component:
    """A checkpoint's folder with one tensor, as `checkpointer`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"rope_theta": 1.0} | config))
    save_file({"weight": torch.full((1000,), value)}, folder / "model.safetensors")
    return Component(_component_="builtins.dict", checkpoint_dir=str(folder))


@pytest.fixture
def resume(tmp_path: Path) -> Callable[..., TrainingRun]:
    """Two steps of a run, then the rest with other keys or data."""
    keys: dict[str, Any] = {"save_every_n_steps": 2, "checkpointer": base(tmp_path / "base")}
    Training(config(tmp_path / "run", max_steps=2, **keys), train=DATA, val=VAL)()

    def call(train: Sequence[Dialogue] = DATA, val: Sequence[Dialogue] = VAL, **other: Any) -> Any:
        given = {"resume_from_checkpoint": True} | keys | other
        return Training(config(tmp_path / "run", **given), train=train, val=val)()

    return call


def differences(error: pytest.ExceptionInfo[ValueError]) -> list[str]:
    return [line[4:] for line in str(error.value).splitlines() if line.startswith("  - ")]


LLAMA3 = Component(_component_="steerlm2.data.llama3_template")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": [DATA[0], Dialogue([4, 5, 9], [2])]}, "training data (tokens)"),
        ({"train": DATA[::-1]}, "order of the training data"),
        ({"template": LLAMA3}, "template"),
        ({"val": DATA}, "validation data (losses choose the weights with export=best)"),
        ({"checkpointer": None}, "base checkpoint (checkpointer)"),
        ({"global_batch_size": 2}, "global_batch_size: 4 then, 2 now"),
    ],
)
def test_what_the_run_was_not_begun_with_is_refused_by_name(
    resume: Callable[..., TrainingRun], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match="was written with other things than this run") as error:
        resume(**changes)
    assert differences(error) == [expected]


def test_another_base_checkpoint_of_the_same_shape_is_refused(
    tmp_path: Path, resume: Callable[..., TrainingRun]
) -> None:
    """One of other weights, or of another config.json; a copy goes on."""
    for number, other in enumerate(({"value": 1.0}, {"rope_theta": 2.0})):
        with pytest.raises(ValueError, match=r"\n  - base checkpoint \(checkpointer\)\n"):
            resume(checkpointer=base(tmp_path / f"other{number}", **other))
    assert resume(checkpointer=base(tmp_path / "copy", transformers_version="5")).first_step == 2


@pytest.mark.parametrize(
    ("before", "changes", "expected"),
    [
        (ADAPTED, {"lora_alpha": 16}, "model, lora_alpha: 8 then, 16 now"),
        (ADAPTED, {"lora_rank": 4}, "model, lora_rank: 2 then, 4 now"),
        (
            ADAPTED,
            {"lora_attn_modules": ["k_proj"]},
            "model, lora_modules: ['q_proj'] then, ['k_proj'] now",
        ),
        ({}, {"norm_eps": 1e-6}, "model, rms_norm_eps: 1e-05 then, 1e-06 now"),
        ({}, {"rope_base": 10_000}, "model, rope_theta: 500000.0 then, 10000.0 now"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(
    tmp_path: Path, before: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    """Though the state's tensors fit it; a longer context is the same computation."""
    keys: dict[str, Any] = {"save_every_n_steps": 2}
    Training(config(tmp_path, max_steps=2, **keys), model=before)()
    again = config(tmp_path, resume_from_checkpoint=True, **keys)
    with pytest.raises(ValueError, match="was written with other things than this run") as error:
        Training(again, model=before | changes)()
    assert differences(error) == [expected]
    assert Training(again, model=before | {"max_seq_len": 32})().first_step == 2


def test_other_validation_data_may_be_used_where_they_choose_nothing(
    resume: Callable[..., TrainingRun],
) -> None:
    assert resume(val=DATA, export="last").first_step == 2


def test_a_state_of_an_earlier_version_resumes_with_a_notice(
    tmp_path: Path, resume: Callable[..., TrainingRun], capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = tmp_path.glob("run/checkpoints/step_000002/state.json")
    state = json.loads(file.read_text())
    del state["data"]["digests"], state["data"]["model"]
    file.write_text(json.dumps(state))
    file.with_name(SUMS_FILE).unlink()
    assert resume(train=DATA[::-1]).first_step == 2
    shown = capsys.readouterr().err
    assert "step_000002 doesn't say which data, checkpoint and template and which settings" in shown


def test_damaged_records_of_a_run_do_not_block_it(
    tmp_path: Path, resume: Callable[..., TrainingRun], capsys: pytest.CaptureFixture[str]
) -> None:
    """run.json cut off; in metrics.jsonl a line of zeros, as after a power cut, and half a line."""
    folder = tmp_path / "run"
    (folder / "run.json").write_text((folder / "run.json").read_text()[:100])
    first, second = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(first + bytes(20) + b"\n" + second[:9] + b"\n" + second)
    assert resume().first_step == 2
    assert [entry["step"] for entry in entries(folder)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "run.json").read_text())["earlier_starts"] == []
    shown = capsys.readouterr().err
    assert f"WARNING: {folder}/metrics.jsonl: 2 damaged line(s) left out" in shown
    assert f"WARNING: {folder}/run.json is damaged" in shown


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_a_damaged_side_file_of_the_checkpoint_is_named_first(tmp_path: Path, name: str) -> None:
    """Before the data are read, not at the export."""
    checkpointer = base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    (tmp_path / "base" / name).write_text('{"weight_map": {"a')
    with pytest.raises(ValueError, match=rf"/base/{name} is damaged or cut off"):
        TrainingRun(config(tmp_path / "run", checkpointer=checkpointer))


def test_a_metric_logger_that_cannot_open_is_named_first(tmp_path: Path) -> None:
    logger = Component(_component_="torchtune.training.metric_logging.CometLogger")
    with pytest.raises(ValueError, match=r"CometLogger needs the package comet_ml.*\bnull\b"):
        TrainingRun(config(tmp_path, metric_logger=logger))


def test_weights_of_the_lowest_validation_loss_are_kept(tmp_path: Path) -> None:
    """Not those before the first step, which nothing has been learned from."""
    losses = {0: 0.1, 2: 3.0, 4: 1.0, 6: 2.0}
    training = Training(config(tmp_path, val_every_n_steps=2), losses)
    run = training()
    assert run.best == {"step": 4, "val_loss": 1.0}
    state = json.loads((tmp_path / "checkpoints" / "best" / "state.json").read_text())
    assert state == {"step": 4, "val_loss": 1.0}


def test_a_broken_validation_loss_ends_the_run(tmp_path: Path) -> None:
    training = Training(config(tmp_path, val_every_n_steps=2), {2: float("nan")})
    with pytest.raises(ValueError, match="step 2: the validation loss is nan: the weights are"):
        training()


def test_a_state_and_the_best_weights_of_one_step_are_both_written(tmp_path: Path) -> None:
    keys = {"val_every_n_steps": 3, "save_every_n_steps": 3}
    Training(config(tmp_path, **keys), {3: 1.0, 6: 0.5})()
    for name in ("step_000003", "step_000006", "best"):
        assert (tmp_path / "checkpoints" / name / "state.json").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_best_weights_that_a_kill_prevented_are_those_of_the_resumed_step(
    earlier: bool, tmp_path: Path
) -> None:
    """State and validation of step 6 are there; the best weights are of step 3, or not there."""
    keys = {"val_every_n_steps": 3, "save_every_n_steps": 3}
    run = tmp_path / "run"
    Training(config(run, max_steps=3, **keys), {3: 1.0})()
    best = run / "checkpoints" / "best"
    kept = shutil.copytree(best, tmp_path / "kept")
    whole = Training(config(run, resume_from_checkpoint=True, **keys), {6: 0.5})
    whole()
    shutil.rmtree(best)
    if earlier:
        shutil.copytree(kept, best)
    before = entries(run)
    resumed = Training(config(run, resume_from_checkpoint=True, **keys))
    assert resumed().best == {"step": 6, "val_loss": 0.5}
    cpu = World(torch.device("cpu"))
    assert best_state(run / "checkpoints", cpu) == {"step": 6, "val_loss": 0.5}
    assert (resumed.validated, entries(run)) == ([], before)
    exported = tiny_decoder()
    load_best_weights(run / "checkpoints", exported, cpu)
    torch.testing.assert_close(exported.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder that another run writes into."""
    with TrainingRun(config(tmp_path)):
        yield tmp_path


def test_two_runs_do_not_share_a_folder(held: Path) -> None:
    with pytest.raises(ValueError, match="another run writes into"):
        TrainingRun(config(held))


def test_a_run_lets_go_of_its_folder_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_lr"):
        Training(config(tmp_path, lr_scheduler=Component(
            _component_="steerlm2.training.warmup_cosine_hold", min_lr=1.0
        )))()  # fmt: skip
    Training(config(tmp_path))()
