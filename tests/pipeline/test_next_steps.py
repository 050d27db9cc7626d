"""The commands that a pipeline ends with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from steerlm2._tune import RECIPES
from steerlm2.attributes import AttributeSchema
from steerlm2.facts import Kind, ModelFacts, write_facts
from steerlm2.pipeline.next_steps import next_steps
from steerlm2.pipeline.plan import Stage

VALUES = {"device": "cpu", "dtype": "fp32", "seed": 1}


def trained(folder: Path, kind: Kind = "language model", label: str | None = None) -> Stage:
    """A stage that has left an export."""
    export = folder / "epoch_1"
    export.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (export / name).touch()
    schema = AttributeSchema(("humor",))
    template = {"_component_": "steerlm2.data.extra_id_template"}
    facts = ModelFacts(kind=kind, template=template, schema=schema, default_label=label)
    write_facts(export, facts)
    return Stage(folder.name, folder, "sft_distributed", "any/sft", (), (), "")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """An attribute model, two models that see labels, and what trains and makes nothing."""
    monkeypatch.chdir(tmp_path)
    out = Path("my runs")
    return [
        trained(out / "reward", "attribute model"),
        trained(out / "sft"),
        trained(out / "acsft", label="humor:1"),
        trained(out / "steerlm2", label="humor:1"),
        Stage("evaluate", out / "evaluate", "evaluate_steering", "any/x", (), (), ""),
    ]


def steps(plan: list[Stage]) -> dict[str, list[str]]:
    values: dict[str, dict[str, Any]] = {stage.name: VALUES for stage in plan}
    return {use: shlex.split(command) for use, command in next_steps(plan, values).items()}


def test_the_last_steered_model_is_asked_and_served(plan: list[Stage]) -> None:
    overrides = [
        "checkpointer.checkpoint_dir=my runs/steerlm2",
        "attribute_model.checkpointer.checkpoint_dir=my runs/reward",
        *("device=cpu", "dtype=fp32"),
    ]
    assert steps(plan) == {
        "chat with the model": ["tune", "run", "chat", "--config", "any/chat", *overrides],
        "open its page": [
            *("tune", "run", "serve_steerlm", "--config", "any/serve_steerlm", *overrides)
        ],
    }
    assert all(config in RECIPES[recipe] for _, _, recipe, _, config, *_ in steps(plan).values())


def test_without_a_steered_model_there_is_nothing_to_ask(plan: list[Stage]) -> None:
    assert steps(plan[:2]) == {}


def test_the_quickstarts_own_folder_needs_no_more_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("./steerlm2_outputs/quickstart")
    plan = [
        trained(out / "reward", "attribute model"),
        trained(out / "steerlm2_iter2", label="humor:1"),
    ]
    assert steps(plan) == {
        "chat with the model": ["tune", "run", "chat", "--config", "tiny/chat"],
        "open its page": ["tune", "run", "serve_steerlm", "--config", "tiny/serve_steerlm"],
    }
