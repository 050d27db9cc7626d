"""steerlm2_pipeline: what it plans, what a rerun does, and that kills change nothing."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer
from omegaconf import OmegaConf

from steerlm2._tune import RECIPES
from steerlm2.pipeline.state import PipelineState

TUNE = Path(sys.executable).with_name("tune")
QUICKSTART = ("steerlm2_pipeline", "--config", "tiny/quickstart")

WORLD_STAGES = [
    *("data", "prompts", "reward", "annotate", "sft", "acsft"),
    *(f"{name}_iter{k}" for k in (1, 2) for name in ("sample", "score", "steerlm2")),
    "evaluate",
]


def commands(stdout: str) -> list[list[str]]:
    """The words of each line that is a command."""
    return [shlex.split(line) for line in stdout.splitlines() if line and line[0] != "#"]


def recipe_of(command: list[str]) -> str:
    return command[command.index("--config") - 1]


# The plan


def test_dry_run_of_70b_is_a_complete_plan(tune: Any) -> None:
    """Ready for Slurm: the stages in order, two iterations, torchrun where a recipe can use it."""
    dry_run = tune("steerlm2_pipeline", "--config", "llama3_1/70B_pipeline", "dry_run=true")
    planned = commands(dry_run.stdout)
    iteration = [
        *("sample_responses", "score_responses", "steerlm2_distributed"),
        *("sample_responses", "annotate_attributes"),  # what the evaluation reports on
    ]
    assert [recipe_of(command) for command in planned] == [
        *("prepare_data", "prepare_data", "reward_distributed"),
        *("annotate_attributes", "annotate_attributes", "sft_distributed", "sft_distributed"),
        *iteration[3:],
        *iteration,
        *iteration,
        "evaluate_steering",
    ]
    for command in planned:
        if recipe_of(command) in ("prepare_data", "evaluate_steering"):
            assert command[:2] == ["tune", "run"]
        elif recipe_of(command) == "sample_responses":
            assert f"{folder_of_output(command)}_vllm.log" in command
            assert "steerlm2.serving.vllm_command" in command
            assert "--nproc_per_node" not in command
        else:
            assert command[:5] == ["srun", "--nodes", "32", "--ntasks", "32"]
            assert command[command.index("--nnodes") + 1] == "32"
    first, second = (c for c in planned if recipe_of(c) == "steerlm2_distributed")
    assert f"checkpointer.checkpoint_dir={folder_of(first)}" in second
    assert f"checkpointer.checkpoint_dir={folder_of(first)[: -len('steerlm2_iter1')]}acsft" in first


OF_THE_USER = ("base_model=base", "data=data.csv", "schema={formality: [0, 10]}")


@pytest.mark.parametrize("config", RECIPES["steerlm2_pipeline"])
def test_every_ready_made_pipeline_has_a_plan(tune: Any, tmp_path: Path, config: str) -> None:
    """Each stage's config has the keys that the pipeline gives it."""
    given = OF_THE_USER if config == "pipeline" else ("base_model=base",)
    given = () if config.startswith("tiny/") else given
    dry_run = tune("steerlm2_pipeline", "--config", config, *given, f"output_dir={tmp_path}/out",
                   "dry_run=true")  # fmt: skip
    assert len(commands(dry_run.stdout)) >= 10


def folder_of_output(command: list[str]) -> str:
    """Where the log of a stage's server is: logs/STAGE."""
    (output,) = (Path(w.removeprefix("output=")) for w in command if w.startswith("output="))
    return str(output.parents[1] / "logs" / output.parent.name)


def test_stages_of_70b_agree_on_the_attributes(tune: Any) -> None:
    """Those that load the attribute model's folder know its schema; others are told the same."""
    dry_run = tune("steerlm2_pipeline", "--config", "llama3_1/70B_pipeline", "dry_run=true")
    for command in commands(dry_run.stdout):
        if recipe_of(command) in ("reward_distributed", "evaluate_steering"):
            (schema,) = (w for w in command if w.startswith("schema="))
            assert json.loads(schema.removeprefix("schema="))["names"] == [
                *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
            ]


def folder_of(command: list[str]) -> str:
    (folder,) = (w.removeprefix("output_dir=") for w in command if w.startswith("output_dir="))
    return folder


def test_bootstrapping_is_an_option(tune: Any) -> None:
    """Sample at the best label, filter, train again: its model is the first proposal."""
    arguments = ("steerlm2_pipeline", "--config", "llama3_1/70B_pipeline", "dry_run=true")
    plain = commands(tune(*arguments).stdout)
    boot = commands(tune(*arguments, "bootstrap=true").stdout)
    added = [c for c in boot if shlex.join(c) not in {shlex.join(c) for c in plain}][:4]
    assert [recipe_of(command) for command in added] == [
        *("sample_responses", "annotate_attributes", "prepare_data", "sft_distributed"),
    ]
    first = next(c for c in boot if recipe_of(c) == "steerlm2_distributed")
    assert any("best_acsft" in word for word in first)


def test_a_base_model_that_is_not_there_is_named_before_data_are_prepared(
    tune: Any, tmp_path: Path
) -> None:
    result = tune("steerlm2_pipeline", "--config", "pipeline", f"base_model={tmp_path}/no",
                  f"output_dir={tmp_path}/out", *OF_THE_USER[1:], check=False)  # fmt: skip
    assert result.returncode == 1
    assert f"  - reward: {tmp_path}/no does not exist" in result.stderr
    assert not (tmp_path / "out").exists()


def test_problems_of_all_stages_are_found_before_the_first_runs(tune: Any, tmp_path: Path) -> None:
    result = tune(
        *QUICKSTART, f"output_dir={tmp_path}/out", "stages.sft.overrides.max_stepz=3",
        "stages.score.overrides.quantities=[log_x]", check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "sft: unknown key 'max_stepz' (did you mean 'max_steps'?)" in result.stderr
    assert "score_iter1: 'quantities[0]' must be one of" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


# Reruns, of two stages that take seconds


@pytest.fixture
def two_stages(tmp_path: Path) -> Path:
    """The config of a pipeline: draw conversations, then split them anew."""
    config = {
        "output_dir": str(tmp_path / "out"),
        "stages": {
            "draw": {
                "recipe": "prepare_data",
                "config": "data/grammar",
                "overrides": {"output_dir": "{here}", "builder": {"num": 20, "num_val": 5}},
            },
            "split": {
                "recipe": "prepare_data",
                "config": "data/conversations",
                "overrides": {
                    "source": "{draw}/train.jsonl",
                    "output_dir": "{here}",
                    "schema.names": ["humor", "verbosity"],
                    "train_fraction": 0.5,
                },
            },
        },
    }
    file = tmp_path / "pipeline.yaml"
    OmegaConf.save(OmegaConf.create(config), file)
    return file


def runs(output_dir: Path) -> dict[str, int]:
    """How often each stage was started."""
    files = sorted((output_dir / "state").glob("*.json"))
    return {file.stem: json.loads(file.read_text())["runs"] for file in files}


def test_a_rerun_does_what_has_changed_and_no_more(
    tune: Any, two_stages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("steerlm2_pipeline", "--config", str(two_stages))

    tune(*command)
    assert runs(out) == {"draw": 1, "split": 1}
    assert "draw             complete" in tune(*command).stdout
    assert runs(out) == {"draw": 1, "split": 1}, "nothing has changed"

    other = "stages.split.overrides.train_fraction=0.25"
    (line,) = commands(tune(*command, other, "dry_run=true").stdout)
    assert "train_fraction=0.25" in line
    tune(*command, other)
    assert runs(out) == {"draw": 1, "split": 1}, "a new record: another config"
    assert len((out / "split" / "train.jsonl").read_text().splitlines()) == 5
    aside = out / "earlier" / "split_1" / "train.jsonl"
    assert len(aside.read_text().splitlines()) == 10, "nothing is lost"

    (out / "draw" / "train.jsonl").unlink()
    tune(*command, other)
    assert runs(out) == {"draw": 2, "split": 1}, "what is missing is made again, to the same bytes"

    edited = (out / "draw" / "train.jsonl").read_text().replace("?", "??")
    (out / "draw" / "train.jsonl").write_text(edited)
    tune(*command, other, "only=split")
    assert "??" in (out / "split" / "train.jsonl").read_text(), "another input"


def test_commands_run_by_hand_are_adopted(
    tune: Any, fork_server: ForkServer, two_stages: Path, tmp_path: Path
) -> None:
    """The printed lines are a shell script; what they leave counts when one says so."""
    command = ("steerlm2_pipeline", "--config", str(two_stages))
    script = tune(*command, "dry_run=true").stdout
    (tmp_path / "tune").write_text(f'#!/bin/sh\nexec {fork_server.python} {TUNE} "$@"\n')
    (tmp_path / "tune").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-eu", "-c", script], env=environment, check=True, cwd=tmp_path)
    tune(*command, "adopt=true")
    assert runs(tmp_path / "out") == {"draw": 0, "split": 0}
    assert not (tmp_path / "out" / "earlier").exists()
    assert commands(tune(*command, "dry_run=true").stdout) == []


def test_an_unfinished_training_run_by_hand_is_gone_on_with(tune: Any, tmp_path: Path) -> None:
    """A folder without a model isn't complete, whatever else is in it."""
    command = (*QUICKSTART, *small_world(tmp_path), "only=[data,reward]")
    tune(*command)
    (tmp_path / "state" / "reward.json").unlink()
    (export,) = (tmp_path / "reward").glob("epoch_*")
    shutil.rmtree(export)
    first = (tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()[0]
    tune(*command, "adopt=true")
    assert runs(tmp_path) == {"data": 1, "reward": 1}
    assert export.exists()
    assert (tmp_path / "reward" / "metrics.jsonl").read_text().splitlines()[0] == first, "goes on"
    assert not (tmp_path / "earlier").exists()


def test_a_recipe_of_torchtunes_can_be_a_stage(tune: Any, two_stages: Path) -> None:
    """What its config must have, only it knows."""
    stage = "{recipe: full_finetune_single_device, config: llama3_1/8B_full_single_device}"
    dry_run = tune(
        *("steerlm2_pipeline", "--config", str(two_stages), "dry_run=true"),
        f"stages={{other: {stage}}}",
    )
    assert "tune run full_finetune_single_device" in dry_run.stdout


def test_a_stage_needs_those_it_reads_from(tune: Any, two_stages: Path) -> None:
    result = tune("steerlm2_pipeline", "--config", str(two_stages), "only=split", check=False)
    assert result.returncode == 1
    assert "stage split reads what draw writes, which is not complete" in result.stderr


def test_a_stage_without_memory_says_what_ended_it(tune: Any, two_stages: Path) -> None:
    killed = "stages.draw.launch='kill -KILL $$;'"
    result = tune("steerlm2_pipeline", "--config", str(two_stages), killed, check=False)
    assert result.returncode == 1
    assert "stage draw failed with exit status 137 (SIGKILL: so ends what" in result.stderr


def test_a_failing_stage_says_where_its_log_is(tune: Any, two_stages: Path, tmp_path: Path) -> None:
    wrong = "stages.split.overrides.schema.names=[humor]"
    result = tune("steerlm2_pipeline", "--config", str(two_stages), wrong, check=False)
    assert result.returncode == 1
    assert "stage split failed with exit status 1" in result.stderr
    assert f"{tmp_path}/out/logs/split.log" in result.stderr
    assert "verbosity" in result.stderr, "its own message"
    assert "Traceback" not in result.stderr
    tune("steerlm2_pipeline", "--config", str(two_stages))
    assert runs(tmp_path / "out")["draw"] == 1


# The whole, in small


def small_world(output_dir: Path) -> list[str]:
    """The quickstart with so few steps that its models learn little more than common tokens."""
    answers = {"generation.max_new_tokens": 4}
    few = {
        "data": {"builder.num": 64, "builder.num_val": 16},
        "reward": {"max_steps": 6, "val_every_n_steps": 3, "save_every_n_steps": 2},
        "sft": {"max_steps": 30, "val_every_n_steps": 15, "save_every_n_steps": 10, **answers},
        "acsft": {"max_steps": 6, "val_every_n_steps": 3, "save_every_n_steps": 2, **answers},
        "prompts": {"sample_fraction": 0.02},
        "sample": {"n": 4, "max_new_tokens": 12, "keep_truncated": True},
        "steerlm2": {"max_steps": 4, "save_every_n_steps": 2},
        "evaluate": {"n": 1, "max_new_tokens": 12, "exact_kl.max_pairs": 2},
    }
    return [
        f"output_dir={output_dir}",
        *(
            f"stages.{stage}.overrides.{key}={json.dumps(value)}"
            for stage, overrides in few.items()
            for key, value in overrides.items()
        ),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tune: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("world") / "whole"
    tune(*QUICKSTART, *small_world(output_dir))
    return output_dir


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_leaves_a_summary_and_a_report(uninterrupted: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    models = ["sft", "acsft", "steerlm2_iter1", "steerlm2_iter2"]
    assert list(summary["exact_kl"]) == models
    assert list(summary["steering_mae"]) == models
    assert all(value > 0 for value in summary["exact_kl"].values())
    page = (uninterrupted / "report.html").read_text()
    for text in ("Sampled answers", "steerlm2_iter2: distance", "random weights", "data/grammar"):
        assert text in page
    for model in models:
        (card,) = (uninterrupted / model).glob("epoch_*/README.md")
        assert f"| {model} (this model) | " in card.read_text()
    assert runs(uninterrupted) == dict.fromkeys(sorted(WORLD_STAGES), 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_ten_times_equals_uninterrupted(
    tune: Any, uninterrupted: Path, tmp_path: Path
) -> None:
    """At random moments; either everything dies, or the pipeline alone. What was complete isn't
    started again."""
    rng = random.Random(0)
    num_killed = 0
    state = PipelineState(tmp_path / "killed")
    done: dict[str, int] = {}
    command = (*QUICKSTART, *small_world(tmp_path / "killed"))
    for _ in range(10):
        process = tune.start(*command)
        try:
            process.wait(rng.uniform(0.5, 2))
        except subprocess.TimeoutExpired:
            kill_all = rng.random() < 0.5
            (os.killpg if kill_all else os.kill)(process.pid, signal.SIGKILL)
            num_killed += 1
        process.communicate()
        for stage in WORLD_STAGES:
            record = state.read(stage)
            if record is not None and record.complete:
                assert record.runs == done.setdefault(stage, record.runs)
    assert num_killed >= 5, "the others found the pipeline at its end"
    tune(*command)
    for stage, times in done.items():
        record = state.read(stage)
        assert record is not None
        assert record.runs == times
    for name in ("summary.json", "evaluate/steering.json"):
        assert (tmp_path / "killed" / name).read_text() == (uninterrupted / name).read_text()


def test_a_terminated_pipeline_ends_its_stage(
    tune: Any, tune_command: Any, two_stages: Path, tmp_path: Path
) -> None:
    """And a rerun goes on."""
    command = ("steerlm2_pipeline", "--config", str(two_stages))
    process = replace(tune_command, variables=tune.variables).start(*command)
    while not (tmp_path / "out" / "logs" / "draw.log").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    with PipelineState(tmp_path / "out").lock():
        pass  # no stage is left
    tune(*command)
    assert runs(tmp_path / "out") == {"draw": 2, "split": 1}
