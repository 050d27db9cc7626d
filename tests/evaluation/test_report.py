"""Reports: tables side by side, and a page that needs no other file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
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
    """Two models, the second compared with the first."""
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


HOSTILE = """'"><b>{{ 7 }}{% x %}$\\x$&lt;"""


class Page(HTMLParser):
    """Tags with their attributes, except for the images, and texts, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[object] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [attr for attr in attrs if attr[0] != "src"]))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"end of {tag}")

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def page_with(name: str) -> list[object]:
    """A page on which everything that can be named is called `name`, with a number in front."""
    model, baseline = f"1{name}", f"2{name}"
    metric, attribute, title, column, text = (f"{i}{name}" for i in range(3, 8))
    curve = [{"attribute": attribute, "requested": 4, "mean_score": 3.5, "std_score": 0.25}]
    cross_talk = {attribute: {attribute: 0.9}}
    first = SteeringResult({"steering_mae": 0.5, metric: 1.0}, curve, cross_talk)
    second = SteeringResult({"steering_mae": 0.4}, curve, cross_talk, baseline, {metric: -0.1})
    return Page(
        html_page({baseline: first, model: second}, {title: [{column: 1, "more": text}]})
    ).found


def test_markup_in_names_is_text_on_the_page() -> None:
    """Nothing but the texts differs from a page with harmless names, and all seven are there."""
    expected = [
        text.replace("harmless", HOSTILE) if isinstance(text, str) else text
        for text in page_with("harmless")
    ]
    assert page_with(HOSTILE) == expected
    assert {f"{i}{HOSTILE}" for i in range(1, 8)} <= {x for x in expected if isinstance(x, str)}


def test_other_sections_stand_above_everything_else(results: dict[str, SteeringResult]) -> None:
    page = html_page(results, {"Stages & more": [{"stage": "sft", "seconds": 1.5}]})
    table = '<th>seconds</th></tr>\n<tr><td class="text">sft</td><td>1.500</td></tr>'
    places = [page.index(text) for text in ("<h2>Stages &amp; more</h2>", table, "<img")]
    assert places == sorted(places)
