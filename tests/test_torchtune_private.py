"""What is used of torchtune although it is private."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torchtune.config._utils

from steerlm2 import torchtune_private
from steerlm2.torchtune_private import merge_arguments, parse_arguments


def test_another_torchtune_is_named_with_the_one_that_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torchtune.config._utils, "_merge_yaml_and_cli_args")
    with pytest.raises(ImportError, match=r"_merge_yaml_and_cli_args.*torchtune==0\.6\.1"):
        importlib.reload(torchtune_private)


def test_arguments_are_merged_into_a_copy() -> None:
    values = {"a": 1, "section": {"b": 2, "c": 3}, "gone": 4}
    merged = merge_arguments(values, ["section.b=5", "new=6", "~gone"])
    assert merged == {"a": 1, "section": {"b": 5, "c": 3}, "new": 6}
    assert values == {"a": 1, "section": {"b": 2, "c": 3}, "gone": 4}


def test_an_argument_is_split_at_its_first_equals_sign() -> None:
    """Plain values, those of a component, and values that are JSON."""
    values = {"output_dir": "out", "model": {"_component_": "a.b"}, "dataset": {"files": None}}
    arguments = ["output_dir=out/lr=1e-5,wd=0", "model=c.d", 'dataset.files=["a=1", "b==2"]']
    assert merge_arguments(values, arguments) == {
        "output_dir": "out/lr=1e-5,wd=0",
        "model": {"_component_": "c.d"},
        "dataset": {"files": ["a=1", "b==2"]},
    }


def test_a_schema_given_whole_replaces_the_configs_and_a_part_changes_it() -> None:
    values = {"schema": {"names": ["humor"], "max_value": 4}, "label": {"kind": "none"}}
    whole = merge_arguments(values, ["schema={formality: [0, 10]}", "label={value: a}"])
    assert whole == {"schema": {"formality": [0, 10]}, "label": {"kind": "none", "value": "a"}}
    part = merge_arguments(values, ["schema.max_value=9"])
    assert part["schema"] == {"names": ["humor"], "max_value": 9}


def test_an_argument_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="must be in the form of key=value, got lr"):
        merge_arguments({"lr": 1}, ["lr"])


def test_a_recipes_arguments_are_its_config_with_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config may be in the home folder."""
    (tmp_path / "run.yaml").write_text("output_dir: out\nlr: 1.0")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = parse_arguments(["--config", "~/run.yaml", "output_dir=runs/a=b"])
    assert values == {"output_dir": "runs/a=b", "lr": 1.0}
