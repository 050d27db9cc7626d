"""The page of a pipeline, from a folder with what its stages left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlm2.data.records import Record, Response, Turn
from steerlm2.evaluation.examples import MODEL
from steerlm2.evaluation.report import SteeringResult, write_report
from steerlm2.pipeline.page import base_models, data_sources, evaluated_models, pipeline_page
from steerlm2.pipeline.plan import Stage
from steerlm2.pipeline.state import PipelineState, StageRecord

TRAINS = {"save_every_n_steps": 100}


def stage(name: str, recipe: str = "sft_distributed", config: str = "any/sft") -> Stage:
    return Stage(name, Path("out") / name, recipe, config, (), (), f"tune run {recipe}")


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Stage], dict[str, Any]]:
    """Two complete stages in out/, the second of which evaluates; and their values."""
    monkeypatch.chdir(tmp_path)
    plan = [stage("sft"), stage("evaluate", "evaluate_steering")]
    for each in plan:
        each.folder.mkdir(parents=True)
        done = StageRecord("print", each.command, complete=True, runs=1, seconds=75.0)
        PipelineState(Path("out")).write(each.name, done)
    answer = Response("Hello there.", scores={"wit": 3.0}, extra={MODEL: "mine"})
    write_report(
        {"mine": SteeringResult({"steering_mae": 0.5}, [], {})},
        plan[1].folder,
        [Record("", [Turn("User", "Hi?")], "wit:4", [answer])],
    )
    (plan[0].folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnot json\n')
    (plan[0].folder / "config.yaml").write_text("lr: 3.0e-05\n")
    (Path("out") / "config.yaml").write_text("iterations: 2\n")
    checkpointer = {"checkpoint_dir": "models/Llama-3.2-1B"}
    values = {"sft": TRAINS | {"checkpointer": checkpointer, "dataset": {"source": "chats.jsonl"}}}
    return plan, values | {"evaluate": {}}


def test_the_page_tells_no_secret(finished: tuple[list[Stage], dict[str, Any]]) -> None:
    """Also of an earlier version's records, and of recipes that aren't ours."""
    plan, values = finished
    done = StageRecord("p", "tune run x url=http://al:S3CR@h", complete=True, runs=1, seconds=1.0)
    PipelineState(Path("out")).write("sft", done)
    (plan[0].folder / "config.yaml").write_text("url: http://al:S3CR@h\napi_key: S3CR\n")
    values["sft"]["dataset"]["source"] = "https://al:S3CR@h/chats.jsonl?token=S3CR"
    page = pipeline_page(Path("out"), plan, values, plan[1])
    assert "S3CR" not in page
    assert "https://***@h/chats.jsonl?token=***" in page


def test_the_page_says_what_was_run_and_what_came_of_it(
    finished: tuple[list[Stage], dict[str, Any]],
) -> None:
    plan, values = finished
    page = pipeline_page(Path("out"), plan, values, plan[1])
    for text in (
        *("<h1>SteerLM 2.0: out</h1>", "<dd>models/Llama-3.2-1B</dd>", "<dd>chats.jsonl</dd>"),
        *("<dt>Date</dt>", "0.500", "Hello there.", "sft: loss", "lr: 3.0e-05", "iterations: 2"),
        *("tune run evaluate_steering", "2 in 2 min 30 s", "<small>1 min 15 s</small>"),
    ):
        assert text in page, text


def test_what_stages_did_not_leave_is_not_on_the_page(
    finished: tuple[list[Stage], dict[str, Any]],
) -> None:
    plan, values = finished
    for file in ("sft/metrics.jsonl", "sft/config.yaml", "evaluate/examples.jsonl", "config.yaml"):
        (Path("out") / file).unlink()
    (Path("out") / "state" / "sft.json").unlink()
    page = pipeline_page(Path("out"), plan, values, plan[1])
    for text in ("Training", "Sampled answers", "Its config", "The pipeline's config"):
        assert text not in page
    assert "1 in 1 min 15 s" in page


def test_base_models_are_those_that_no_stage_made() -> None:
    plan = [stage("reward"), stage("sft"), stage("acsft"), stage("score", "score_responses")]
    values = {
        "reward": TRAINS | {"checkpointer": {"checkpoint_dir": "Llama"}},
        "sft": TRAINS | {"checkpointer": {"checkpoint_dir": "Llama"}},
        "acsft": TRAINS | {"checkpointer": {"checkpoint_dir": "out/sft/epoch_1"}},
        "score": {"checkpointer": {"checkpoint_dir": "other"}},
    }
    assert base_models(plan, values) == ["Llama"]
    values["sft"] = TRAINS | {"checkpointer": None, "model": {"_component_": "tiny.model"}}
    assert base_models(plan, values) == ["Llama", "random weights (tiny.model)"]


def test_data_are_what_is_prepared_or_read_from_outside() -> None:
    plan = [
        stage("data", "prepare_data", "data/chat"),
        stage("conversations", "prepare_data", "data/chat"),
        stage("drawn", "prepare_data", "data/grammar"),
        stage("split", "prepare_data", "data/best_of"),
        *(stage("sft"), stage("acsft"), stage("evaluate")),
    ]
    values: dict[str, Any] = {
        "data": {"source": "a.csv"},
        "conversations": {"source": "a.csv"},
        "drawn": {"source": None},
        "split": {"source": "out/data/train.jsonl"},
        "sft": {"dataset": {"source": "out/data/train.jsonl"}},
        "acsft": {"dataset": {"source": "b.jsonl"}},
        "evaluate": {"dataset": None},
    }
    assert data_sources(plan, values) == ["a.csv (data/chat)", "data/grammar", "b.jsonl"]


def test_evaluated_models_are_trained_stages_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the evaluation reads only their answers."""
    monkeypatch.chdir(tmp_path)
    plan = [stage("sft"), stage("acsft"), stage("other"), stage("answers"), stage("stopped")]
    values: dict[str, Any] = {each.name: TRAINS for each in plan} | {"answers": {}}
    for each in plan[:-1]:
        export = each.folder / "epoch_1"
        export.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (export / name).touch()
    names = ["acsft", "sft", "answers", "stopped", "elsewhere"]
    assert evaluated_models(plan, values, names) == [Path("out/sft"), Path("out/acsft")]
