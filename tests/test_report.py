"""Reports: tables side by side, and a page that needs no other file."""

from __future__ import annotations

import re

import pytest

from steerlm2.report import SteeringResult, html_page, markdown, markdown_table


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
    first = SteeringResult(
        {"steering_mae": 0.5}, [row], {"humor": {"humor": 0.9}}, {"mean": 7.0}, 2
    )
    second = SteeringResult({"steering_mae": 0.25}, [row], {}, {"mean": 8.0}, 3)
    return {"acsft": first, "<b>": second}


def test_models_stand_side_by_side(results: dict[str, SteeringResult]) -> None:
    text = markdown(results)
    assert "| metric | acsft | <b> |" in text
    assert "| steering_mae | 0.500 | 0.250 |" in text
    assert "| answers | 2 | 3 |" in text


def test_an_empty_table_says_so() -> None:
    assert markdown_table([]) == "(nothing)"


def test_the_page_loads_nothing(results: dict[str, SteeringResult]) -> None:
    """Its one image stands in it, and there is no script and no link."""
    page = html_page(results)
    assert re.findall(r'src="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert not re.search(r"<script|<link|https?://", page)


def test_names_are_text_on_the_page(results: dict[str, SteeringResult]) -> None:
    assert "<b>" not in html_page(results)
    assert "&lt;b&gt;" in html_page(results)
