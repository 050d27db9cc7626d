"""Results of models for people: Markdown, W&B, and an HTML page that needs no other file.

The page begins with the results. A pipeline's has its training and its commands too (`Run`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from steerlm2.attributes import parse_label
from steerlm2.data.records import Record, write_records
from steerlm2.escaping import markdown_text
from steerlm2.evaluation.agreement import Table
from steerlm2.evaluation.charts import Chart, Point, Series, line_chart, thinned
from steerlm2.evaluation.examples import MODEL
from steerlm2.files import write_durably
from steerlm2.page_templates import page_template

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""By column, numbers and text; None is what a row doesn't have."""

CURVE = "Asked for and obtained"
CROSS_TALK = "Change of each score for one more point asked for (ideal: 1 and 0)"

GLOSSARY = {
    "answers": "answers that were scored",
    "left_out": "prompts that were too long to be answered",
    "truncated": "share of answers that were cut off; they are scored as they are",
    "empty": "share of sampled answers without text; they are not scored",
    "not_utf8": "answers that aren't valid UTF-8 (half an emoji); they are scored as they are",
    "encoded_otherwise": "answers whose text encodes to other tokens than were sampled",
    "unknown_tokens": "answers whose server didn't give the sampled tokens",
    "steering_mae": "mean |score - requested value|, averaged over attributes (each scaled to the "
    "mean width of their ranges, where these differ)",
    "steering_mae_se": "standard error over requests; of a change, of the paired differences",
    "steering_exact_match": "share of scores that round to the requested value, averaged likewise",
    "words_mean": "length of an answer; words_p90 is its 90th percentile",
    "distinct_1": "share of different words; distinct_2 of pairs of words: low: repetition, or "
    "longer answers",
    "independent_mae": "steering_mae by an attribute model that was trained on other labels; it "
    "should fall along",
    "independent_mae_se": "its standard error over requests",
    "kl_reference": "KL in nats of what was sampled from the reference model P(y|x), an answer: "
    "mean log-prob that it was drawn with, less log P(y|x)",
    "kl_reference_se": "its standard error over requests",
    "kl_reference_answers": "answers whose log-probs are known",
    "exact_kl": "KL(P(y|a,x) || Q(y|a,x)) in nats over all answers there are: not sampled",
    "exact_kl_weighted": "the same with requests weighted by P(a|x)",
    "exact_mass": "the model's probability of all answers there are together",
    "exact_steering_mae": "steering_mae of the model's own distribution, at temperature 1",
    "exact_least_steering_mae": "the same of P(y|a,x) itself: what a perfect model has",
}
"""Metric -> what it is."""

LOWER, HIGHER = "lower is better", "higher is better"


@dataclass(frozen=True)
class Headline:
    """A column of the page's first table."""

    metric: str
    title: str
    better: str
    """LOWER, HIGHER, or nothing where neither is."""
    meaning: str
    form: str = ".3f"
    """Of its numbers, as `format` takes it."""


HEADLINES = (
    Headline(
        "steering_mae",
        "Steering error",
        LOWER,
        "how far an answer's score is from the value that was asked for, in points, on average",
    ),
    Headline(
        "steering_exact_match",
        "Exactly as asked",
        HIGHER,
        "share of scores that are the value that was asked for, once rounded",
        ".1%",
    ),
    Headline(
        "independent_mae",
        "By another model",
        LOWER,
        "the steering error by an attribute model that was trained on other labels",
    ),
    Headline(
        "kl_reference",
        "KL from reference",
        "",
        "how far the answers are from the reference model's own, in nats an answer",
        ".1f",
    ),
    Headline(
        "exact_kl",
        "Exact KL",
        LOWER,
        "how far the model is from the best possible one, in nats: computed over all answers "
        "there are, not sampled; 0 is perfect",
    ),
    Headline("words_mean", "Words", "", "in an answer, on average", ".1f"),
    Headline("truncated", "Cut off", LOWER, "share of answers that didn't come to an end", ".1%"),
)

CURVES = ("loss", "distance")
"""Metrics of training that the page plots, each with its validation."""
PALETTE = 8
"""Colours that the page's style has for models; a ninth one begins anew."""

EXAMPLES = "examples.jsonl"


@dataclass
class SteeringResult:
    """What one model's answers come to."""

    metrics: dict[str, float]
    curve: Table
    cross_talk: dict[str, dict[str, float]]
    baseline: str | None = None
    """The model that this one is compared with."""
    change: dict[str, float] = field(default_factory=dict)
    """Its metrics less the baseline's."""
    sees_labels: bool = True
    """false: it was asked without the labels, and is compared with them."""


@dataclass(frozen=True)
class StageRun:
    """One stage of a pipeline."""

    name: str
    command: str
    seconds: float
    config: str | None = None
    """What it ran with, as YAML; None where it left none."""

    @property
    def time(self) -> str:
        return duration(self.seconds)


@dataclass(frozen=True)
class Run:
    """What a pipeline's page says besides the results."""

    title: str
    facts: Mapping[str, str]
    """What stands at the top: "Base model" -> "Llama-3.2-1B"."""
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Training stage -> the entries of its metrics.jsonl."""
    stages: Sequence[StageRun] = ()
    config: str | None = None
    """The pipeline's, as YAML."""

    @property
    def time(self) -> str:
        return duration(sum(stage.seconds for stage in self.stages))


def write_report(
    results: Mapping[str, SteeringResult], folder: Path, examples: Sequence[Record] = ()
) -> None:
    """steering.json, steering.md and steering.html, and examples.jsonl where there are examples."""
    plain = {name: asdict(result) for name, result in results.items()}
    write_durably(folder / "steering.json", json.dumps(plain, indent=2) + "\n")
    write_durably(folder / "steering.md", markdown(results))
    write_durably(folder / "steering.html", html_page(results, examples))
    (folder / EXAMPLES).unlink(missing_ok=True)
    if examples:
        write_records(folder / EXAMPLES, examples)


def read_report(path: str | Path) -> dict[str, SteeringResult]:
    """The results that a steering.json holds, by model.

    Raises:
        FileNotFoundError: where it doesn't exist.
    """
    plain = json.loads(Path(path).read_text())
    return {name: SteeringResult(**result) for name, result in plain.items()}


def metric_rows(results: Mapping[str, SteeringResult]) -> Rows:
    """One row a metric, one column a model."""
    return _side_by_side({model: result.metrics for model, result in results.items()})


def change_rows(results: Mapping[str, SteeringResult]) -> Rows:
    """One row a metric, one column a model that is compared with the baseline."""
    return _side_by_side({model: r.change for model, r in results.items() if r.baseline})


def cross_talk_rows(result: SteeringResult) -> Rows:
    """One row a requested attribute, one column an obtained one."""
    return [{"one more of": name, **slopes} for name, slopes in result.cross_talk.items()]


def all_models(results: Mapping[str, SteeringResult]) -> dict[str, Rows]:
    """Title -> table with the models side by side."""
    found = {"Models": metric_rows(results)}
    for baseline in {result.baseline: None for result in results.values() if result.baseline}:
        found[f"Change against {baseline}"] = change_rows(results)
    return found


def markdown(results: Mapping[str, SteeringResult]) -> str:
    """The metrics of all models side by side, then cross-talk and curve of each."""
    parts = ["# Steering"]
    for title, rows in all_models(results).items():
        parts += [f"## {markdown_text(title)}", markdown_table(rows)]
    parts += ["\n".join(f"- `{name}`: {text}" for name, text in _meanings(results).items())]
    for name, result in results.items():
        parts += [f"## {markdown_text(name)}"]
        parts += [f"{CROSS_TALK}:", markdown_table(cross_talk_rows(result))]
        parts += [f"{CURVE}:", markdown_table(result.curve)]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    if not rows:
        return "(nothing)"
    texts = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    head, *rest = [[markdown_text(text) for text in line] for line in texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest))


def html_page(
    results: Mapping[str, SteeringResult],
    examples: Sequence[Record] = (),
    run: Run | None = None,
) -> str:
    """The results as a page; it loads nothing, and has no script.

    Args:
        examples: of `choose_examples`.
        run: the pipeline's that trained the models.
    """
    return page_template("steerlm2.evaluation", "report.html.jinja", _cell).render(
        results=results,
        colors={name: place % PALETTE for place, name in enumerate(results)},
        headlines=headline_rows(results),
        columns=headlines(results),
        perfect=_perfect_error(results),
        examples=[_Example(record, list(results)) for record in examples],
        steering=steering_charts(results),
        training=training_charts(run.training) if run else [],
        side_by_side=all_models(results),
        meanings=_meanings(results),
        cross_talk_title=CROSS_TALK,
        run=run,
    )


def headlines(results: Mapping[str, SteeringResult]) -> list[Headline]:
    """The columns of the first table: those that any model has a number for."""
    return [
        column
        for column in HEADLINES
        if any(column.metric in result.metrics for result in results.values())
    ]


@dataclass(frozen=True)
class Cell:
    """A number of the page's first table."""

    text: str
    error: str = ""
    """Its standard error."""
    share: float | None = None
    """Of the largest number beside it, for a bar; None: no bar."""
    is_best: bool = False


def headline_rows(results: Mapping[str, SteeringResult]) -> dict[str, list[Cell]]:
    """Model -> its cell in each column of the first table."""
    rows: dict[str, list[Cell]] = {name: [] for name in results}
    for column in headlines(results):
        values = [result.metrics.get(column.metric, math.nan) for result in results.values()]
        known = [value for value in values if math.isfinite(value)]
        best = None
        if column.better and len(known) > 1 and min(known) < max(known):
            best = min(known) if column.better == LOWER else max(known)
        for (name, result), value in zip(results.items(), values, strict=True):
            if column.metric not in result.metrics:
                rows[name].append(Cell("-"))
                continue
            error = result.metrics.get(f"{column.metric}_se")
            has_bar = column.better and math.isfinite(value)
            rows[name].append(
                Cell(
                    format(value, column.form),
                    "" if error is None else f"± {error:{column.form}}",
                    max(value, 0.0) / (max(known) or 1.0) if has_bar else None,
                    value == best,
                )
            )
    return rows


def steering_charts(results: Mapping[str, SteeringResult]) -> list[Chart]:
    """Mean score over requested value, a chart for each attribute."""
    names = list(dict.fromkeys(str(row["attribute"]) for r in results.values() for row in r.curve))
    charts = []
    for attribute in names:
        rows = {
            model: [row for row in result.curve if row["attribute"] == attribute]
            for model, result in results.items()
        }
        asked = [float(row["requested"]) for own in rows.values() for row in own]
        ideal = [(value, value) for value in (min(asked), max(asked))]
        lines = [
            Series(
                model,
                [(float(row["requested"]), float(row["mean_score"])) for row in own],
                place % PALETTE,
                [float(row["std_score"]) for row in own],
                marked=True,
            )
            for place, (model, own) in enumerate(rows.items())
        ]
        charts.append(
            line_chart(
                attribute,
                [Series("ideal", ideal), *lines],
                x_label="asked for",
                y_label="obtained",
            )
        )
    return [chart for chart in charts if chart is not None]


def training_charts(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """The curves of every stage over its steps.

    Args:
        training: stage -> the entries of its metrics.jsonl.
    """
    charts = []
    for stage, entries in training.items():
        for metric in CURVES:
            lines = [
                Series("training", thinned(_points(entries, metric)), 0),
                Series(
                    "validation", _points(entries, f"val_{metric}"), 1, joined=False, marked=True
                ),
            ]
            charts.append(line_chart(f"{stage}: {metric}", lines, x_label="step"))
    return [chart for chart in charts if chart is not None]


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    left = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or parts or unit == "s":
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])


def log_to_wandb(results: Mapping[str, SteeringResult]) -> None:
    """The tables as W&B tables, into the run that is under way."""
    import wandb

    found = dict(all_models(results))
    for name, result in results.items():
        found[f"{name}/cross_talk"] = cross_talk_rows(result)
        found[f"{name}/curve"] = result.curve
    wandb.log(
        {
            title: wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
            for title, rows in found.items()
            if rows
        }
    )


def _side_by_side(columns: Mapping[str, Mapping[str, float]]) -> Rows:
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return [
        {"metric": name} | {model: column.get(name) for model, column in columns.items()}
        for name in names
    ]


def _meanings(results: Mapping[str, SteeringResult]) -> dict[str, str]:
    return {
        name: text
        for name, text in GLOSSARY.items()
        if any(name in result.metrics for result in results.values())
    }


def _perfect_error(results: Mapping[str, SteeringResult]) -> float | None:
    """The steering error of the best possible model, where it is known."""
    found = (result.metrics.get("exact_least_steering_mae") for result in results.values())
    return next((value for value in found if value is not None), None)


def _points(entries: Sequence[Mapping[str, Any]], metric: str) -> list[Point]:
    values = ((entry["step"], entry.get(metric)) for entry in entries)
    return [(step, value) for step, value in values if isinstance(value, int | float)]


class _Example:
    """A request and, in the order of the columns, the answer of each model to it."""

    def __init__(self, record: Record, models: Sequence[str]) -> None:
        self.system, self.turns = record.system, record.prompt_turns
        self.asked = parse_label(str(record.label))
        by_model = {answer.extra.get(MODEL): answer for answer in record.responses}
        self.answers = {model: by_model.get(model) for model in models}

    def scores(self, model: str) -> list[tuple[str, float, int, bool]]:
        """(attribute, obtained, asked for, whether they are within half a point) of an answer."""
        answer = self.answers[model]
        scores = (answer.scores if answer is not None else None) or {}
        return [
            (name, scores[name], asked, abs(scores[name] - asked) <= 0.5)
            for name, asked in self.asked.items()
            if name in scores
        ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
