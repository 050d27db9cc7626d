"""Requested against obtained attributes, for one model or several side by side.

    tune run sample_responses --config tiny/sample_responses label.kind=uniform \\
        label.attributes=[humor,verbosity] label.labels_per_prompt=5 \\
        input=prompts.jsonl output=answers.jsonl
    tune run annotate_attributes --config tiny/annotate_attributes \\
        input=answers.jsonl output=scored.jsonl
    tune run evaluate_steering --config tiny/evaluate_steering \\
        models.acsft=scored.jsonl models.steerlm2=other_scored.jsonl output_dir=steering

A model's answers are a file of SteerLM2 records: sample_responses makes them for a grid of labels,
annotate_attributes gives them the `scores` of an attribute model. Where an attribute can be
computed from the text, `exact_scorer` does that instead.

Into output_dir go steering.json, steering.md and steering.html.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from steerlm2.attributes import NOT_LABELLED, as_schema, parse_label
from steerlm2.data.records import Record, Response, first_of, read_records
from steerlm2.evaluation import cross_talk, steering_curve, steering_metrics
from steerlm2.report import SteeringResult, html_page, markdown, markdown_table, metric_rows
from steerlm2.training.config import Component, instantiate, recipe_main, to_plain
from steerlm2.training.output import make_output_dir


@dataclass
class EvaluateConfig:
    """Every key of the recipe, with its default."""

    output_dir: str
    models: dict[str, str] = field(default_factory=dict)  # NAME: its answers, SteerLM2 records
    schema: dict[str, Any] | None = None  # names, min_value and max_value; none: the default ones
    exact_scorer: Component | None = None  # text -> {attribute: score}; none: stored `scores`
    metric_logger: Component | None = None

    def problems(self) -> list[str]:
        """What is wrong between keys that are right by themselves."""
        try:
            as_schema(self.schema)
        except (ValueError, TypeError) as error:
            return [f"'schema': {error}"]
        return []


class EvaluateRecipe:
    """The run: evaluate -> report."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        self.cfg = cfg
        self.schema = as_schema(cfg.schema)
        self.output_dir = Path(cfg.output_dir)

    def evaluate(self) -> dict[str, SteeringResult]:
        """The result of every model, in the order of the config."""
        if not self.cfg.models:
            raise ValueError("'models' is empty: add models.NAME=FILE, its answers with `scores`")
        return {
            name: self._result(file, read_records(file, require=(), min_responses=1))
            for name, file in self.cfg.models.items()
        }

    def report(self, results: dict[str, SteeringResult]) -> None:
        make_output_dir(self.output_dir)
        plain = {name: dataclasses.asdict(result) for name, result in results.items()}
        (self.output_dir / "steering.json").write_text(json.dumps(plain, indent=2) + "\n")
        (self.output_dir / "steering.md").write_text(markdown(results))
        (self.output_dir / "steering.html").write_text(html_page(results))
        print(f"{markdown_table(metric_rows(results))}\n\nreport: {self.output_dir}/steering.html")
        if self.cfg.metric_logger:
            logger = instantiate(self.cfg.metric_logger)
            logger.log_config(OmegaConf.create(to_plain(self.cfg)))
            for name, result in results.items():
                logger.log_dict({f"{name}/{k}": v for k, v in result.metrics.items()}, step=0)
            logger.close()

    def _result(self, file: str, records: list[Record]) -> SteeringResult:
        requested_NA, scores_NA, words = [], [], []
        problems = []
        for number, record in enumerate(records, start=1):
            try:
                wanted = parse_label(record.label or "", self.schema)
                requested = [float(wanted.get(name, NOT_LABELLED)) for name in self.schema.names]
                scored = [self._scores(response) for response in record.responses]
            except ValueError as error:
                problems.append(f"{file}, record {number}: {error}")
                continue
            scores_NA += scored
            requested_NA += [requested] * len(scored)
            words += [len(response.value.split()) for response in record.responses]
        if problems:
            raise ValueError("\n".join(first_of(problems)))
        lengths = {
            "mean": float(np.mean(words)),
            "median": float(np.median(words)),
            "90th percentile": float(np.percentile(words, 90)),
        }
        return SteeringResult(
            steering_metrics(scores_NA, requested_NA, self.schema),
            steering_curve(scores_NA, requested_NA, self.schema),
            cross_talk(scores_NA, requested_NA, self.schema),
            lengths,
            len(words),
        )

    def _scores(self, response: Response) -> list[float]:
        """Of all attributes, in the order of the schema."""
        scores = response.scores or {}
        if self.cfg.exact_scorer:
            scores = instantiate(self.cfg.exact_scorer, response.value)
        if lacking := [name for name in self.schema.names if name not in scores]:
            raise ValueError(
                f"a response has no score for {', '.join(lacking)}: annotate_attributes adds them, "
                "or set schema.names"
            )
        return [float(scores[name]) for name in self.schema.names]


@recipe_main(EvaluateConfig)
def main(cfg: EvaluateConfig) -> None:
    recipe = EvaluateRecipe(cfg)
    recipe.report(recipe.evaluate())


if __name__ == "__main__":
    main()
