"""Examples: the same request, an answer of each model."""

from __future__ import annotations

from pathlib import Path

from steerlm2.data.records import Record, Response, Turn, read_records, write_records
from steerlm2.evaluation.examples import MODEL, choose_examples


def record(question: str, *answers: str, label: str = "humor:1") -> Record:
    return Record("", [Turn("User", question)], label, [Response(text) for text in answers])


def said(example: Record) -> dict[str, str]:
    return {answer.extra[MODEL]: answer.value for answer in example.responses}


def test_answers_are_put_together_by_request_and_not_by_place() -> None:
    """In whatever order a file has them; another label is another request."""
    records = {
        "one": [
            record("a", "1a", "1a again"),
            record("b", "1b"),
            record("a", "x", label="humor:2"),
        ],
        "two": [record("b", "2b"), record("a", "2a")],
    }
    first, second = choose_examples(records)
    assert said(first) == {"one": "1a", "two": "2a"}
    assert said(second) == {"one": "1b", "two": "2b"}


def test_they_are_evenly_spaced() -> None:
    own = [record(f"{i}", "x") for i in range(100)]
    chosen = choose_examples({"one": own}, 4)
    assert [each.prompt_turns[0].value for each in chosen] == ["0", "25", "50", "75"]
    assert len(choose_examples({"one": own[:2]}, 4)) == 2


def test_requests_that_the_most_models_answered_are_chosen() -> None:
    """An answer that a model doesn't have, because it was empty, costs the request its place."""
    records = {
        "one": [record("a", "1a"), record("b", "1b")],
        "two": [record("a"), record("b", "2b")],
    }
    (only,) = choose_examples(records)
    assert said(only) == {"one": "1b", "two": "2b"}
    apart = {"one": [record("a", "1a")], "two": [record("b", "2b")]}
    assert [said(each) for each in choose_examples(apart)] == [{"one": "1a"}, {"two": "2b"}]
    assert choose_examples({"one": [record("a")]}) == []


def test_the_records_themselves_stay_as_they_are(tmp_path: Path) -> None:
    """And those that are chosen can be written and read."""
    own = record("a", "1a")
    chosen = choose_examples({"one": [own]})
    assert own == record("a", "1a")
    write_records(tmp_path / "examples.jsonl", chosen)
    assert read_records(tmp_path / "examples.jsonl", require=(), min_responses=1) == chosen
