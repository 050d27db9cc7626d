"""Two attributes of one's own, with ranges of different widths, from reward model to evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import evaluate_steering
from ready_made import recipe_config
from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.data.jsonl import json_line
from steerlm2.evaluation import report as report_module

if TYPE_CHECKING:
    from tests.recipes.conftest import TuneProcess

Json = dict[str, Any]

SCHEMA = AttributeSchema(("formality", "length"), ((0, 10), (1, 5)))
ARGUMENT = "schema={formality: [0, 10], length: [1, 5]}"
"""Replaces the names and the range in the tiny configs."""
FORMAL = ["yo", "hi", "hello", "dear all", "distinguished guests"]
LABELS = [
    f"formality:{formality},length:{length}" for formality in (0, 4, 7, 10) for length in (1, 3, 5)
]


def answer(formality: int, length: int) -> str:
    return f"{FORMAL[formality * 4 // 10]}," + " the city is good" * length


def write_jsonl(path: Path, rows: list[Json]) -> Path:
    path.write_bytes(b"".join(map(json_line, rows)))
    return path


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def conversation(label: str) -> Json:
    values = parse_label(label, SCHEMA)
    turns = [
        {"from": "User", "value": "What is it?", "label": None},
        {"from": "Assistant", "value": answer(**values), "label": label},
    ]
    return {"conversations": turns, "system": "S", "mask": "User", "type": "VALUE_TO_TEXT"}


def group(label: str) -> Json:
    """A request, and two answers: to it, and to one of the last label."""
    texts = [answer(**parse_label(each, SCHEMA)) for each in (label, LABELS[-1])]
    return {
        "system": "S",
        "prompt_turns": [{"from": "User", "value": "What is it?"}],
        "label": label,
        "responses": [{"from": "Assistant", "value": text} for text in texts],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def model(tune: TuneProcess, folder: Path) -> Path:
    """The attribute model's folder after 10 steps on the labelled conversations."""
    source = write_jsonl(folder / "labelled.jsonl", [conversation(label) for label in LABELS * 4])
    unused = ("num_records", "responses_per_prompt", "split")
    dataset = "steerlm2.datasets.attribute_dataset"
    tune(
        *("reward_distributed", "--config", "tiny/reward", f"output_dir={folder}/model", ARGUMENT),
        *(f"~dataset{part}.{name}" for name in unused for part in ("", "_val")),
        *(f"dataset{part}.source={source}" for part in ("", "_val")),
        *(f"dataset{part}._component_={dataset}" for part in ("", "_val")),
        *("max_steps=10", "val_every_n_steps=10", "export=last"),
        *("save_every_n_steps=null", "lr_scheduler.warmup_steps=2"),
    )
    (found,) = (folder / "model").glob("epoch_*")
    return found


def annotated(tune: TuneProcess, model: Path, source: Path, *more: str) -> list[Json]:
    output = source.with_name(f"annotated_{source.name}")
    tune(
        *("annotate_attributes", "--config", "tiny/annotate_attributes", ARGUMENT, *more),
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        *(f"checkpointer.checkpoint_dir={model}", f"input={source}", f"output={output}"),
    )
    return read_jsonl(output)


def log_p(scores: dict[str, float], label: str) -> float:
    """The Beta rule in 60 digits: the log of the probability between two edges, by attribute."""
    total = mpmath.mpf(0)
    with mpmath.workdps(60):
        for name, value in parse_label(label).items():
            low, high = SCHEMA.range_of(name)
            ratio = min(max((scores[name] - low) / (high - low), 1e-6), 1 - 1e-6)
            lower = max((value - low - 0.5) / (high - low), 0)
            upper = min((value - low + 0.5) / (high - low), 1)
            alpha = 24.0 * ratio
            total += mpmath.log(mpmath.betainc(alpha, 24.0 - alpha, lower, upper, regularized=True))
    return float(total)


@pytest.fixture(scope="module")
def scored(tune: TuneProcess, model: Path, folder: Path) -> list[Json]:
    source = write_jsonl(folder / "groups.jsonl", [group(label) for label in LABELS])
    return annotated(tune, model, source)


def test_the_loss_is_over_shares_of_the_ranges(folder: Path, scored: list[Json]) -> None:
    """The last validation is of the exported weights, on the texts that were scored: the mean over
    both attributes of (error / width * mean width)^2."""
    lines = read_jsonl(folder / "model" / "metrics.jsonl")
    *_, val_loss = (line["val_loss"] for line in lines if "val_loss" in line)
    terms = []
    for record in scored:
        for name, value in parse_label(record["label"]).items():
            low, high = SCHEMA.range_of(name)
            error = record["responses"][0]["scores"][name] - value
            terms.append((error / (high - low) * 7) ** 2)
    assert val_loss == pytest.approx(np.mean(terms), rel=1e-5)


def test_log_p_follows_from_the_scores_by_each_attributes_range(scored: list[Json]) -> None:
    for record in scored:
        for response in record["responses"]:
            expected = log_p(response["scores"], record["label"])
            assert response["log(P(a|x,y))"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_labels_are_in_range_and_rounded_for_each_attribute(
    tune: TuneProcess, model: Path, folder: Path, scored: list[Json]
) -> None:
    """The conversations' labels are the rounded scores of the same texts in the groups."""
    source = write_jsonl(folder / "unlabelled.jsonl", [conversation(label) for label in LABELS])
    rounded = annotated(tune, model, source)
    for labelled, record in zip(rounded, scored, strict=True):
        values = parse_label(labelled["conversations"][1]["label"], SCHEMA)
        scores = record["responses"][0]["scores"]
        for name, value in values.items():
            low, high = SCHEMA.range_of(name)
            assert value == round(min(max(scores[name], low), high))


def test_requested_and_obtained_are_compared_in_shares_of_the_ranges(
    folder: Path, scored: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "html_page", lambda *parts: "a page")
    recipe = evaluate_steering.EvaluateRecipe(
        recipe_config(
            "evaluate_steering",
            "tiny/evaluate_steering",
            *(f"output_dir={folder}/steering", ARGUMENT, "exact_scorer=null"),
            f"models.own.answers={folder}/annotated_groups.jsonl",
        )
    )
    recipe.setup()
    recipe.sample()
    recipe.score()
    recipe.report()
    metrics = json.loads((folder / "steering" / "steering.json").read_text())["own"]["metrics"]
    mae = {
        name: np.mean(
            [
                abs(response["scores"][name] - parse_label(record["label"])[name])
                for record in scored
                for response in record["responses"]
            ]
        )
        for name in SCHEMA.names
    }
    assert metrics["mae_formality"] == pytest.approx(mae["formality"])
    assert metrics["mae_length"] == pytest.approx(mae["length"])
    shares = (mae["formality"] / 10 + mae["length"] / 4) / 2
    assert metrics["steering_mae"] == pytest.approx(shares * 7)


def test_the_order_that_it_was_trained_in_is_kept(
    tune: TuneProcess, model: Path, folder: Path
) -> None:
    assert list(json.loads((model / "config.json").read_text())["label2id"]) == [*SCHEMA.names]
    result = tune(
        *("annotate_attributes", "--config", "tiny/annotate_attributes"),
        "schema={length: [1, 5], formality: [0, 10]}",
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        *(f"checkpointer.checkpoint_dir={model}", f"input={folder}/labelled.jsonl"),
        f"output={folder}/never.jsonl",
        check=False,
    )
    assert result.returncode == 1
    assert "it has length 1 to 5, formality 0 to 10, steerlm2.json of" in result.stderr
