"""What is used of torchtune although it is private."""

from __future__ import annotations

import importlib

import pytest
import torchtune.config._utils

from steerlm2 import torchtune_private
from steerlm2.torchtune_private import merge_arguments


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
