"""Results of `evaluate_steering` for people: Markdown, an HTML page without other files, W&B."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from steerlm2.evaluation.agreement import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "exact_kl": "KL(P(y|a,x) || Q(y|a,x)) in nats over all answers there are: not sampled",
    "exact_kl_weighted": "the same with requests weighted by P(a|x)",
    "exact_mass": "the model's probability of all answers there are together",
    "exact_steering_mae": "steering_mae of the model's own distribution, at temperature 1",
    "exact_least_steering_mae": "the same of P(y|a,x) itself: what a perfect model has",
}
"""Metric -> what it is."""

PANEL_INCHES, PANELS_IN_A_ROW = (4.0, 3.4), 3


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


def write_report(results: Mapping[str, SteeringResult], folder: Path) -> None:
    """steering.json, steering.md and steering.html."""
    plain = {name: asdict(result) for name, result in results.items()}
    (folder / "steering.json").write_text(json.dumps(plain, indent=2) + "\n")
    (folder / "steering.md").write_text(markdown(results))
    (folder / "steering.html").write_text(html_page(results))


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
        parts += [f"## {title}", markdown_table(rows)]
    parts += ["\n".join(f"- `{name}`: {text}" for name, text in _meanings(results).items())]
    for name, result in results.items():
        parts += [f"## {name}", f"{CROSS_TALK}:", markdown_table(cross_talk_rows(result))]
        parts += [f"{CURVE}:", markdown_table(result.curve)]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(v) for v in r.values()] for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def html_page(
    results: Mapping[str, SteeringResult], extra_sections: Mapping[str, Rows] | None = None
) -> str:
    """The same as a page with plots; it loads nothing.

    Args:
        extra_sections: title -> table, that stand above everything else.
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        plots = {
            "errors": _plot(_error_bars(results)),
            "curves": _plot(_curves(results)),
            "cross_talk": _plot(_heat_maps(results))
            if any(result.cross_talk for result in results.values())
            else None,
        }
    return _template().render(
        results=results,
        extra_sections=extra_sections or {},
        side_by_side=all_models(results),
        meanings=_meanings(results),
        curve_title=CURVE,
        cross_talk_title=CROSS_TALK,
        **plots,
    )


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


def _error_bars(results: Mapping[str, SteeringResult]) -> Figure:
    """The errors of all models, a panel for each kind that there is."""
    kinds = [
        kind
        for kind in ("steering_mae", "exact_steering_mae", "exact_kl")
        if any(kind in result.metrics for result in results.values())
    ]
    inches = (7.0 if len(kinds) == 1 else PANEL_INCHES[0], 0.9 + 0.4 * len(results))
    figure, panels = _panels(len(kinds), inches)
    for panel, kind in zip(panels, kinds, strict=True):
        # matplotlib puts the first bar at the bottom
        known = [(n, r.metrics) for n, r in reversed(list(results.items())) if kind in r.metrics]
        values = [metrics[kind] for _, metrics in known]
        spread = [metrics.get(f"{kind}_se", 0.0) for _, metrics in known]
        colors = [_colors(results)[name] for name, _ in known]
        bars = panel.barh([name for name, _ in known], values, xerr=spread, color=colors)
        panel.bar_label(bars, [f" {value:.3f}" for value in values], padding=4)
        panel.margins(x=0.25)
        panel.set(title=kind)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(results: Mapping[str, SteeringResult]) -> Figure:
    """Mean score over requested value, a panel for each attribute."""
    columns = ("requested", "mean_score", "std_score")
    names = list(dict.fromkeys(str(row["attribute"]) for r in results.values() for row in r.curve))
    figure, panels = _panels(len(names))
    for panel, attribute in zip(panels, names, strict=True):
        values = [
            float(row["requested"])
            for result in results.values()
            for row in result.curve
            if row["attribute"] == attribute
        ]
        limits = (min(values), max(values))
        panel.plot(limits, limits, color="gray", linestyle=":", label="as asked for")
        for place, (name, result) in enumerate(results.items()):
            rows = [row for row in result.curve if row["attribute"] == attribute]
            asked, mean, std = ([float(row[key]) for row in rows] for key in columns)
            aside = 0.06 * (place - (len(results) - 1) / 2)  # bars that don't hide each other
            panel.errorbar(
                [value + aside for value in asked],
                mean,
                yerr=std,
                marker="o",
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                color=_colors(results)[name],
                label=name,
            )
        panel.set(title=attribute, xlabel="asked for", ylabel="score")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _heat_maps(results: Mapping[str, SteeringResult]) -> Figure:
    """Cross-talk, a panel for each model, in one scale of colours."""
    known = {name: result.cross_talk for name, result in results.items() if result.cross_talk}
    figure, panels = _panels(len(known))
    for panel, (name, matrix) in zip(panels, known.items(), strict=True):
        asked, obtained = list(matrix), list(next(iter(matrix.values())))
        values = [[matrix[row][column] for column in obtained] for row in asked]
        image = panel.imshow(values, cmap="RdBu", vmin=-1.2, vmax=1.2)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if abs(value) > 0.7 else "black"
                panel.text(
                    x, y, f"{round(value, 2) + 0:.2f}", ha="center", va="center", color=color
                )
        panel.set_xticks(range(len(obtained)), obtained, rotation=30, ha="right")
        panel.set_yticks(range(len(asked)), asked)
        panel.set(title=name, xlabel="score", ylabel="asked for")
    figure.colorbar(image, ax=panels, shrink=0.8)
    return figure


def _panels(count: int, inches: tuple[float, float] = PANEL_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of that width and height, in rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figsize = (inches[0] * columns, inches[1] * rows)
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in places[count:]:
        spare.remove()
    return figure, places[:count]


def _colors(results: Mapping[str, SteeringResult]) -> dict[str, str]:
    """A model has one colour in all plots."""
    return {name: f"C{place % 10}" for place, name in enumerate(results)}


@dataclass
class _Plot:
    """A picture inside the page."""

    png: str
    """In base64."""
    width: int
    """In pixels of the page: half of its own, for sharp letters."""


def _plot(figure: Figure) -> _Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180)
    return _Plot(base64.b64encode(buffer.getvalue()).decode(), round(figure.get_figwidth() * 90))


def _template() -> Template:
    """The page's template; a name that it lacks is an error."""
    environment = Environment(
        loader=PackageLoader("steerlm2.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("report.html.jinja")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
