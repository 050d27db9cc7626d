"""Open Assistant trees become groups: the right messages, labels and likelihoods."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema, beta_log_prob, parse_label
from steerlm2.data.records import Record, Turn, read_records, write_records
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT
from steerlm2.data.sources.oasst import oasst_groups

OASST_NAMES = ("quality", "toxicity", "humor", "creativity", "helpfulness")


def message(
    role: str, text: str, *replies: dict[str, Any], labels: dict[str, float] | None = None
) -> dict[str, Any]:
    given = {"role": role, "text": text, "message_id": f"id of {text}", "replies": list(replies)}
    if labels is None:
        return given
    return given | {"labels": {k: {"value": v, "count": 3} for k, v in labels.items()}}


def answer(text: str, *replies: dict[str, Any], **labels: float) -> dict[str, Any]:
    return message("assistant", text, *replies, labels=labels)


def tree(*replies: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t", "prompt": message("prompter", "Q", *replies)}


def write_trees(path: Path, *trees: object) -> Path:
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees), encoding="utf-8")
    return path


def groups(path: Path, *trees: object, **arguments: Any) -> list[Record]:
    return list(oasst_groups(write_trees(path / "trees.jsonl", *trees), **arguments))


TWO = (answer("good", quality=1.0, humor=0.1), answer("bad", quality=0.3, humor=0.9, spam=1.0))


def test_one_group_by_hand(tmp_path: Path) -> None:
    """quality 1.0, 0.3 -> scores 4, 1.2; humor 0.1, 0.9 -> 0.4, 3.6. best: round(4), round(0.4)."""
    (record,) = groups(tmp_path, tree(*TWO), label="best")
    assert record.system == DEFAULT_SYSTEM_PROMPT
    assert record.prompt_turns == [Turn("User", "Q")]
    assert record.label == "quality:4,humor:0"
    assert [r.value for r in record.responses] == ["good", "bad"]
    assert [r.scores for r in record.responses] == [
        {"quality": 4.0, "humor": pytest.approx(0.4)},
        {"quality": pytest.approx(1.2), "humor": pytest.approx(3.6)},
    ]
    expected = beta_log_prob([[4.0, 0.4], [1.2, 3.6]], [[4, 0], [4, 0]]).sum(dim=1).tolist()
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-12)
    assert [(r.log_p_response, r.log_q) for r in record.responses] == [(None, None)] * 2


def test_every_prompter_message_is_a_prompt_with_all_turns_before_it(tmp_path: Path) -> None:
    """Q -> good -> Q2 -> two answers: a second group, with the turns Q, good, Q2."""
    good = answer("good", message("prompter", "Q2", *TWO), quality=0.5)
    first, second = groups(tmp_path, tree(good, answer("other", quality=0.1)))
    assert [turn.value for turn in first.prompt_turns] == ["Q"]
    assert second.prompt_turns == [Turn("User", "Q"), Turn("Assistant", "good"), Turn("User", "Q2")]
    assert second.extra == {"message_id": "id of Q2"}
    assert second.responses[1].extra == {"message_id": "id of bad"}


def test_replies_without_labels_of_the_schema_do_not_count(tmp_path: Path) -> None:
    no_labels = message("assistant", "unlabelled")
    null_labels = message("assistant", "null") | {"labels": None}
    (record,) = groups(tmp_path, tree(no_labels, *TWO, null_labels, answer("spam", spam=1.0)))
    assert [r.value for r in record.responses] == ["good", "bad"]
    assert groups(tmp_path, tree(TWO[0], no_labels, answer(" \n", quality=1.0))) == []


def test_label_names_only_what_all_replies_have(tmp_path: Path) -> None:
    third = answer("third", quality=0.6, toxicity=0.0)
    (record,) = groups(tmp_path, tree(*TWO, third), label="humor:4,quality:2")
    assert record.label == "quality:2"
    assert record.responses[2].scores == {"quality": pytest.approx(2.4), "toxicity": 0.0}
    expected = beta_log_prob([[4.0], [1.2], [2.4]], [2]).sum(dim=1).tolist()
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-12)


def test_group_without_a_shared_score_is_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    apart = tree(answer("a", quality=1.0), answer("b", humor=1.0))
    assert groups(tmp_path, apart, apart) == []
    assert "left out 2 prompts" in caplog.text


def test_sampled_label_is_that_of_a_reply_and_both_occur(tmp_path: Path) -> None:
    """good rounds to quality 4, humor 0; bad to quality 1, humor 4: nothing else may come."""
    seen = Counter(groups(tmp_path, tree(*TWO), seed=seed)[0].label for seed in range(40))
    assert set(seen) == {"quality:4,humor:0", "quality:1,humor:4"}


def test_python_rounding_of_halves(tmp_path: Path) -> None:
    """0.125 * 4 = 0.5 rounds to 0, 0.375 * 4 = 1.5 to 2: to even, as the published data has it."""
    (record,) = groups(
        tmp_path,
        tree(answer("a", quality=1.0, humor=0.125, toxicity=0.375), answer("b", quality=0)),
        label="best",
    )
    assert record.label == "quality:4"
    halves = answer("a", humor=0.125, toxicity=0.375), answer("b", humor=0.125, toxicity=0.375)
    (record,) = groups(tmp_path, tree(*halves))
    assert record.label == "toxicity:2,humor:0"


def test_a_groups_draw_does_not_depend_on_the_rest_of_the_file(tmp_path: Path) -> None:
    alone = groups(tmp_path, tree(*TWO), seed=3)
    other = tree(answer("x", quality=0.0), answer("y", quality=1.0))
    other["prompt"]["message_id"] = "another"
    assert groups(tmp_path, other, tree(*TWO), seed=3)[1:] == alone


def test_own_schema_gives_names_order_and_range(tmp_path: Path) -> None:
    """Range -1..1: a value v becomes the score 2 v - 1. best: quality 1 -> 1, humor 0.1 -> -0.8."""
    schema = {"names": ["humor", "quality"], "min_value": -1, "max_value": 1}
    (record,) = groups(tmp_path, tree(*TWO), label="best", schema=schema)
    assert record.label == "humor:-1,quality:1"
    assert record.responses[0].scores == {"humor": pytest.approx(-0.8), "quality": 1.0}
    own = AttributeSchema.sharing(("humor", "quality"), -1, 1)
    expected = beta_log_prob([[-0.8, 1.0], [0.8, -0.4]], [-1, 1], schema=own).sum(dim=1).tolist()
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-9)


def test_every_attribute_is_scaled_to_its_own_range(tmp_path: Path) -> None:
    """humor 0.1 and 0.9 of 0..10, quality 1 and 0.3 of 1..3; the label names humor alone."""
    schema = {"humor": [0, 10], "quality": [1, 3]}
    (record,) = groups(tmp_path, tree(*TWO), label="humor:4", schema=schema)
    assert [r.scores for r in record.responses] == [
        {"humor": pytest.approx(1.0), "quality": 3.0},
        {"humor": pytest.approx(9.0), "quality": pytest.approx(1.6)},
    ]
    own = AttributeSchema.sharing(("humor",), 0, 10)
    expected = beta_log_prob([[1.0], [9.0]], [4], schema=own).sum(dim=1).tolist()
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-9)


def test_likelihood_arguments_are_passed_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"concentration": 5.0, "bins": "uniform"}
    (record,) = groups(tmp_path, tree(*TWO), label="quality:3", **arguments)
    expected = beta_log_prob([[4.0], [1.2]], [3], **arguments).sum(dim=1).tolist()
    assert [r.log_p_attributes for r in record.responses] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("label", ["worst", "quality:9", "kindness:1", ""])
def test_a_label_choice_that_makes_no_sense_is_refused_at_once(tmp_path: Path, label: str) -> None:
    with pytest.raises(ValueError, match="label must be 'sampled', 'best' or a label string"):
        oasst_groups(tmp_path / "not read", label=label)


BAD_TREES: list[tuple[object, str]] = [
    ([], "must be a JSON object with a 'prompt'"),
    ({"prompt": None}, "must be a JSON object with a 'prompt'"),
    ({"prompt": message("assistant", "Q")}, "prompt: 'role' must be 'prompter' here"),
    (tree(message("prompter", "Q2")), r"prompt\.replies\[0\]: 'role' must be 'assistant' here"),
    (tree(TWO[0], {"role": "assistant"}), r"prompt\.replies\[1\]: 'text' must be text, got None"),
    (tree(TWO[0] | {"replies": "x"}), r"prompt\.replies\[0\]: 'replies' must be a list"),
    (tree(TWO[0] | {"replies": ["x"]}), r"prompt\.replies\[0\]: 'replies' must be a list"),
    (tree(answer("a", quality=1.5)), "the label 'quality' must have a value from 0 to 1"),
    (tree(answer("a", quality=float("nan"))), "the label 'quality' must have a value from 0 to 1"),
    (tree(TWO[0] | {"labels": {"quality": 1}}), "the label 'quality' must have a value"),
    (tree(TWO[0] | {"labels": ["quality"]}), "'labels' must be an object"),
]


@pytest.mark.parametrize(("bad", "problem"), BAD_TREES)
def test_what_is_no_tree_is_named(tmp_path: Path, bad: object, problem: str) -> None:
    with pytest.raises(ValueError, match=r"trees\.jsonl:2: .*" + problem):
        groups(tmp_path, tree(*TWO), bad)


def test_bad_lines_are_named_together_after_the_good_records(tmp_path: Path) -> None:
    path = tmp_path / "trees.jsonl"
    lines = [json.dumps(tree(*TWO)), *["{"] * 12, json.dumps(tree(*TWO))]
    path.write_text("\n".join(lines), encoding="utf-8")
    records = oasst_groups(path)
    assert [next(records).label, next(records).label]
    with pytest.raises(ValueError, match="not valid JSON") as error:
        next(records)
    reported = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in reported[:10]] == [f"{path}:{i}" for i in range(2, 12)]
    assert reported[10:] == ["... and 2 more bad lines"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl does not exist"):
        list(oasst_groups(tmp_path / "no.jsonl"))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """4000 trees of 10 kB are 40 MB; a stream holds a few of them."""
    path = tmp_path / "trees.jsonl.gz"
    line = json.dumps(tree(answer("x" * 10_000, quality=1.0))) + "\n"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(line for _ in range(4000))
    tracemalloc.start()
    try:
        assert list(oasst_groups(path)) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000


@pytest.fixture(scope="module")
def oasst_file(shared_dir: Path) -> Path:
    return shared_dir / "data" / "oasst2_trees.jsonl.gz"


def test_real_trees_give_141_groups(oasst_file: Path, tmp_path: Path) -> None:
    """The data's README: 141 prompter messages with 2 to 4 labelled assistant replies."""
    records = list(oasst_groups(oasst_file, keep_rejected=True))
    assert len(records) == 141
    assert Counter(len(r.responses) for r in records) == {2: 50, 3: 79, 4: 12}
    labels = [parse_label(record.label or "", DEFAULT_SCHEMA) for record in records]
    assert Counter(map(tuple, labels)) == {OASST_NAMES: 140, ("quality",): 1}

    write_records(tmp_path / "groups.jsonl", records)
    assert (
        read_records(
            tmp_path / "groups.jsonl", require=("log_p_attributes",), schema=DEFAULT_SCHEMA
        )
        == records
    )


def test_real_trees_without_what_was_deleted_or_rejected(
    oasst_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """12 messages are marked as deleted and 22 as rejected, some as both or below one another."""
    records = list(oasst_groups(oasst_file))
    assert Counter(len(r.responses) for r in records) == {2: 54, 3: 80, 4: 7}
    assert "10 deleted, 18 rejected by the reviewers, 2 replies to those" in caplog.text


def test_real_trees_label_equals_one_replys_rounded_scores(oasst_file: Path) -> None:
    for record in oasst_groups(oasst_file, seed=1):
        wanted = parse_label(record.label or "")
        rounded = [
            {name: round(score) for name, score in (r.scores or {}).items() if name in wanted}
            for r in record.responses
        ]
        assert wanted in rounded


def test_real_trees_best_label_has_the_highest_quality(oasst_file: Path) -> None:
    for record in oasst_groups(oasst_file, label="best"):
        qualities = [(r.scores or {})["quality"] for r in record.responses]
        assert parse_label(record.label or "")["quality"] == round(max(qualities))


def test_seed_changes_labels_and_nothing_else(oasst_file: Path) -> None:
    first, again, other = (list(oasst_groups(oasst_file, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert [r.label for r in first] != [r.label for r in other]
    assert [[x.scores for x in r.responses] for r in first] == [
        [x.scores for x in r.responses] for r in other
    ]
