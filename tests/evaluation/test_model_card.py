"""The results of an evaluation in the model card of an export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steerlm2.checkpoints.model_card import EVALUATION_END, EVALUATION_START, write_card
from steerlm2.evaluation import model_card
from steerlm2.evaluation.model_card import add_evaluation
from steerlm2.evaluation.report import SteeringResult, write_report
from steerlm2.facts import ModelFacts


def results(error: float) -> dict[str, SteeringResult]:
    return {
        "acsft": SteeringResult({"steering_mae": 0.9, "steering_mae_se": 0.01}, [], {}),
        "steerlm2": SteeringResult({"steering_mae": error, "steering_mae_se": 0.02}, [], {}),
    }


def test_an_evaluation_takes_the_place_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a pipeline or by hand; what people wrote around it stays; the own row is marked."""
    folder = tmp_path / "steerlm2" / "epoch_1"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    write_card(folder, ModelFacts(kind="language model", template={}, schema=None))
    card = folder / "README.md"
    card.write_text("Mine.\n" + card.read_text() + "Mine too.\n")
    before = card.read_text()
    assert add_evaluation(folder, results(0.7))
    write_report(results(0.5), tmp_path)
    command = ["model_card", str(tmp_path / "steerlm2"), str(tmp_path / "steering.json")]
    monkeypatch.setattr(sys, "argv", command)
    model_card.main()
    text = card.read_text()
    assert "| acsft | 0.900 ± 0.010 |" in text
    assert "| steerlm2 (this model) | **0.500** ± 0.020 |" in text
    assert "0.700" not in text
    start, end = EVALUATION_START, EVALUATION_END
    assert text.partition(start)[0] == before.partition(start)[0]
    assert text.partition(end)[2] == before.partition(end)[2]


def test_a_models_name_is_text_in_a_card(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    write_card(tmp_path, ModelFacts(kind="language model", template={}, schema=None))
    name = f"{EVALUATION_END}|$x$\x1b[2J"
    assert add_evaluation(tmp_path, {name: SteeringResult({"steering_mae": 0.9}, [], {})})
    text = (tmp_path / "README.md").read_text()
    assert "| &lt;!-- end of evaluation --&gt;\\|\\$x\\$\ufffd\\[2J | 0.900 |" in text
    assert text.count(EVALUATION_END) == 1


@pytest.mark.parametrize("text", [None, "# My own\n"])
def test_a_card_without_a_place_for_an_evaluation_stays_as_it_is(
    tmp_path: Path, text: str | None
) -> None:
    (tmp_path / "config.json").touch()
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert not add_evaluation(tmp_path, results(0.7))
    assert (tmp_path / "README.md").exists() == (text is not None)
