"""Records: nothing of the user's is lost, and every problem is named, all at once."""

from __future__ import annotations

import copy
import json
import math
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlm2.attributes import DEFAULT_SCHEMA, AttributeSchema
from steerlm2.data.records import (
    BROKEN,
    CUT_OFF,
    OTHER_TOKENS,
    UNKNOWN_TOKENS,
    Record,
    Response,
    Turn,
    count_flaws,
    flaw_of,
    is_blank,
    iter_records,
    parse_record,
    read_records,
    record_to_json,
    write_records,
)

P_A, P_Y, Q = "log(P(a|x,y))", "log(P(y|x))", "log(Q(y|a,x))"


def example() -> dict[str, Any]:
    return {
        "system": "You are terse.",
        "prompt_turns": [
            {"from": "User", "value": "Name a river."},
            {"from": "Assistant", "value": "Rhein und größer", "label": "quality:3"},
            {"from": "User", "value": "Another."},
        ],
        "label": "quality:4,verbosity:0",
        "responses": [
            {"from": "Assistant", "value": "The Nile.", P_A: -2.5, P_Y: -11.25, Q: -9},
            {"from": "Assistant", "value": "Wolga", P_A: -7.75, P_Y: -30.5, Q: -33.0}
            | {"scores": {"quality": 2.5}},
        ],
    }


def problem_of(obj: object, **arguments: Any) -> str:
    try:
        parse_record(obj, **arguments)
    except ValueError as error:
        return str(error)
    pytest.fail("the record was accepted")


def test_published_keys_become_python_names() -> None:
    assert parse_record(example()) == Record(
        system="You are terse.",
        prompt_turns=[
            Turn("User", "Name a river."),
            Turn("Assistant", "Rhein und größer", "quality:3"),
            Turn("User", "Another."),
        ],
        label="quality:4,verbosity:0",
        responses=[
            Response("The Nile.", -2.5, -11.25, -9.0),
            Response("Wolga", -7.75, -30.5, -33.0, scores={"quality": 2.5}),
        ],
    )


def test_unknown_keys_survive_the_round_trip() -> None:
    obj = example()
    obj["prompt_id"] = 17
    obj["prompt_turns"][0]["lang"] = "en"
    obj["responses"][1]["sampler"] = {"temperature": 0.7, "seeds": [1, None]}
    assert record_to_json(parse_record(obj)) == obj


def test_what_is_known_of_a_sampling_survives_the_round_trip() -> None:
    obj = example()
    obj["responses"][0] |= {"finish_reason": "stop", "token_ids": [5, 6, 2]}
    obj["responses"][1] |= {"finish_reason": "length", "token_ids": [7]}
    obj["responses"][1] |= {"encodes_otherwise": True}
    obj["token_ids_digest"] = "0123456789abcdef"
    record = parse_record(obj)
    assert record.token_ids_digest == "0123456789abcdef"
    assert [list(response.token_ids or []) for response in record.responses] == [[5, 6, 2], [7]]
    assert record_to_json(record) == obj


@pytest.mark.parametrize(
    ("sampling", "flaw"),
    [
        ({}, None),
        ({"finish_reason": "stop", "token_ids": [1]}, None),
        ({"finish_reason": "stop"}, UNKNOWN_TOKENS),
        ({"finish_reason": "stop", "token_ids": [1], "encodes_otherwise": True}, OTHER_TOKENS),
        ({"finish_reason": "length", "token_ids": [1], "encodes_otherwise": True}, CUT_OFF),
        ({"finish_reason": "abort"}, CUT_OFF),
        ({"finish_reason": "other_stop", "token_ids": [1]}, CUT_OFF),
        ({"value": "a\ufffd"}, BROKEN),
        ({"value": "a\ufffd", "finish_reason": "length"}, BROKEN),
        ({"value": "a\ufffd", "token_ids": [1], "encodes_otherwise": True}, BROKEN),
        ({"value": "a\ufffd", "token_ids": [1], "finish_reason": "stop"}, None),
    ],
)
def test_what_makes_a_response_another_one_than_was_sampled(
    sampling: dict[str, Any], flaw: str | None
) -> None:
    """Of a person's answer (without a finish_reason) nothing is unknown."""
    obj = example()
    obj["responses"][0] |= sampling
    first, second = parse_record(obj).responses
    assert (flaw_of(first), flaw_of(second)) == (flaw, None)
    assert count_flaws([first, second, first]) == ({flaw: 2} if flaw else {})


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"token_ids": "1 2"}, "'token_ids' must be a list of token ids"),
        ({"token_ids": []}, "'token_ids' must be a list of token ids"),
        ({"token_ids": [1, -1]}, "'token_ids' must be a list of token ids"),
        ({"token_ids": [1, True]}, "'token_ids' must be a list of token ids"),
        ({"token_ids": [2**31]}, "'token_ids' must be a list of token ids"),
        ({"finish_reason": {"type": "stop"}}, "'finish_reason' must be text, got an object"),
    ],
)
def test_what_no_sampling_gives_is_refused(sampling: dict[str, Any], message: str) -> None:
    obj = example()
    obj["responses"][0] |= sampling
    assert f"responses[0]: {message}" in problem_of(obj)


def test_unknown_log_probs_are_left_out_of_the_json() -> None:
    obj = example()
    del obj["responses"][0][Q]
    obj["responses"][1][Q] = None
    written = record_to_json(parse_record(obj, require=()))
    assert [Q in response for response in written["responses"]] == [False, False]


text = st.text(st.characters(codec="utf-8"), max_size=20)
log_prob = st.none() | st.floats(max_value=0, allow_infinity=False).filter(lambda x: x != -9999)
labels = st.none() | st.sampled_from(["quality:4", "humor:0,verbosity:3"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text, lambda inner: st.lists(inner, max_size=3)
)
# A leading "x" keeps the keys apart from the format's own.
extras = st.dictionaries(text.map(lambda key: "x" + key), json_values, max_size=2)
responses = st.builds(
    Response,
    value=text.map(lambda value: "r" + value),
    log_p_attributes=log_prob,
    log_p_response=log_prob,
    log_q=log_prob,
    scores=st.none() | st.dictionaries(text, st.floats(0, 4), max_size=2),
    token_ids=st.none()
    | st.lists(st.integers(0, 2**31 - 1), min_size=1).map(lambda ids: array("i", ids)),
    encodes_otherwise=st.booleans(),
    finish_reason=st.sampled_from([None, "stop", "length", "abort"]),
    extra=extras,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    num_turns = draw(st.sampled_from([1, 3]))
    turns = [
        Turn(("User", "Assistant")[i % 2], draw(text), draw(labels), draw(extras))
        for i in range(num_turns)
    ]
    answers = draw(st.lists(responses, min_size=2, max_size=4))
    digest = draw(st.none() | text)
    return Record(draw(text), turns, draw(labels), answers, draw(extras), digest)


@settings(max_examples=50)
@given(st.lists(records(), min_size=1, max_size=3), st.sampled_from(["a.jsonl", "a.jsonl.gz"]))
def test_files_give_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[Record], name: str
) -> None:
    path = tmp_path_factory.mktemp("records") / name
    assert write_records(path, written) == len(written)
    assert read_records(path, require=()) == written


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1], "must be a JSON object, got a list"),
        (None, "must be a JSON object, got null"),
        ("x", "must be a JSON object, got text"),
    ],
)
def test_what_is_no_object_is_refused(obj: object, message: str) -> None:
    assert message in problem_of(obj)


def _with(path: str, value: object) -> dict[str, Any]:
    """The example with the item at a dotted path set (or deleted, for the value KeyError)."""
    obj = copy.deepcopy(example())
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    target: Any = obj
    for key in parents:
        target = target[key]
    if value is KeyError:
        del target[last]
    else:
        target[last] = value
    return obj


TURNS = example()["prompt_turns"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("system", KeyError, "missing 'system'"),
        ("system", None, "'system' must be text, got null"),
        ("prompt_turns", KeyError, "missing 'prompt_turns'"),
        ("prompt_turns", {}, "'prompt_turns' must be a list, got an object"),
        ("prompt_turns", [], "end with the user: odd count, got 0"),
        (
            "prompt_turns",
            TURNS[:2],
            "prompt_turns must alternate User/Assistant and end with the user: odd count, got 2",
        ),
        ("prompt_turns/1", 3, "prompt_turns[1] must be a JSON object"),
        ("prompt_turns/0/from", "Human", "prompt_turns[0]: 'from' must be 'User', got 'Human'"),
        ("prompt_turns/1/from", "User", "prompt_turns[1]: 'from' must be 'Assistant', got 'User'"),
        ("prompt_turns/2/value", KeyError, "prompt_turns[2]: missing 'value'"),
        ("prompt_turns/1/label", "quality", "prompt_turns[1]: label 'quality': 'quality' is not"),
        ("label", "quality:4;humor:0", "label 'quality:4;humor:0': 'quality:4;humor:0' is not of"),
        ("label", "", "label '': '' is not of the form"),
        ("label", {"quality": 4}, "'label' must be text or null, got an object"),
        ("responses", KeyError, "missing 'responses'"),
        ("responses", example()["responses"][:1], "needs at least 2 responses, got 1"),
        ("responses/0", None, "responses[0] must be a JSON object"),
        ("responses/0/from", "User", "responses[0]: 'from' must be 'Assistant', got 'User'"),
        ("responses/1/value", "", "responses[1]: the response text is empty"),
        ("responses/1/value", " \n\t", "responses[1]: the response text is empty"),
        ("responses/1/value", "\u200b \ufe0f", "responses[1]: the response text is empty"),
        ("responses/1/value", None, "responses[1]: 'value' must be text, got null"),
        ("responses/1/value", "a\ud800", "responses[1]: 'value' holds half of a surrogate pair"),
        (f"responses/0/{Q}", KeyError, f"responses[0]: missing '{Q}'"),
        (f"responses/0/{Q}", None, f"responses[0]: '{Q}' must be a number, got null"),
        (f"responses/0/{P_Y}", "-1.5", f"'{P_Y}' must be a number, got text"),
        (f"responses/0/{P_Y}", True, f"'{P_Y}' must be a number, got true or false"),
        (f"responses/0/{P_A}", math.nan, f"'{P_A}' must be finite, got nan"),
        (f"responses/0/{P_A}", -math.inf, f"'{P_A}' must be finite, got -inf"),
        (f"responses/0/{P_A}", -(10**400), f"'{P_A}' must be finite, got huge"),
        (f"responses/0/{Q}", 3, f"responses[0]: '{Q}' must be a log-probability, 0 or less, got 3"),
        (f"responses/1/{P_Y}", 0.0011, f"responses[1]: '{P_Y}' must be a log-probability, 0 or"),
        (f"responses/0/{Q}", -9999, f"responses[0]: '{Q}' is -9999, which vLLM writes for an"),
        (f"responses/1/{P_Y}", -9999.0, f"responses[1]: '{P_Y}' is -9999, which vLLM writes"),
        (f"responses/0/{P_A}", -9999.0, f"responses[0]: '{P_A}' is -9999, which vLLM writes"),
        ("responses/1/scores", [1], "'scores' must be an object of numbers, got a list"),
        ("responses/1/scores/quality", None, "the score 'quality' must be a number, got null"),
        ("responses/1/scores/quality", math.nan, "the score 'quality' must be finite, got nan"),
    ],
)
def test_one_problem_is_named(path: str, value: object, message: str) -> None:
    problem = problem_of(_with(path, value))
    assert message in problem
    assert ";" not in problem.replace("quality:4;humor:0", "")


def test_all_problems_of_a_record_in_one_message() -> None:
    obj = _with("prompt_turns", TURNS[:2])
    obj["label"] = "quality=4"
    del obj["system"]
    obj["responses"][0]["value"] = ""
    del obj["responses"][1][Q]
    problem = problem_of(obj)
    for part in (
        "'system'",
        "odd count",
        "quality=4",
        "[0]: the response text",
        f"[1]: missing '{Q}'",
    ):
        assert part in problem


def test_a_problem_that_responses_share_is_told_once() -> None:
    obj = example()
    for response in obj["responses"]:
        del response[P_Y], response[Q]
    assert problem_of(obj) == (
        f"responses[0,1]: missing '{P_Y}', '{Q}' (recipe score_responses adds it)"
    )


def test_only_required_log_probs_must_be_there() -> None:
    obj = example()
    for response in obj["responses"]:
        del response[P_Y], response[Q]
    record = parse_record(obj, require=("log_p_attributes",))
    assert [(r.log_p_attributes, r.log_q) for r in record.responses] == [
        (-2.5, None),
        (-7.75, None),
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [(Q, 0.0), (P_Y, 0.0009), (P_A, 1.5), (Q, -9998.9), (P_Y, -12000.0)],
)
def test_what_may_be_a_log_prob_is_read(path: str, value: float) -> None:
    """Rounding, a density of the attributes, long responses."""
    read = parse_record(_with(f"responses/0/{path}", value))
    assert record_to_json(read)["responses"][0][path] == value


def test_a_log_prob_that_is_there_must_be_a_number_even_if_not_required() -> None:
    assert "must be finite" in problem_of(_with(f"responses/0/{Q}", math.nan), require=())


def test_schema_limits_the_labels() -> None:
    assert parse_record(example(), schema=DEFAULT_SCHEMA)
    narrow = AttributeSchema.sharing(("quality",), 0, 3)
    problem = problem_of(example(), schema=narrow)
    assert "quality must be a whole number from 0 to 3, got 4" in problem
    assert "unknown attribute 'verbosity'" in problem


def test_min_responses_is_a_choice() -> None:
    obj = _with("responses", example()["responses"][:1])
    assert len(parse_record(obj, min_responses=1).responses) == 1


def _write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_bad_lines_are_named_with_file_and_line_the_first_ten(tmp_path: Path) -> None:
    """50 lines: line 1 and 2 good, line 3 broken JSON, lines 4 to 50 lack a key: 48 bad ones."""
    good = json.dumps(example())
    bad = json.dumps(_with("label", "quality"))
    path = _write_lines(tmp_path / "d.jsonl", [good, good, good[:-9], *[bad] * 47])
    with pytest.raises(ValueError, match="not valid JSON") as error:
        read_records(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 11
    assert lines[0].startswith(f"{path}:3: not valid JSON (")
    assert lines[9].startswith(f"{path}:12: label 'quality'")
    assert lines[10] == "... and 38 more bad lines"


def test_iter_records_yields_the_good_ones_before_it_raises(tmp_path: Path) -> None:
    good = json.dumps(example())
    path = _write_lines(tmp_path / "d.jsonl", ["3", good, "", good])
    records = iter_records(path)
    assert [next(records), next(records)] == [parse_record(example())] * 2
    with pytest.raises(ValueError, match=r"d\.jsonl:1: a record must be a JSON object"):
        next(records)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.jsonl holds no records"):
        read_records(tmp_path / "d.jsonl")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write_records(path, [parse_record(example())])
    before = path.read_bytes()

    def failing() -> Any:
        yield parse_record(example())
        raise RuntimeError("source died")

    with pytest.raises(RuntimeError, match="source died"):
        write_records(path, failing())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]


def test_the_same_records_give_the_same_compressed_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_records(tmp_path / name, [parse_record(example())])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_half_a_surrogate_pair_in_a_key_of_the_users_survives(tmp_path: Path) -> None:
    record = parse_record(example() | {"note": "\ud800"})
    write_records(tmp_path / "d.jsonl", [record])
    assert read_records(tmp_path / "d.jsonl") == [record]


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        *[
            ("", True),
            (" \t\r\n\u00a0\u3000\x00\x1b", True),
            ("\u200b\u200d\u2060\ufeff\u00ad", True),
        ],
        *[("\u3164\u115f\u2800\ufe0f\u034f", True), ("\u200b.", False), ("\ufffd", False)],
        *[("\u0301", False), ("\U0001f600\ufe0f", False), ("\ue000", False), ("\U0003fffd", False)],
    ],
)
def test_a_text_without_ink_is_blank(text: str, blank: bool) -> None:
    """Whitespace, control and zero-width characters; private and unassigned ones may have ink."""
    assert is_blank(text) is blank
