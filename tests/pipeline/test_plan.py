"""The plan: which commands, in which order, reading from where."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import DictConfig, OmegaConf

from steerlm2.pipeline.plan import StageOptions, extended, plan_stages, select, unused_values


def stage(overrides: dict[str, Any] | None = None, **options: Any) -> StageOptions:
    return StageOptions(
        **{"recipe": "score_responses", "config": "tiny/score_responses"} | options,
        overrides=overrides or {},
    )


TRAIN = {"input": "{sample}/groups.jsonl", "start": "{proposal}"}
LOOP = {
    "acsft": stage(),
    "sample": stage({"model": "{proposal}", "seed": "{iteration}"}, each_iteration=True),
    "steerlm2": stage(TRAIN, each_iteration=True),
}


def arguments(options: dict[str, StageOptions], **settings: Any) -> dict[str, tuple[str, ...]]:
    settings = {"output_dir": "out", "iterations": 2, "proposal": ["acsft", "steerlm2"]} | settings
    return {each.name: each.arguments for each in plan_stages(options, **settings)}


def test_an_iteration_samples_from_the_model_of_the_one_before() -> None:
    assert arguments(LOOP) == {
        "acsft": (),
        "sample_iter1": ("model=out/acsft", "seed=1"),
        "steerlm2_iter1": ("input=out/sample_iter1/groups.jsonl", "start=out/acsft"),
        "sample_iter2": ("model=out/steerlm2_iter1", "seed=2"),
        "steerlm2_iter2": ("input=out/sample_iter2/groups.jsonl", "start=out/steerlm2_iter1"),
    }


def test_a_stage_knows_whose_folders_it_reads() -> None:
    needs = {each.name: each.needs for each in plan_stages(LOOP, output_dir="out", iterations=1,
                                                           proposal=["acsft"])}  # fmt: skip
    assert needs == {
        "acsft": (),
        "sample_iter1": ("acsft",),
        "steerlm2_iter1": ("sample_iter1", "acsft"),
    }


def test_the_evaluation_names_every_iteration() -> None:
    """A key with {iteration} is given once for each, with that iteration's folders."""
    evaluate = stage({"models": {"acsft": "{acsft}", "steerlm2_iter{iteration}": "{steerlm2}/x"}})
    assert arguments(LOOP | {"evaluate": evaluate})["evaluate"] == (
        "models.acsft=out/acsft",
        "models.steerlm2_iter1=out/steerlm2_iter1/x",
        "models.steerlm2_iter2=out/steerlm2_iter2/x",
    )


def test_an_optional_stage_takes_its_place_as_proposal() -> None:
    """Bootstrapping trains the model that the first iteration samples from."""
    for when, model in ((False, "out/acsft"), (True, "out/best")):
        options = {"acsft": LOOP["acsft"], "best": stage(when=when), "sample": LOOP["sample"]}
        planned = arguments(options, proposal=["acsft", "best"])
        assert planned["sample_iter1"][0] == f"model={model}"
        assert ("best" in planned) == when


def test_values_are_written_as_the_command_line_reads_them() -> None:
    """Text that YAML would read as something else is quoted."""
    overrides = {"a": {"b": True, "c": [1, "x y"]}, "a.d": None, "e": "two words", "f": 1e-4,
                 "g": "4", "h": "a: b"}  # fmt: skip
    (planned,) = plan_stages(
        {"score": stage(overrides, remove=["g.h"])}, output_dir="out", iterations=0
    )
    assert shlex.split(planned.command) == [
        *("tune", "run", "score_responses", "--config", "tiny/score_responses", "~g.h"),
        *("a.b=true", 'a.c=[1, "x y"]', "a.d=null", "e=two words", "f=0.0001"),
        *('g="4"', 'h="a: b"'),
    ]


def test_torchrun_and_launch_are_for_recipes_that_can_use_them() -> None:
    """prepare_data runs in one process; a stage can have its own."""
    options = {
        "prepare": stage(recipe="prepare_data"),
        "score": stage(),
        "alone": stage(torchrun=""),
        "serve": stage(torchrun="", launch="serve $HOME {here} --"),
    }
    planned = plan_stages(
        options, output_dir="my out", iterations=0, torchrun="--nnodes 2", launch="srun"
    )
    assert [each.command.partition(" --config")[0] for each in planned] == [
        "tune run prepare_data",
        "srun tune run --nnodes 2 score_responses",
        "tune run score_responses",
        "serve $HOME 'my out/serve' -- tune run score_responses",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there are none"),
        ({"here": stage()}, "'here' can't be a stage's name"),
        ({"a_iter1": stage()}, "'a_iter1' can't be a stage's name"),
        ({"a": stage({"x": "{b}"})}, r"'a' has the unknown placeholder \{b\}"),
        ({"a": stage(), "b": stage({"x": {"y": {"a": None}}})}, r"'x.y' is \{a\} without quotes"),
        ({"a": stage({"x": "b=1"}, recipe="full_finetune_distributed")}, "has more than one '='"),
        (
            {"a": stage({"x{iteration}": 1}), "b": stage(each_iteration=True)},
            "unknown placeholder .iteration",
        ),
        ({"a": stage(recipe="prepare_data", torchrun="--nnodes 2")}, "runs in one process"),
        (
            {"a": stage(each_iteration=True), "b": stage(), "c": stage(each_iteration=True)},
            "must follow each other",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    options: dict[str, StageOptions], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(options, output_dir="out", iterations=1)


def test_a_key_that_is_set_to_nothing_is_no_placeholder() -> None:
    """Though {output_dir} is one, and YAML reads it without quotes as this mapping."""
    options = {"a": stage({"x": {"output_dir": None}})}
    (planned,) = plan_stages(options, output_dir="out", iterations=1)
    assert planned.arguments == ("x.output_dir=null",)


def test_select() -> None:
    """By name, of all iterations or of one; or from a stage on."""
    plan = plan_stages(LOOP, output_dir="out", iterations=2, proposal=["acsft"])

    def chosen(only: str | list[str] | None, first: str | None = None) -> list[str]:
        return [each.name for each in select(plan, only, first)]

    assert chosen(None) == [each.name for each in plan]
    assert chosen("sample") == ["sample_iter1", "sample_iter2"]
    assert chosen(["acsft", "sample_iter2"]) == ["acsft", "sample_iter2"]
    assert chosen(None, "sample_iter2") == ["sample_iter2", "steerlm2_iter2"]
    assert chosen(None, "steerlm2") == ["steerlm2_iter1", "sample_iter2", "steerlm2_iter2"]
    with pytest.raises(ValueError, match="there is no stage sft; the plan has acsft, sample_iter1"):
        chosen("sft")


def test_shared_overrides_give_way_to_the_stages_own() -> None:
    own = stage({"lr": 2}, use=[{"lr": 1, "seed": 3}, {"seed": 4, "model": {}}])
    assert arguments({"sft": own})["sft"] == ("lr=2", "seed=4")


def test_what_starts_a_stage_can_name_the_model_that_it_samples_from() -> None:
    """The server of the second iteration holds the model of the first."""
    checkpoint = {"checkpointer.checkpoint_dir": "{proposal}"}
    options = LOOP | {
        "sample": stage(checkpoint, each_iteration=True, launch="serve {checkpoint} --log {stage}")
    }
    settings = {"output_dir": "out", "iterations": 2, "proposal": ["acsft", "steerlm2"]}
    commands = {each.name: each.command for each in plan_stages(options, **settings)}
    assert commands["sample_iter1"].startswith("serve out/acsft --log sample_iter1 tune run ")
    assert commands["sample_iter2"].startswith("serve out/steerlm2_iter1 --log sample_iter2 tune ")


@pytest.mark.parametrize("launch", ["", None])
def test_nothing_can_stand_before_the_command(launch: str | None) -> None:
    own = stage(launch=launch, torchrun="--nproc_per_node 2")
    (only,) = plan_stages({"score": own}, output_dir="out", iterations=0)
    assert only.command.startswith("tune run --nproc_per_node 2 score_responses")


def config(tmp_path: Path, name: str, text: str) -> DictConfig:
    (tmp_path / f"{name}.yaml").write_text(text.replace("{tmp}", str(tmp_path)))
    return cast(DictConfig, OmegaConf.load(tmp_path / f"{name}.yaml"))


def test_a_config_holds_what_differs_from_the_one_that_it_extends(tmp_path: Path) -> None:
    config(tmp_path, "base", "a: 1\nb: {c: 2, d: ['${a}']}\n")
    config(tmp_path, "middle", "extends: '{tmp}/base.yaml'\nb: {c: 3}\n")
    values = config(tmp_path, "own", "extends: '{tmp}/middle.yaml'\na: 4\n")
    whole = OmegaConf.to_container(extended(values, "steerlm2_pipeline"), resolve=True)
    assert isinstance(whole, dict)
    assert (whole["a"], whole["b"]) == (4, {"c": 3, "d": [4]})


def test_a_schema_or_a_label_replaces_the_other_ones(tmp_path: Path) -> None:
    """Merged, the attributes of both would be left, or a label's value for another kind."""
    text = "schema: {names: [humor]}\nsampling_label: {kind: fixed, value: 'humor:1'}\n"
    config(tmp_path, "base", text)
    own = {"schema": {"formality": [0, 10]}, "sampling_label": {"kind": "record"}}
    values = OmegaConf.create({"extends": f"{tmp_path}/base.yaml"} | own)
    whole = OmegaConf.to_container(extended(values, "steerlm2_pipeline"))
    assert isinstance(whole, dict)
    assert {key: whole[key] for key in own} == own


def test_configs_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    config(tmp_path, "one", "extends: '{tmp}/other.yaml'\n")
    values = config(tmp_path, "other", "extends: '{tmp}/one.yaml'\n")
    with pytest.raises(ValueError, match="extend each other"):
        extended(values, "steerlm2_pipeline")


def test_values_that_nothing_uses_are_named(tmp_path: Path) -> None:
    text = """
iterations: 2
iteratons: 3
used: {part: 1}
whole: {part: 1}
names: {seed: 1, unused: 2}
stages:
  sft: {overrides: {lr: "${used.part}", seed: "${names.seed}", model: "${whole}"}}
"""
    assert unused_values(config(tmp_path, "own", text), {"iterations", "names", "stages"}) == [
        "no stage uses 'iteratons': did you mean 'iterations'?",
        "no stage uses 'names.unused': correct its name, or remove it",
    ]
