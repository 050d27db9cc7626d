"""Data sets: target weights of the published examples, and what is dropped to make groups fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlm2.data.packing import Group
from steerlm2.data.records import parse_record, read_records, write_records
from steerlm2.data.templates import (
    encode_prompt,
    encode_response,
    extra_id_template,
    llama3_template,
)
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer
from steerlm2.datasets import (
    SteerLM2Dataset,
    steerlm2_dataset,
    synthetic_dataset,
    tokenize_records,
    with_log_probs,
)

P_A, P_Y, Q = "log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))"


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return tiny_tokenizer()


@pytest.fixture
def examples(shared_dir: Path) -> list[dict[str, Any]]:
    return json.loads((shared_dir / "vectors" / "steerlm2_examples.json").read_text())


def record(*answers: str, question: str = "Name a river.", **log_probs: float) -> dict[str, Any]:
    """Answer i has log P(a|x,y) = i ln-units above the first; the rest is equal."""
    values = {P_A: -5.0, P_Y: -20.0, Q: -20.0} | log_probs
    return {
        "system": "Be terse.",
        "prompt_turns": [{"from": "User", "value": question}],
        "label": "quality:4",
        "responses": [
            {"from": "Assistant", "value": answer} | values | {P_A: values[P_A] + i}
            for i, answer in enumerate(answers)
        ],
    }


def as_file(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_published_example_has_its_target_weights(
    examples: list[dict[str, Any]], tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """The second example, from its JSON line to w': softmax(-0.5 - 20 + 20, -3 - 25 + 24)."""
    path = as_file(tmp_path, examples[1]["example"])
    dataset = steerlm2_dataset(tokenizer, source=path, max_seq_len=512)
    expected = examples[1]["expected"]["target_weights"]
    assert dataset[0].weights == pytest.approx(expected, abs=1e-6, rel=0)


def test_published_example_has_its_texts(
    examples: list[dict[str, Any]], tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    path = as_file(tmp_path, examples[1]["example"])
    group = steerlm2_dataset(tokenizer, source=path, max_seq_len=512)[0]
    texts = [tokenizer.decode([*group.prompt, *response]) for response in group.responses]
    assert texts == examples[1]["expected"]["full_text"]


def test_published_log_probs_have_their_target_weights(examples: list[dict[str, Any]]) -> None:
    """The first example has an empty response, which no data set takes: its numbers alone."""
    numbers = [[r[key] for r in examples[0]["example"]["responses"]] for key in (P_A, P_Y, Q)]
    group = Group([1], [[2]] * 3, log_p_attributes=numbers[0])
    weights = with_log_probs(group, log_p_response=numbers[1], log_q=numbers[2]).weights
    expected = examples[0]["expected"]["target_weights"]
    assert weights == pytest.approx(expected, abs=1e-6, rel=0)


def test_weights_are_of_the_responses_that_are_kept(
    examples: list[dict[str, Any]], tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """Of the published w' (w1, w2, w3) the first response is too long: w2, w3 over w2 + w3."""
    example = examples[0]["example"]
    example["responses"][0]["value"] = "long " * 500
    example["responses"][2]["value"] = "Not empty."
    path = as_file(tmp_path, example)
    group = steerlm2_dataset(tokenizer, source=path, max_seq_len=256)[0]
    _, second, third = examples[0]["expected"]["target_weights"]
    expected = [second / (second + third), third / (second + third)]
    assert group.weights == pytest.approx(expected, abs=1e-6, rel=0)


def limit_of(tokenizer: HFTokenizer, answer: str) -> int:
    """Tokens of the prompt of `record` with this answer."""
    parsed = parse_record(record(answer, answer))
    template = extra_id_template()
    prompt = encode_prompt(template, tokenizer, "Be terse.", parsed.prompt_turns, "quality:4")
    return len(prompt) + len(encode_response(template, tokenizer, answer))


def of_two_records(tmp_path: Path, tokenizer: HFTokenizer) -> SteerLM2Dataset:
    """Record 0 loses one of three answers to the limit, record 1 one of two: it is dropped."""
    long = "one more word " * 20
    path = as_file(tmp_path, record("Nile", long, "Rhine"), record("Nile", long))
    limit = max(limit_of(tokenizer, "Nile"), limit_of(tokenizer, "Rhine"))
    return steerlm2_dataset(tokenizer, source=path, max_seq_len=limit)


def test_responses_that_do_not_fit_are_dropped(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    dataset = of_two_records(tmp_path, tokenizer)
    assert [list(group.responses_kept) for group in dataset] == [[0, 2]]


def test_dropped_responses_and_groups_are_counted(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    dataset = of_two_records(tmp_path, tokenizer)
    assert (dataset.dropped_responses, dataset.dropped_groups) == (2, 1)
    assert dataset.summary() == (
        "1 groups with 2 responses (dropped as too long: 2 responses, 1 groups)"
    )


def test_a_response_may_fill_the_limit_exactly(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """Stop token included; with one token less the group would have lost both."""
    path = as_file(tmp_path, record("Nile", "Nile"))
    limit = limit_of(tokenizer, "Nile")
    assert len(steerlm2_dataset(tokenizer, source=path, max_seq_len=limit)) == 1
    with pytest.raises(ValueError, match=f"max_seq_len={limit - 1}"):
        steerlm2_dataset(tokenizer, source=path, max_seq_len=limit - 1)


def test_nothing_left_names_the_file_and_the_fix(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    path = as_file(tmp_path, record("Nile", "Rhine"), record("Po", "Elbe"))
    with pytest.raises(ValueError, match=r"none of its 2 records.*raise max_seq_len") as error:
        steerlm2_dataset(tokenizer, source=path, max_seq_len=5)
    assert str(error.value).startswith(path)


def test_groups_know_their_record(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """A dropped record keeps its number."""
    long = "one more word " * 200
    path = as_file(tmp_path, record("a", long), record("b", "c"), record("d", "e"))
    dataset = steerlm2_dataset(tokenizer, source=path, max_seq_len=100)
    assert [group.index for group in dataset] == [1, 2]


def test_num_samples_draws_different_records(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """5 of 20 without repetition, in file order; another seed draws others."""
    path = as_file(tmp_path, *(record("Nile", "Rhine", question=f"{i}") for i in range(20)))
    drawn = []
    for seed in (0, 0, 1):
        dataset = steerlm2_dataset(
            tokenizer, source=path, max_seq_len=256, num_samples=5, seed=seed
        )
        drawn.append([int(r.prompt_turns[0].value) for r in dataset.records])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5
    assert drawn[0] == sorted(drawn[0])


def test_num_samples_beyond_the_file_takes_all(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    path = as_file(tmp_path, record("Nile", "Rhine"))
    assert len(steerlm2_dataset(tokenizer, source=path, max_seq_len=256, num_samples=9)) == 1


def test_without_label_changes_the_prompt_only(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    path = as_file(tmp_path, record("Nile", "Rhine"))
    dataset = steerlm2_dataset(tokenizer, source=path, max_seq_len=256)
    (unlabelled,) = dataset.without_label()
    shown = tokenizer.decode(dataset[0].prompt).replace("<extra_id_2>quality:4\n", "")
    assert tokenizer.decode(unlabelled.prompt) == shown
    assert unlabelled.responses == dataset[0].responses


def test_records_without_log_probs_give_groups_without_weights(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """log P(a|x,y) alone: what the start model has to be asked for is None."""
    obj = record("Nile", "Rhine")
    for response in obj["responses"]:
        del response[P_Y], response[Q]
    dataset = steerlm2_dataset(
        tokenizer, source=as_file(tmp_path, obj), max_seq_len=256, require=("log_p_attributes",)
    )
    group = dataset[0]
    assert group.log_p_attributes == [-5, -4]
    assert (group.log_p_response, group.log_q, group.weights) == (None, None, None)


def test_missing_log_probs_are_an_error_where_required(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    obj = record("Nile", "Rhine")
    del obj["responses"][1][Q]
    with pytest.raises(ValueError, match=r"records.jsonl:1: .*missing 'log\(Q\(y\|a,x\)\)'"):
        steerlm2_dataset(tokenizer, source=as_file(tmp_path, obj), max_seq_len=256)


def test_template_is_the_callers(tmp_path: Path) -> None:
    """The llama3 template's tokens are none of the tiny tokenizer's."""
    path = as_file(tmp_path, record("Nile", "Rhine"))
    with pytest.raises(ValueError, match=r"<\|eot_id\|> is no token of this tokenizer"):
        steerlm2_dataset(tiny_tokenizer(), source=path, max_seq_len=256, template=llama3_template())


def test_synthetic_data_set_has_the_size_that_is_asked_for(tokenizer: HFTokenizer) -> None:
    dataset = synthetic_dataset(
        tokenizer, num_records=12, responses_per_prompt=3, max_seq_len=256, num_samples=7
    )
    assert [len(group.responses) for group in dataset] == [3] * 7


def test_synthetic_groups_wait_for_the_start_model(tokenizer: HFTokenizer) -> None:
    dataset = synthetic_dataset(tokenizer, num_records=2, responses_per_prompt=3, max_seq_len=256)
    assert all(group.log_p_attributes is not None for group in dataset)
    assert all(group.weights is None for group in dataset)


def test_written_records_are_the_same_data_set(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """Read, written and read again: tokens and weights are unchanged."""
    path = as_file(tmp_path, record("Nile", "Rhine"), record("Po", "Elbe", "Oder"))
    records = read_records(path)
    write_records(tmp_path / "again.jsonl", records)
    again = steerlm2_dataset(tokenizer, source=str(tmp_path / "again.jsonl"), max_seq_len=256)
    assert again.groups == tokenize_records(records, tokenizer, None, 256, path).groups
