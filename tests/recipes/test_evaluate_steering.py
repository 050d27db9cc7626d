"""evaluate_steering from its command line: from labels and texts to a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from steerlm2.data.records import Record, Response, Turn, write_records

if TYPE_CHECKING:
    from tests.recipes.conftest import TuneProcess


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """humor 2 is asked for, and given once and missed by 1 once; verbosity 0, given twice."""
    responses = [Response("Yes. Ha! Ho!"), Response("No. Ha!")]
    record = Record("S", [Turn("User", "Q")], "humor:2,verbosity:0", responses)
    path = tmp_path / "answers.jsonl"
    write_records(path, [record])
    return path


def command(output_dir: Path, *more: str) -> list[str]:
    config = ("evaluate_steering", "--config", "tiny/evaluate_steering")
    return [*config, f"output_dir={output_dir}", *more]


def test_exact_scorer_counts_in_the_texts(tune: TuneProcess, answers: Path, tmp_path: Path) -> None:
    """|2 - 2|, |1 - 2|, |0 - 0|, |0 - 0|: mean 0.25; 3 of 4 exact."""
    output_dir = tmp_path / "out"
    result = tune(*command(output_dir, f"models.one={answers}", f"models.two={answers}"))
    report = json.loads((output_dir / "steering.json").read_text())
    assert list(report) == ["one", "two"]
    assert report["one"]["metrics"]["steering_mae"] == pytest.approx(0.25)
    assert report["one"]["metrics"]["steering_exact"] == pytest.approx(0.75)
    assert report["one"]["num_answers"] == 2
    assert "| steering_mae | 0.250 | 0.250 |" in result.stdout
    assert "| steering_mae | 0.250 | 0.250 |" in (output_dir / "steering.md").read_text()
    assert (output_dir / "steering.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "'models' is empty: add models.NAME=FILE"),
        (
            ["models.a={answers}", "exact_scorer=null"],
            "record 1: a response has no score for",
        ),
        (["models.a={answers}", "schema.names=[wit]"], "unknown attribute 'humor'"),
        (["models.a=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_mistakes_end_in_one_message(
    tune: TuneProcess, answers: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    arguments = [override.format(answers=answers) for override in overrides]
    result = tune(*command(tmp_path / "out", *arguments), check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
