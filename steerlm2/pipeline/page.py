"""report.html of a pipeline: its results, and how they came about, from what its stages left."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlm2.checkpoint_dirs import newest_export
from steerlm2.data.records import read_records
from steerlm2.evaluation.report import EXAMPLES, Run, StageRun, html_page, read_report
from steerlm2.masking import masked
from steerlm2.pipeline.plan import Stage
from steerlm2.pipeline.state import PipelineState
from steerlm2.runs.metrics import JsonLines

Values = Mapping[str, Mapping[str, Any]]
"""Stage -> the values of its config."""


def pipeline_page(
    output_dir: Path, plan: Sequence[Stage], values: Values, evaluation: Stage
) -> str:
    """The page of a pipeline whose evaluation is complete.

    What a stage didn't leave (metrics, a config, example answers) isn't on it.

    Args:
        output_dir: of the pipeline.
        values: of every stage of the plan.
        evaluation: the stage of the results.

    Raises:
        FileNotFoundError: where the evaluation left no steering.json.
    """
    steering = evaluation.folder / "steering.json"
    examples = evaluation.folder / EXAMPLES
    state = PipelineState(output_dir)
    stages = []
    for stage in plan:
        if record := state.read(stage.name):
            config = _text(stage.folder / "config.yaml")
            stages.append(StageRun(stage.name, masked(record.command), record.seconds, config))
    ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(steering.stat().st_mtime))
    facts = {
        "Date": ended,
        "Base model": ", ".join(base_models(plan, values)),
        "Data": ", ".join(data_sources(plan, values)),
        "Folder": str(output_dir.resolve()),
    }
    run = Run(
        f"SteerLM 2.0: {output_dir.resolve().name}",
        {name: masked(value) for name, value in facts.items() if value},
        {stage.name: JsonLines(stage.folder / "metrics.jsonl").read() for stage in plan},
        stages,
        _text(output_dir / "config.yaml"),
    )
    shown = read_records(examples, require=(), min_responses=1) if examples.exists() else []
    return html_page(read_report(steering), shown, run)


def base_models(plan: Sequence[Stage], values: Values) -> list[str]:
    """What training began with: checkpoints that no stage made, or the kind of a random model."""
    found: dict[str, None] = {}
    for stage in plan:
        own = values[stage.name]
        if "save_every_n_steps" not in own:  # it doesn't train
            continue
        folder = (own.get("checkpointer") or {}).get("checkpoint_dir")
        if folder is None:
            kind = (own.get("model") or {}).get("_component_", "a model")
            found[f"random weights ({kind})"] = None
        elif not _is_made_here(folder, plan):
            found[str(folder)] = None
    return list(found)


def data_sources(plan: Sequence[Stage], values: Values) -> list[str]:
    """What the stages read that no stage made: sources of prepare_data, else of datasets."""
    prepared = [stage for stage in plan if stage.recipe == "prepare_data"]
    found = dict.fromkeys(
        _source(values[stage.name].get("source"), stage.config)
        for stage in prepared
        if not _is_made_here(values[stage.name].get("source"), plan)
    )
    found |= dict.fromkeys(
        str(source)
        for stage in plan
        for source in _dataset_sources(values[stage.name])
        if not _is_made_here(source, plan)
    )
    return list(found)


def evaluated_models(plan: Sequence[Stage], values: Values, names: Collection[str]) -> list[Path]:
    """The folders of the stages that trained models of these names, where they left an export.

    An evaluation calls a model what its stage is called; it may know it only by its answers.
    """
    return [
        stage.folder
        for stage in plan
        if stage.name in names
        and "save_every_n_steps" in values[stage.name]
        and newest_export(stage.folder) is not None
    ]


def _source(source: object, config: str) -> str:
    return config if source is None else f"{source} ({config})"


def _dataset_sources(values: Mapping[str, Any]) -> Iterator[object]:
    dataset = values.get("dataset")
    if isinstance(dataset, Mapping) and dataset.get("source") is not None:
        yield dataset["source"]


def _is_made_here(path: object, plan: Sequence[Stage]) -> bool:
    """Whether a stage's folder is that path or holds it."""
    if not isinstance(path, str):
        return False
    return any(stage.folder in (Path(path), *Path(path).parents) for stage in plan)


def _text(file: Path) -> str | None:
    return masked(file.read_text()) if file.is_file() else None
