"""Exports as their readers get them: what their model cards tell to run runs, and says no more than
it should."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers import pipeline

from model_cards import card_blocks, scorer
from steerlm2.data.chat_templates import messages_of
from steerlm2.data.synthetic import synthetic_records


def output_of(code: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, {})
    return capsys.readouterr().out


def test_the_card_of_a_language_model_asks_it(
    acsft_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = card_blocks(acsft_model, "python")
    assert "attributes=" in code
    answer = output_of(code.replace("max_new_tokens=256", "max_new_tokens=8"), acsft_model, capsys)
    assert answer.strip()
    assert "<extra_id" not in answer


def test_the_card_of_an_attribute_model_scores(
    attribute_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = card_blocks(attribute_model, "python")
    scores = ast.literal_eval(output_of(code, attribute_model, capsys))
    assert {each["label"] for each in scores} == {"humor", "verbosity"}


def test_transformers_scores_messages_as_we_do(attribute_model: Path) -> None:
    """pipeline("text-classification") on what the chat template writes: to 1e-5."""
    model, theirs = scorer(attribute_model), pipeline("text-classification", str(attribute_model))
    found, ours = [], []
    for record in synthetic_records(4, 3, seed=5):
        answers = [response.value for response in record.responses]
        group, _ = model.encode(record.system, record.prompt_turns, answers)
        ours += model.score([group])[0]
        for text in answers:
            said = {"role": "assistant", "content": text}
            messages = [*messages_of(record.system, record.prompt_turns), said]
            written = theirs.tokenizer.apply_chat_template(messages, tokenize=False)
            scores = theirs(written, top_k=None, add_special_tokens=False)
            by_name = {each["label"]: each["score"] for each in scores}
            found.append([by_name[name] for name in model.schema.names])
    assert len({round(scores[0], 3) for scores in ours}) > 3
    assert found == [pytest.approx(scores, rel=0, abs=1e-5) for scores in ours]


@pytest.mark.parametrize("kind", ["acsft_model", "attribute_model"])
def test_a_runs_export_names_no_folder(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    places = [str(folder.parent.parent), str(Path.cwd()), str(Path.home()) + "/"]
    for file in folder.rglob("*"):
        assert not file.is_file() or not any(p.encode() in file.read_bytes() for p in places), file
