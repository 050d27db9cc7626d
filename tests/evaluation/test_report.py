"""Reports: tables side by side, and a page that needs no other file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steerlm2.evaluation.report import (
    SteeringResult,
    change_rows,
    html_page,
    markdown,
    markdown_table,
    read_report,
    write_report,
)


@pytest.fixture
def results() -> dict[str, SteeringResult]:
    """Two models; the second has a name that HTML must not read as a tag."""
    row: dict[str, float | int | str] = {
        "attribute": "humor",
        "requested": 4,
        "answers": 2,
        "mean_score": 3.5,
        "std_score": 0.25,
    }
    return {
        "acsft": SteeringResult(
            {"steering_mae": 0.5, "exact_kl": 1.25, "answers": 2},
            [row],
            {"humor": {"humor": 0.9, "wit": -0.1}},
        ),
        "<b>": SteeringResult(
            {"steering_mae": 0.25, "answers": 3}, [row], {}, "acsft", {"steering_mae": -0.25}
        ),
    }


def test_models_stand_side_by_side(results: dict[str, SteeringResult]) -> None:
    """What one of them doesn't have is a dash."""
    text = markdown(results)
    assert "| metric | acsft | <b> |" in text
    assert "| steering_mae | 0.500 | 0.250 |" in text
    assert "| exact_kl | 1.250 | - |" in text
    assert "| answers | 2 | 3 |" in text


def test_changes_are_of_the_models_that_are_compared(results: dict[str, SteeringResult]) -> None:
    assert change_rows(results) == [{"metric": "steering_mae", "<b>": -0.25}]
    assert "## Change against acsft\n\n| metric | <b> |" in markdown(results)
    assert "Change against" not in markdown({"acsft": results["acsft"]})


def test_metrics_that_are_there_are_explained(results: dict[str, SteeringResult]) -> None:
    text = markdown(results)
    assert "- `exact_kl`: KL(P(y|a,x) || Q(y|a,x))" in text
    assert "`exact_mass`" not in text


def test_an_empty_table_says_so() -> None:
    assert markdown_table([]) == "(nothing)"


def test_a_report_that_was_written_can_be_read(
    results: dict[str, SteeringResult], tmp_path: Path
) -> None:
    write_report(results, tmp_path)
    assert read_report(tmp_path / "steering.json") == results
    assert (tmp_path / "steering.md").read_text() == markdown(results)
    assert (tmp_path / "steering.html").read_text() == html_page(results)


def test_the_page_loads_nothing(results: dict[str, SteeringResult]) -> None:
    """Its images (errors, curves, cross-talk) stand in it; there is no script and no link."""
    page = html_page(results)
    assert re.findall(r'src="([^"]{0,22})', page) == ["data:image/png;base64,"] * 3
    assert not re.search(r"<script|<link|https?://", page)


def test_without_cross_talk_the_page_says_so(results: dict[str, SteeringResult]) -> None:
    page = html_page({"<b>": results["<b>"]})
    assert page.count("<img") == 2
    assert "No attribute was asked for in all answers with more than one value" in page


def test_names_are_text_on_the_page(results: dict[str, SteeringResult]) -> None:
    assert "<b>" not in html_page(results)
    assert "&lt;b&gt;" in html_page(results)


def test_other_sections_stand_above_everything_else(results: dict[str, SteeringResult]) -> None:
    page = html_page(results, {"Stages & more": [{"stage": "sft", "seconds": 1.5}]})
    table = '<th>seconds</th></tr><tr><td class="text">sft</td><td>1.500</td></tr>'
    places = [page.index(text) for text in ("<h2>Stages &amp; more</h2>", table, "<img")]
    assert places == sorted(places)
