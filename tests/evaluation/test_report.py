"""Reports: tables side by side, and a page that needs no other file."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from steerlm2.data.records import Record, Response, Turn, read_records
from steerlm2.evaluation.examples import MODEL
from steerlm2.evaluation.report import (
    Cell,
    Run,
    StageRun,
    SteeringResult,
    change_rows,
    duration,
    headline_rows,
    html_page,
    markdown,
    markdown_table,
    read_report,
    steering_charts,
    training_charts,
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


@pytest.fixture
def examples() -> list[Record]:
    """Two requests; the second model has no answer to the second one."""

    def answer(model: str, number: int, humor: float, ended: str) -> Response:
        scores = {"humor": humor, "wit": 1.0}
        return Response(
            f"{model} says {number}", scores=scores, finish_reason=ended, extra={MODEL: model}
        )

    return [
        Record(
            "Be kind.",
            [Turn("User", "question 1")],
            "humor:4",
            [answer("<b>", 1, 2.0, "stop"), answer("acsft", 1, 3.75, "length")],
        ),
        Record(
            "Be kind.", [Turn("User", "question 2")], "humor:4", [answer("acsft", 2, 3.75, "stop")]
        ),
    ]


@pytest.fixture
def run() -> Run:
    entries = [{"step": step, "loss": 1.0 / step, "distance": 0.5} for step in (1, 2, 3)]
    return Run(
        "SteerLM 2.0: mine",
        {"Base model": "Llama-3.2-1B"},
        {"data": [], "steerlm2_iter1": entries},
        [StageRun("sft", "tune run sft_distributed", 75.0, "lr: 1.0")],
        "iterations: 2",
    )


def test_models_stand_side_by_side(results: dict[str, SteeringResult]) -> None:
    """What one of them doesn't have is a dash."""
    text = markdown(results)
    assert "| metric | acsft | &lt;b&gt; |" in text
    assert "| steering_mae | 0.500 | 0.250 |" in text
    assert "| exact_kl | 1.250 | - |" in text
    assert "| answers | 2 | 3 |" in text


def test_names_are_text_in_markdown(results: dict[str, SteeringResult]) -> None:
    """Of models and attributes: no cell more, no tag, no formula, no link."""
    row = results["acsft"].curve[0] | {"attribute": "$x$|<i>"}
    name = "[a](b)|<script>\x1b"
    hostile = SteeringResult({"steering_mae": 0.5}, [row], {"$x$|<i>": {"$x$|<i>": 1.0}}, name)
    text = markdown({name: hostile})
    assert r"| metric | \[a\](b)\|&lt;script&gt;\ufffd |".replace(r"\ufffd", "\ufffd") in text
    assert r"| one more of | \$x\$\|&lt;i&gt; |" in text
    assert r"## Change against \[a\](b)\|&lt;script&gt;" in text
    assert not {"<", "\x1b"} & set(text)


def test_changes_are_of_the_models_that_are_compared(results: dict[str, SteeringResult]) -> None:
    assert change_rows(results) == [{"metric": "steering_mae", "<b>": -0.25}]
    assert "## Change against acsft\n\n| metric | &lt;b&gt; |" in markdown(results)
    assert "Change against" not in markdown({"acsft": results["acsft"]})


def test_metrics_that_are_there_are_explained(results: dict[str, SteeringResult]) -> None:
    text = markdown(results)
    assert "- `exact_kl`: KL(P(y|a,x) || Q(y|a,x))" in text
    assert "`exact_mass`" not in text


def test_an_empty_table_says_so() -> None:
    assert markdown_table([]) == "(nothing)"


def test_a_report_that_was_written_can_be_read(
    results: dict[str, SteeringResult], examples: list[Record], tmp_path: Path
) -> None:
    write_report(results, tmp_path, examples)
    assert read_report(tmp_path / "steering.json") == results
    assert (tmp_path / "steering.md").read_text() == markdown(results)
    assert (tmp_path / "steering.html").read_text() == html_page(results, examples)
    assert read_records(tmp_path / "examples.jsonl", require=(), min_responses=1) == examples
    write_report(results, tmp_path)
    assert not (tmp_path / "examples.jsonl").exists(), "those of another evaluation"


def test_the_page_loads_nothing(
    results: dict[str, SteeringResult], examples: list[Record], run: Run
) -> None:
    """Its charts are SVG that stands in it; there is no script, no link, no file of style."""
    page = html_page(results, examples, run)
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 3, "a steering curve; loss and distance of one stage"
    assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|\bhref=|https?:|url\(|@import", page)


def test_sections_stand_in_the_order_in_which_they_are_read(
    results: dict[str, SteeringResult], examples: list[Record], run: Run
) -> None:
    """What was run, the results, answers, training, steering; commands at the end, folded."""
    page = html_page(results, examples, run)
    assert titles(page) == [
        *("SteerLM 2.0: mine", "Results", "Sampled answers", "Training"),
        *("Asked for and obtained", "Details"),
    ]
    (facts,) = re.findall(r"<h1>.*?</dl>", page, re.DOTALL)[:1]
    assert "<dt>Base model</dt><dd>Llama-3.2-1B</dd>" in facts
    assert "<dt>Models</dt><dd>acsft, &lt;b&gt;</dd>" in facts
    for text in ("tune run sft_distributed", "lr: 1.0", "iterations: 2"):
        before, after = page.split(text)
        assert before.count("<details>") > before.count("</details>"), f"{text} is folded"
        assert "<h2>Details" in before
        assert "<h2>" not in after


def test_what_there_is_not_leaves_no_section(results: dict[str, SteeringResult]) -> None:
    """One model, no curve, no examples, no run."""
    whole = ["Steering", "Results", "Asked for and obtained", "Details"]
    alone = {"<b>": SteeringResult({"steering_mae": 0.25}, [], {})}
    assert titles(html_page(results)) == titles(html_page(alone)) == whole
    page = html_page(alone)
    assert "<svg" not in page
    assert 'class="best"' not in page, "it is compared with nothing"
    assert "No attribute was asked for in all answers with more than one value" in page
    bare = Run("mine", {}, {"data": []})
    assert titles(html_page(alone, [], bare)) == ["mine", *whole[1:]], "no metrics, no stages"


def test_the_first_table_says_which_is_better_and_which_is_best(
    results: dict[str, SteeringResult],
) -> None:
    """A bar is as long as its share of the largest; one number alone is not the best."""
    rows = headline_rows(results)
    error = [rows[model][0] for model in results]
    assert [(cell.text, cell.share, cell.is_best) for cell in error] == [
        ("0.500", 1.0, False),
        ("0.250", 0.5, True),
    ]
    assert rows["acsft"][1] == Cell("1.250", share=1.0), "exact_kl"
    assert rows["<b>"][1] == Cell("-")
    page = html_page(results)
    assert "Steering error<small>lower is better</small>" in page
    assert "Exactly as asked" not in page, "no model has it"


def test_of_shares_more_is_better_and_an_error_stands_beside() -> None:
    results = {
        name: SteeringResult({"steering_mae_se": 0.02, **metrics}, [], {})
        for name, metrics in {
            "one": {"steering_mae": math.nan, "steering_exact_match": 0.25},
            "two": {"steering_mae": 0.5, "steering_exact_match": 0.5},
        }.items()
    }
    rows = headline_rows(results)
    assert rows["one"] == [Cell("nan", "± 0.020"), Cell("25.0%", share=0.5)]
    assert rows["two"] == [Cell("0.500", "± 0.020", 1.0), Cell("50.0%", "", 1.0, True)]
    assert "nan%" not in html_page(results)


def test_a_model_that_isnt_shown_the_labels_is_marked(results: dict[str, SteeringResult]) -> None:
    assert "not shown the label" not in html_page(results)
    results["acsft"].sees_labels = False
    assert html_page(results).count("not shown the label") == 1


def test_all_answers_to_one_request_stand_in_one_row(
    results: dict[str, SteeringResult], examples: list[Record]
) -> None:
    """A column a model, in the order of the results; each with its scores beside what was asked."""
    page = html_page(results, examples)
    requests = re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert len(requests) == 2
    for request, number in zip(requests, (1, 2), strict=True):
        asked, answers = re.findall(r"<tr.*?</tr>", request, re.DOTALL)
        assert f"question {number}" in asked
        assert "humor 4" in asked
        first, second = re.findall(r"<td.*?</td>", answers, re.DOTALL)
        assert f"acsft says {number}" in first
        assert "humor 3.75 <small>asked 4</small>" in first
        assert 'class="score near"' in first
        assert ("(cut off)" in first) == (number == 1)
        assert "wit" not in first, "a score that nobody asked for"
        if number == 1:
            assert "&lt;b&gt; says 1" in second
            assert "humor 2.00 <small>asked 4</small>" in second
            assert 'class="score near"' not in second
        else:
            assert "(no answer)" in second


def test_a_system_text_that_all_share_is_said_once(
    results: dict[str, SteeringResult], examples: list[Record]
) -> None:
    assert html_page(results, examples).count("Be kind.") == 1
    examples[1].system = "Be brief."
    page = html_page(results, examples)
    assert page.index("Be kind.") < page.index("question 1") < page.index("Be brief.")


def test_a_stage_has_a_chart_of_each_metric_that_it_trains_on() -> None:
    entries = [
        {"step": 0, "val_loss": 4.0},
        {"step": 1, "loss": 3.0, "lr": 0.1},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": 1.0, "distance": None},
    ]
    (chart,) = training_charts({"data": [], "sft": entries})
    assert chart.title == "sft: loss"
    training, validation = chart.lines
    assert training.path.count("M") == 2, "not joined where the loss isn't a number"
    assert (len(validation.dots), validation.path) == (1, "")


def test_a_curve_has_its_own_attributes_range() -> None:
    rows = [
        {"attribute": name, "requested": value, "mean_score": 1.0, "std_score": 0.0}
        for name, values in {"formality": (0, 10), "length": (1, 5)}.items()
        for value in values
    ]
    formality, length = steering_charts({"one": SteeringResult({}, rows, {})})
    assert [tick.text for tick in formality.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [tick.text for tick in length.x_ticks] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7210, "2 h 0 min"), (9e4, "1 d 1 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


HOSTILE = """'"><b>{{ 7 }}{% x %}$\\x$&lt;</style><script>"""


class Page(HTMLParser):
    """Tags with their attributes, and texts, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag, *(part or "" for attr in attrs for part in attr)]

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"end of {tag}")

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def titles(page: str) -> list[str]:
    return re.findall(r"<h[12]>(.*?)</h[12]>", page)


def page_with(text: str) -> list[str]:
    """A page on which everything that comes from data is `text`, with a number in front."""
    baseline, model, metric, attribute = (f"{i}{text}" for i in range(1, 5))
    curve = [{"attribute": attribute, "requested": 4, "mean_score": 3.5, "std_score": 0.25}]
    cross_talk = {attribute: {attribute: 0.9}}
    first = SteeringResult({"steering_mae": 0.5, metric: 1.0}, curve, cross_talk)
    second = SteeringResult({"steering_mae": 0.4}, curve, cross_talk, baseline, {metric: -0.1})
    answer = Response(f"5{text}", scores={"wit": 4.0}, extra={MODEL: model})
    turns = [Turn("User", f"6{text}"), Turn(f"7{text}", "x"), Turn("User", "y")]
    example = Record(f"8{text}", turns, "wit:4", [answer])
    run = Run(
        f"9{text}",
        {f"10{text}": f"11{text}"},
        {f"12{text}": [{"step": 1, "loss": 1.0}]},
        [StageRun(f"13{text}", f"14{text}", 1.0, f"15{text}")],
        f"16{text}",
    )
    return Page(html_page({baseline: first, model: second}, [example], run)).found


def test_markup_in_data_is_text_on_the_page() -> None:
    """Nothing but the texts differs from a page of harmless ones, and all sixteen are there."""
    found = page_with(HOSTILE)
    assert found == [text.replace("harmless", HOSTILE) for text in page_with("harmless")]
    whole = "".join(found)
    assert all(f"{i}{HOSTILE}" in whole for i in range(1, 17))
