"""Results of `evaluate_steering` for people: Markdown, and an HTML page without other files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass

from steerlm2.evaluation import Table

CROSS_TALK = "Change of each score for one more point asked for (ideal: 1 and 0)"


@dataclass
class SteeringResult:
    """What one model's answers come to."""

    metrics: dict[str, float]
    curve: Table
    cross_talk: dict[str, dict[str, float]]
    lengths: dict[str, float]
    """Of the answers, in words: mean, median, 90th percentile."""
    num_answers: int


def metric_rows(results: Mapping[str, SteeringResult]) -> Table:
    """One row a metric, one column a model."""
    names = dict.fromkeys(name for result in results.values() for name in result.metrics)
    rows: Table = [{"metric": "answers", **{m: r.num_answers for m, r in results.items()}}]
    for name in names:
        rows.append({"metric": name, **{m: r.metrics.get(name, "-") for m, r in results.items()}})
    for name in next(iter(results.values())).lengths:
        rows.append({"metric": f"words, {name}"} | {m: r.lengths[name] for m, r in results.items()})
    return rows


def cross_talk_rows(result: SteeringResult) -> Table:
    """One row a requested attribute, one column an obtained one."""
    return [{"one more of": name} | slopes for name, slopes in result.cross_talk.items()]


def markdown(results: Mapping[str, SteeringResult]) -> str:
    """The metrics of all models side by side, then cross-talk and curve of each."""
    parts = ["# Steering", markdown_table(metric_rows(results))]
    for name, result in results.items():
        parts += [
            f"## {name}",
            "Change of each score for one more point asked for (ideal: 1 and 0):",
        ]
        parts += [markdown_table(cross_talk_rows(result)), "Asked for and obtained:"]
        parts += [markdown_table(result.curve)]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Table) -> str:
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(v) for v in r.values()] for r in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def html_page(results: Mapping[str, SteeringResult]) -> str:
    """The same as a page with a plot; it loads nothing."""
    parts = [f'<img alt="asked for and obtained" src="{_plot(results)}">']
    parts += ["<h2>Models</h2>", _html_table(metric_rows(results))]
    for name, result in results.items():
        parts += [f"<h2>{html.escape(name)}</h2>"]
        parts += [f"<p>{CROSS_TALK}</p>"]
        parts += [_html_table(cross_talk_rows(result)), "<p>Asked for and obtained</p>"]
        parts += [_html_table(result.curve)]
    return _PAGE.format(body="\n".join(parts))


def _plot(results: Mapping[str, SteeringResult]) -> str:
    """Mean score over requested value, a panel for each attribute, as a data URL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ("requested", "mean_score", "std_score")
    names = list(dict.fromkeys(str(row["attribute"]) for r in results.values() for row in r.curve))
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, attribute in zip(
        figure.subplots(1, len(names), squeeze=False)[0], names, strict=True
    ):
        for name, result in results.items():
            rows = [row for row in result.curve if row["attribute"] == attribute]
            asked, mean, std = ([float(row[key]) for row in rows] for key in columns)
            panel.errorbar(asked, mean, yerr=std, marker="o", capsize=3, label=name)
        limits = panel.get_xlim()
        panel.plot(limits, limits, color="gray", linestyle=":", label="as asked for")
        panel.set(title=attribute, xlabel="asked for", ylabel="score")
        panel.grid(alpha=0.3)
        panel.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html_table(rows: Table) -> str:
    if not rows:
        return "<p>(nothing)</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: float | int | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Steering</title>
<style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>Steering</h1>
{body}
</body></html>
"""
