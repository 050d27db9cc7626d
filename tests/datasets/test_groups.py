"""Data sets: target weights of the published examples, and what is dropped to make groups fit."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from steerlm2.data.packing import Group
from steerlm2.data.records import (
    BROKEN,
    CUT_OFF,
    OTHER_TOKENS,
    UNKNOWN_TOKENS,
    Response,
    parse_record,
    read_records,
    write_records,
)
from steerlm2.data.templates import (
    Template,
    encode_prompt,
    encode_response,
    extra_id_template,
    llama3_template,
    token_ids_digest,
)
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer
from steerlm2.datasets import (
    SteerLM2Dataset,
    steerlm2_dataset,
    synthetic_dataset,
    tokenize_records,
    with_log_probs,
)
from steerlm2.datasets.groups import OTHER_TOKENIZER

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
    assert (dataset.left_out, dataset.dropped_groups) == ({"too long": 2}, 1)
    assert dataset.summary() == (
        "1 groups with 2 responses (responses left out: 2 too long; groups with too few left: 1)"
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


# What was sampled

TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
DIGEST = token_ids_digest(TEMPLATE, TOKENIZER)
STOP_ID = encode_response(TEMPLATE, TOKENIZER, "")[-1]
OTHER_TEMPLATE = extra_id_template({"<extra_id_2>": "<extra_id_5>"})


def by_letters(text: str) -> list[int]:
    """Other tokens than the text encodes to."""
    tokens = [token for letter in f"{text}\n" for token in TOKENIZER.encode(letter)]
    assert [*tokens, STOP_ID] != encode_response(TEMPLATE, TOKENIZER, text)
    return [*tokens, STOP_ID]


def sampled(
    *responses: Response, template: Template = TEMPLATE, digest: str | None = DIGEST
) -> SteerLM2Dataset:
    """A group of these responses, after two that a person wrote."""
    known = parse_record(record("Nile", "Rhine"))
    known.responses += responses
    known.token_ids_digest = digest
    return tokenize_records([known], TOKENIZER, template, 256, "f")


def response(value: str, tokens: list[int] | None, **more: Any) -> Response:
    ids = None if tokens is None else array("i", tokens)
    return Response(value, token_ids=ids, **({"finish_reason": "stop"} | more))


def test_a_sampled_response_is_the_tokens_that_were_sampled() -> None:
    """Also where its text encodes to others, and in groups without labels, for log P(y|x)."""
    tokens = by_letters("the")
    dataset = sampled(response("the", tokens, encodes_otherwise=True))
    assert list(dataset[0].responses[2]) == tokens
    assert list(dataset.without_label()[0].responses[2]) == tokens
    assert (dataset.left_out, dataset.unchecked) == ({}, {})


@pytest.mark.parametrize("digest", [None, "0123456789abcdef"])
def test_where_the_tokens_are_of_others_the_text_is_encoded(digest: str | None) -> None:
    """But not that of a response whose text encoded to other tokens where it was sampled."""
    odd = response("the", by_letters("the"), encodes_otherwise=True)
    dataset = sampled(odd, response("Oder", [1, 2, 3]), digest=digest)
    assert dataset[0].responses_kept == [0, 1, 3]
    assert list(dataset[0].responses[2]) == encode_response(TEMPLATE, TOKENIZER, "Oder")
    assert dataset.left_out == {OTHER_TOKENS: 1}
    assert dataset.unchecked == {OTHER_TOKENIZER: 1}
    assert "3 responses, 1 sampled with another template or tokenizer (" in dataset.summary()


def test_another_template_is_another_digest() -> None:
    odd = response("the", by_letters("the"), encodes_otherwise=True)
    assert sampled(odd, template=OTHER_TEMPLATE).left_out == {OTHER_TOKENS: 1}


@pytest.mark.parametrize("known", [True, False])
def test_half_a_character_is_left_out(known: bool) -> None:
    tokens = [
        *TOKENIZER.encode("\N{GRINNING FACE}")[:-1],
        *encode_response(TEMPLATE, TOKENIZER, ""),
    ]
    more = {"encodes_otherwise": True} if known else {}
    broken = response(TOKENIZER.decode(tokens[:-2]), tokens if known else None, **more)
    dataset = sampled(broken, digest=DIGEST if known else None)
    assert (dataset[0].responses_kept, dataset.left_out) == ([0, 1], {BROKEN: 1})


def test_the_replacement_character_itself_is_kept() -> None:
    text = "\N{REPLACEMENT CHARACTER}"
    dataset = sampled(response(text, encode_response(TEMPLATE, TOKENIZER, text)))
    assert dataset[0].responses_kept == [0, 1, 2]


def test_what_was_cut_off_at_the_limit_is_its_tokens_without_a_stop_token() -> None:
    tokens = TOKENIZER.encode("The Oder is")
    dataset = sampled(response("The Oder is", tokens, finish_reason="length"))
    assert list(dataset[0].responses[2]) == tokens


@pytest.mark.parametrize("reason", ["length", "abort", "other_stop", "error"])
def test_what_was_cut_off_is_never_completed(reason: str) -> None:
    """A text with a stop token behind it wasn't sampled. Known tokens help only those at the limit
    (what else ended an answer may depend on what it said)."""
    tokens = None if reason == "length" else TOKENIZER.encode("The Oder is")
    dataset = sampled(response("The Oder is", tokens, finish_reason=reason))
    assert (dataset[0].responses_kept, dataset.left_out) == ([0, 1], {CUT_OFF: 1})
    tokens = TOKENIZER.encode("The Oder is")
    of_others = sampled(response("The Oder is", tokens, finish_reason=reason), digest=None)
    assert of_others.left_out == {CUT_OFF: 1}


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        ("edited", encode_response(TEMPLATE, TOKENIZER, "the")),
        ("the", encode_response(TEMPLATE, TOKENIZER, "the")[:-1]),
        (
            "the<extra_id_2>",
            [*TOKENIZER.encode("the"), TOKENIZER.token_id("<extra_id_2>"), STOP_ID],
        ),
        ("the", [*TOKENIZER.encode("the"), TOKENIZER.vocab_size, STOP_ID]),
    ],
    ids=["other text", "no stop token", "control token", "no token"],
)
def test_tokens_that_are_not_those_of_the_text_are_left_out(value: str, tokens: list[int]) -> None:
    dataset = sampled(response(value, tokens))
    assert (dataset[0].responses_kept, dataset.left_out) == ([0, 1], {OTHER_TOKENS: 1})


def test_responses_of_unknown_tokens_are_counted() -> None:
    """Sampled, by a server that gave no token ids; the two of a person aren't unknown."""
    dataset = sampled(response("Oder", None), digest=None)
    assert list(dataset[0].responses[2]) == encode_response(TEMPLATE, TOKENIZER, "Oder")
    assert dataset.unchecked == {UNKNOWN_TOKENS: 1}
    assert dataset.summary().startswith("1 groups with 3 responses, 1 of unknown tokens (")


def test_nothing_left_names_the_causes() -> None:
    """Without the advice to raise max_seq_len, which would help nothing."""
    cut = parse_record(record("The Oder is", "Po"))
    for each in cut.responses:
        each.finish_reason = "abort"
    with pytest.raises(ValueError, match=r"\(left out: 2 cut off\)$"):
        tokenize_records([cut], TOKENIZER, TEMPLATE, 256, "f")
