"""chat: lines in, answers of a trained model out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import chat
from tests.conftest import RunScript
from tests.recipes.ready_made import recipe_config


def answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *keys: str
) -> list[str]:
    """What a run prints for lines from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    recipe = chat.ChatRecipe(recipe_config("chat", "tiny/chat", *keys))
    recipe.setup()
    capsys.readouterr()
    recipe.run()
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def models(acsft_model: Path, attribute_model: Path) -> tuple[str, ...]:
    return (
        f"checkpointer.checkpoint_dir={acsft_model}",
        f"attribute_model.checkpointer.checkpoint_dir={attribute_model}",
    )


def test_piped_lines_are_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: tuple[str, ...]
) -> None:
    """Each with its scores; the same lines have the same answers, other labels others."""
    lines = "Name a river.\n/compare verbosity=0 verbosity=4,humor=4\n"
    printed = answers(monkeypatch, capsys, lines, *models)
    names = [line.split()[0] for line in printed if "asked" in line]
    assert names == ["humor", "verbosity"] * 3
    headings = [line for line in printed if line.startswith("---")]
    assert len(headings) == 2
    assert all("verbosity:" in line for line in headings)
    assert "> " not in "".join(printed)
    assert answers(monkeypatch, capsys, lines, *models) == printed


def test_a_wrong_line_of_a_script_ends_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], models: tuple[str, ...]
) -> None:
    """Nothing after it is answered under what it didn't set."""
    with pytest.raises(ValueError, match="unknown attribute 'humour'"):
        answers(monkeypatch, capsys, "/set humour=4\nName a river.\n", *models)
    assert capsys.readouterr().out == ""


def test_all_problems_of_the_config_are_named(acsft_model: Path) -> None:
    keys = ("attribute_model=null", "temperature=-1", "top_p=0")
    with pytest.raises(ValueError, match=r"(?s)'temperature'.*'top_p'.*'show_scores'"):
        recipe_config("chat", "tiny/chat", f"checkpointer.checkpoint_dir={acsft_model}", *keys)


def test_in_a_terminal(run_script: RunScript) -> None:
    """Editing, earlier lines, several lines, Ctrl-C in an answer and at the prompt, Ctrl-D."""
    run_script(Path(__file__).with_name("terminal_chat.py"))
