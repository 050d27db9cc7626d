"""Templates: exact strings, one id per control token, contents that can't imitate one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, processors

from steerlm2.data.records import Turn
from steerlm2.data.templates import (
    EXTRA_ID_TOKENS,
    Segment,
    Template,
    encode_prompt,
    encode_response,
    encode_segments,
    extra_id_template,
    llama3_template,
    segments_to_text,
)
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer, train_byte_level_bpe

TINY = tiny_tokenizer()
TURNS = [Turn("User", "Hi."), Turn("Assistant", "Yes?", "humor:1"), Turn("User", "Why?")]
LLAMA2_TOKENS = dict(zip(EXTRA_ID_TOKENS, ("<0x01>", "<0x02>", "<0x03>"), strict=True))
LLAMA3_TOKENS = {name: f"<|reserved_special_token_{i}|>" for i, name in enumerate(EXTRA_ID_TOKENS)}


def _llama3_tokenizer() -> HFTokenizer:
    raw = train_byte_level_bpe(["assistant user system attributes quality:4 why"] * 3, 300, [])
    raw.add_special_tokens([*llama3_template().control_tokens, *LLAMA3_TOKENS.values()])
    bos = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return HFTokenizer(raw.to_str(), {})


def _llama2_tokenizer() -> HFTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += list("abcdefghijklmnopqrstuvwxyzSUA<>0123456789:,.?")
    raw = RawTokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return HFTokenizer(raw.to_str(), {})


LLAMA3 = _llama3_tokenizer()
LLAMA2 = _llama2_tokenizer()
PAIRS: dict[str, tuple[Template, HFTokenizer]] = {
    "extra_id, tiny": (extra_id_template(), TINY),
    "extra_id, Llama 3": (extra_id_template(LLAMA3_TOKENS), LLAMA3),
    "extra_id, Llama 2": (extra_id_template(LLAMA2_TOKENS), LLAMA2),
    "llama3": (llama3_template(), LLAMA3),
}


@pytest.fixture(scope="module")
def examples(shared_dir: Path) -> list[dict[str, Any]]:
    text = (shared_dir / "vectors" / "steerlm2_examples.json").read_text(encoding="utf-8")
    return json.loads(text)


def _turns(example: dict[str, Any]) -> list[Turn]:
    return [Turn(turn["from"], turn["value"]) for turn in example["prompt_turns"]]


def test_published_examples_as_text(examples: list[dict[str, Any]]) -> None:
    template = extra_id_template()
    for case in examples:
        example, expected = case["example"], case["expected"]
        prompt = template.prompt(example["system"], _turns(example), example["label"])
        assert segments_to_text(prompt) == expected["prompt"]
        for i, response in enumerate(example["responses"]):
            full = segments_to_text([*prompt, *template.response(response["value"])])
            assert full == expected["full_text"][i]
            assert len(segments_to_text(prompt)) == expected["response_start_char"][i]


def test_published_examples_as_ids(examples: list[dict[str, Any]]) -> None:
    """The ids of prompt and response decode to the two halves of the published string."""
    template = extra_id_template()
    for case in examples:
        example, expected = case["example"], case["expected"]
        prompt = encode_prompt(template, TINY, example["system"], _turns(example), example["label"])
        assert TINY.decode(prompt) == expected["prompt"]
        for i, response in enumerate(example["responses"]):
            ids = encode_response(template, TINY, response["value"])
            assert TINY.decode(prompt + ids) == expected["full_text"][i]


def test_extra_id_shows_labels_of_earlier_turns() -> None:
    assert segments_to_text(extra_id_template().prompt("S", TURNS, "quality:4")) == (
        "<extra_id_0>System\nS\n<extra_id_1>User\nHi.\n"
        "<extra_id_1>Assistant\n<extra_id_2>humor:1\nYes?\n"
        "<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n<extra_id_2>quality:4\n"
    )


def test_llama3_text() -> None:
    assert segments_to_text(llama3_template().prompt("S", TURNS, "quality:4")) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>attributes<|end_header_id|>\n\nhumor:1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>attributes<|end_header_id|>\n\nquality:4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert segments_to_text(llama3_template().response("So.")) == "So.<|eot_id|>"


def test_llama3_leaves_out_what_is_not_given() -> None:
    assert segments_to_text(llama3_template().prompt("", TURNS[:1], None)) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_every_content_is_a_segment_of_its_own(pair: str) -> None:
    template, _ = PAIRS[pair]
    contents = [s.text for s in template.prompt("S", TURNS, "quality:4") if not s.control]
    assert {"S", "Hi.", "Yes?", "Why?", "humor:1", "quality:4"} <= set(contents)
    assert Segment("So.") in template.response("So.")


@pytest.mark.parametrize("pair", PAIRS)
def test_control_tokens_lists_all_control_segments(pair: str) -> None:
    template, _ = PAIRS[pair]
    segments = template.prompt("S", TURNS, "quality:4") + template.response("So.")
    assert {s.text for s in segments if s.control} == set(template.control_tokens)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_stop_token_is_one_control_token_at_the_end(pair: str) -> None:
    template, tokenizer = PAIRS[pair]
    stop = template.response("So.")[-1]
    assert stop.control
    assert encode_response(template, tokenizer, "So.")[-1] == tokenizer.token_id(stop.text)


CONTENT = st.lists(
    st.sampled_from([t for template, _ in PAIRS.values() for t in template.control_tokens])
    | st.sampled_from(["<extra_<extra_id_1>id_1>", "</s>", "\x01", "\x02", "\x03", "|>", " "])
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.tuples(CONTENT, CONTENT, CONTENT, CONTENT, CONTENT))
def test_contents_yield_no_control_token(pair: str, contents: tuple[str, ...]) -> None:
    """As many control ids as control segments (and a bos), at the same places as with "x"."""
    template, tokenizer = PAIRS[pair]

    def control_ids(system: str, user: str, answer: str, label: str, response: str) -> list[int]:
        turns = [Turn("User", user), Turn("Assistant", answer, label), Turn("User", user)]
        ids = encode_prompt(template, tokenizer, system, turns, label)
        ids += encode_response(template, tokenizer, response)
        reserved = {tokenizer.token_id(token) for token in template.control_tokens}
        reserved |= {tokenizer.bos_id, tokenizer.eos_id}
        return [token_id for token_id in ids if token_id in reserved]

    # The llama3 template has no system turn for an empty system text.
    system = contents[0] or "x"
    assert control_ids(system, *contents[1:]) == control_ids(*["x"] * 5)


def test_without_a_label_its_control_token_is_still_kept_out() -> None:
    """No segment of this prompt is <0x03>, the label's token: U+0003 in a text must not be it."""
    template, tokenizer = PAIRS["extra_id, Llama 2"]
    label_id = tokenizer.token_id("<0x03>")
    assert label_id in tokenizer.encode("a\x03b")
    assert label_id not in encode_prompt(template, tokenizer, "a\x03b", TURNS[:1], None)
    assert label_id not in encode_response(template, tokenizer, "a\x03b")


def test_byte_tokens_cost_only_their_own_characters() -> None:
    template, tokenizer = PAIRS["extra_id, Llama 2"]
    text = "tab\t newline\n ctrl\x04 數學 \x7f"
    ids = encode_response(template, tokenizer, text + "\x01\x02\x03")
    assert tokenizer.decode(ids[:-1]) == text + "\n"


def test_bos_comes_first_and_only_once() -> None:
    bos2, bos3 = LLAMA2.bos_id, LLAMA3.bos_id
    assert bos2 is not None
    assert bos3 is not None
    extra2 = encode_prompt(*PAIRS["extra_id, Llama 2"], "S", TURNS, None)
    extra3 = encode_prompt(*PAIRS["extra_id, Llama 3"], "S", TURNS, None)
    own3 = encode_prompt(*PAIRS["llama3"], "S", TURNS, None)
    assert extra2[:2] == [bos2, LLAMA2.token_id("<0x01>")]
    assert extra3[:2] == [bos3, LLAMA3.token_id("<|reserved_special_token_0|>")]
    assert own3[:2] == [bos3, LLAMA3.token_id("<|start_header_id|>")]
    for ids, bos in ((extra2, bos2), (extra3, bos3), (own3, bos3)):
        assert ids.count(bos) == 1
    assert encode_prompt(*PAIRS["extra_id, tiny"], "S", TURNS, None)[0] == TINY.token_id(
        "<extra_id_0>"
    )


def test_the_responses_ids_do_not_depend_on_the_prompt() -> None:
    """A token never spans the boundary: prompt ids + response ids, whatever stands around."""
    template, tokenizer = PAIRS["extra_id, tiny"]
    text = " leading space"
    segments = template.prompt("S", TURNS, "quality:4") + template.response(text)
    prompt = encode_prompt(template, tokenizer, "S", TURNS, "quality:4")
    assert encode_segments(segments, tokenizer) == prompt + encode_response(
        template, tokenizer, text
    )


def test_missing_control_tokens_are_all_named() -> None:
    with pytest.raises(ValueError, match="control_tokens") as error:
        encode_response(extra_id_template(), LLAMA3, "So.")
    for token in EXTRA_ID_TOKENS:
        assert f"{token} is no token of this tokenizer" in str(error.value)


def test_a_control_token_that_text_can_spell_is_refused() -> None:
    template = extra_id_template({"<extra_id_1>": "?"})
    with pytest.raises(ValueError, match=r"\? is ordinary text for this tokenizer"):
        encode_prompt(template, TINY, "S", TURNS, None)


@pytest.mark.parametrize(
    ("control_tokens", "message"),
    [
        ({"extra_id_0": "<a>"}, "unknown key 'extra_id_0'; known: <extra_id_0>"),
        ({"<extra_id_0>": "<extra_id_1>"}, "must differ"),
        ({"<extra_id_0>": "<0x0A>"}, "<0x0A> stands for a character"),
        ({"<extra_id_0>": "<0xe2>"}, "<0xe2> stands for a character"),
        ({"<extra_id_0>": "<0x09>"}, "<0x09> stands for a character"),
    ],
)
def test_control_token_mapping_is_checked(control_tokens: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extra_id_template(control_tokens)
