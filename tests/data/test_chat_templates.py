"""What transformers makes of an export's chat template is what models are trained on, id by id.

With 1,000 other conversations for each template and each kind of tokenizer, instead of a few:

    python -m pytest tests/data/test_chat_templates.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.checkpoints.side_files import TrainedText, write_tokenizer
from steerlm2.data.chat_templates import messages_of
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.templates import (
    EXTRA_ID_TOKENS,
    Template,
    chatml_template,
    encode_for_scoring,
    encode_prompt,
    encode_segments,
    extra_id_template,
    llama3_template,
    response_end,
)
from steerlm2.data.tokenizers import HFTokenizer, train_byte_level_bpe
from steerlm2.facts import Kind, ModelFacts
from tests.data import test_templates

SCHEMA = AttributeSchema(("humor", "verbosity"))
DEFAULT = "humor:1,verbosity:2"
SYSTEM = "Be terse.\n"
EXAMPLES = 1_000 if settings.get_current_profile_name() == "thorough" else 30

WORDS = ["The quick brown fox eats 17 tokens extra of < and | and > begin end."] * 3
LETTERS = "abcdefghijklmnopqrstuvwxyzSUA<>0123456789:,.?"


def _splitting(digits: str, special: list[str]) -> RawTokenizer:
    """Byte-level BPE that cuts texts by Llama 3's and Qwen's pattern: line breaks make pieces."""
    raw = train_byte_level_bpe(WORDS, 320, [])
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.add_special_tokens(special)
    return raw


def _qwen_like() -> HFTokenizer:
    """Composes characters, and has added tokens that aren't special."""
    raw = _splitting(r"\p{N}", ["<|endoftext|>", *chatml_template().control_tokens])
    raw.normalizer = normalizers.NFC()
    raw.add_tokens(["<tool_call>"])
    return HFTokenizer(raw.to_str(), {})


def _llama3_like() -> HFTokenizer:
    raw = _splitting(r"\p{N}{1,3}", [*llama3_template().control_tokens])
    bos = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return HFTokenizer(raw.to_str(), {})


GEMMA_TOKENS = dict(zip(EXTRA_ID_TOKENS, (f"<unused{i}>" for i in range(3)), strict=True))
MISTRAL_TOKENS = dict(zip(EXTRA_ID_TOKENS, ("[INST]", "[/INST]", "[IMG]"), strict=True))


def _sentencepiece(added: list[str], merges: list[tuple[str, str]]) -> RawTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *added, *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS]
    pieces += ["".join(merge) for merge in merges if "".join(merge) not in added]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    raw = RawTokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(parts)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return raw


def _gemma_like() -> HFTokenizer:
    """Runs of spaces and of line breaks are added tokens, those of spaces as merges make them."""
    runs = ["\n\n", "\n\n\n", "▁▁", "▁▁▁"]
    raw = _sentencepiece([*GEMMA_TOKENS.values(), *runs], [("▁", "▁"), ("▁▁", "▁"), ("h", "e")])
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.add_tokens([AddedToken(each, normalized=False) for each in [*GEMMA_TOKENS.values(), *runs]])
    return HFTokenizer(raw.to_str(), {})


def _mistral_like() -> HFTokenizer:
    """Its own pre-tokenizer would put a space in front of the first text."""
    raw = _sentencepiece([*MISTRAL_TOKENS.values()], [("▁", "h"), ("h", "e")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    raw.add_special_tokens(["<unk>", "<s>", "</s>", *MISTRAL_TOKENS.values()])
    return HFTokenizer(raw.to_str(), {})


PAIRS: dict[str, tuple[Template, HFTokenizer]] = test_templates.PAIRS | {
    "llama3, by its pattern": (llama3_template(), _llama3_like()),
    "chatml, Qwen": (chatml_template(), _qwen_like()),
    "extra_id, Gemma": (extra_id_template(GEMMA_TOKENS), _gemma_like()),
    "extra_id, Mistral": (extra_id_template(MISTRAL_TOKENS), _mistral_like()),
}

each_pair = pytest.mark.parametrize("pair", PAIRS)

FRAGMENTS = (
    *("\n", "\n\n", "\r\n", "\r", " ", "  ", "   ", "\t", "\x0b", "\u00a0", "\u2028", "\x85", "\0"),
    *("a", "he", "Hello", " hello", ".", ",", "'s", "'LL", "17", "12345", "٣", "中文", "▁", "▁▁"),
    *("é", "e\u0301", "\u0301", "\u1100\u1161\u11a8", "ﬁ", "ß", "İ", "\ufeff", "\u200b", "\u200d"),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🏳️\u200d🌈",
        "\U0010ffff",
        "def f(x):\n    return x\n",
        "```",
        "    ",
    ),
    *("{{", "}}", "{%", "%}", "{#", "#}", "\\", "\\n", '"', "'", "<", "|", "<|", "|>", "[", "]"),
    *("<|im", "_start|>", "<extra_id", "_1>", "<extra_id_9>", "System\n", "User\n", "assistant"),
    *("<extra_id_1>", "<|eot_id|>", "<|im_end|>", "</s>", "<unused1>", "[/INST]", "<0x01>"),
)
"""Control tokens of some tokenizers, which are any text to others, among them."""


@functools.cache
def contents(pair: str) -> st.SearchStrategy[str]:
    """Awkward texts that spell no control token of the pair."""
    template, tokenizer = PAIRS[pair]
    special = json.loads(tokenizer._saved_json)["added_tokens"]
    spelled = {*template.control_tokens, "\x01", "\x02", "\x03"}
    spelled |= {t["content"] for t in special if t["content"].replace("▁", " ").strip()}
    others = st.characters(exclude_categories=["Cs"])
    return (
        st.lists(st.sampled_from(FRAGMENTS) | others, max_size=8)
        .map("".join)
        .filter(lambda text: not any(token in text for token in spelled))
    )


labels = st.builds("humor:{},verbosity:{}".format, st.integers(0, 4), st.integers(0, 4))


@functools.cache
def conversations(pair: str) -> st.SearchStrategy[list[Turn]]:
    """Up to a question."""
    questions = st.builds(Turn, st.just(USER), contents(pair))
    answers = st.builds(Turn, st.just(ASSISTANT), contents(pair), st.none() | labels)
    return st.builds(
        lambda pairs, last: [*(turn for pair in pairs for turn in pair), last],
        st.lists(st.tuples(questions, answers), max_size=2),
        questions,
    )


@functools.cache
def exported(
    pair: str,
    kind: Kind = "language model",
    schema: AttributeSchema | None = SCHEMA,
    default: str | None = DEFAULT,
) -> Any:
    """The tokenizer as transformers loads it from the folder that an export has."""
    template, tokenizer = PAIRS[pair]
    facts = ModelFacts(kind=kind, template={}, schema=schema, default_label=default, system=SYSTEM)
    stop_id = response_end(template, tokenizer)[1]
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), TrainedText(tokenizer, template, stop_id), 0, facts)
        return AutoTokenizer.from_pretrained(folder)


def ids(pair: str, messages: list[dict[str, Any]], **arguments: Any) -> list[int]:
    arguments = {"add_generation_prompt": True} | arguments
    tokenizer = arguments.pop("tokenizer", None) or exported(pair)
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **arguments))


def ours(pair: str, system: str, turns: list[Turn], label: str | None) -> list[int]:
    template, tokenizer = PAIRS[pair]
    return encode_prompt(template, tokenizer, system, turns, label)


QUESTION = [Turn(USER, "Why?")]
MESSAGES = [{"role": "user", "content": "Why?"}]


WAYS = ("a mapping", "a label", "a message", "a part of it")
"""To say what the answer should have."""


@each_pair
@settings(max_examples=EXAMPLES)
@given(data=st.data(), label=labels, way=st.sampled_from(WAYS), as_mappings=st.booleans())
def test_a_prompt_has_the_ids_that_are_trained_on(
    pair: str, data: st.DataObject, label: str, way: str, as_mappings: bool
) -> None:
    """However its label and those of earlier answers are said."""
    system, turns = data.draw(contents(pair)), data.draw(conversations(pair))
    messages: list[dict[str, Any]] = [*messages_of(system, turns)]
    if as_mappings:
        for message in messages:
            if message.get("attributes"):
                message["attributes"] = parse_label(message["attributes"])
    values = parse_label(label)
    arguments: dict[str, Any] = {"attributes": values if way == "a mapping" else label}
    if way == "a message":
        arguments = {}
        messages.append({"role": "attributes", "content": label})
    elif way == "a part of it":
        arguments = {"attributes": {"verbosity": values["verbosity"]}}
        label = f"humor:1,verbosity:{values['verbosity']}"
    assert ids(pair, messages, **arguments) == ours(pair, system, turns, label)


@each_pair
@settings(max_examples=EXAMPLES)
@given(data=st.data(), label=st.none() | labels)
def test_a_whole_conversation_is_the_prompt_and_the_answer(
    pair: str, data: st.DataObject, label: str | None
) -> None:
    """In one piece; the label stands in the last message or in the argument."""
    template, tokenizer = PAIRS[pair]
    system, turns = data.draw(contents(pair)), data.draw(conversations(pair))
    answer = data.draw(contents(pair))
    segments = [*template.prompt(system, turns, label), *template.response(answer)]
    expected = encode_segments(segments, tokenizer, template.control_tokens)
    if tokenizer.bos_id is not None and expected[0] != tokenizer.bos_id:
        expected = [tokenizer.bos_id, *expected]
    messages = messages_of(system, [*turns, Turn(ASSISTANT, answer, label)])
    assert ids(pair, messages, add_generation_prompt=False) == expected
    del messages[-1]["attributes"]
    whole = ids(pair, messages, add_generation_prompt=False, attributes=label or "")
    assert whole == expected
    assert whole[-1] == response_end(template, tokenizer)[1]


@each_pair
def test_what_is_not_said_is_as_in_training(pair: str) -> None:
    """The usual system text, and the usual values."""
    assert ids(pair, MESSAGES) == ours(pair, SYSTEM, QUESTION, DEFAULT)
    assert ids(pair, MESSAGES, attributes={"verbosity": 4}) == ours(
        pair, SYSTEM, QUESTION, "humor:1,verbosity:4"
    )


@each_pair
def test_there_need_be_no_label_and_no_system_text(pair: str) -> None:
    messages = [{"role": "system", "content": ""}, *MESSAGES]
    assert ids(pair, messages, attributes="") == ours(pair, "", QUESTION, None)


@each_pair
def test_a_message_can_say_the_label(pair: str) -> None:
    """For tools that pass no arguments."""
    label = {"role": "attributes", "content": "verbosity:0,humor:4"}
    assert ids(pair, [*MESSAGES, label]) == ours(pair, SYSTEM, QUESTION, "humor:4,verbosity:0")


@each_pair
def test_a_model_without_labels_has_none(pair: str) -> None:
    tokenizer = exported(pair, schema=None, default=None)
    assert ids(pair, MESSAGES, tokenizer=tokenizer) == ours(pair, SYSTEM, QUESTION, None)
    with pytest.raises(Exception, match="unknown attribute humor"):
        ids(pair, MESSAGES, tokenizer=tokenizer, attributes={"humor": 1})


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"humour": 1}, "unknown attribute humour, known: humor, verbosity"),
        ({"humor": 5}, "humor must be a whole number from 0 to 4, got 5"),
        ({"humor": -1}, "humor must be a whole number from 0 to 4, got -1"),
        ({"humor": 1.5}, "humor must be a whole number"),
        ({"humor": True}, "humor must be a whole number"),
        ({"humor": "4"}, "humor must be a whole number"),
        ("humor:5", "humor must be a whole number"),
        ("humor:1,humor:2", "humor is given twice"),
        ("humor", "humor is not of the form name:number"),
        ("humor:04", "humor:04 is not of the form name:number"),
        ("humor:4 ,verbosity:1", "humor:4  is not of the form name:number"),
    ],
)
def test_other_attributes_are_refused(attributes: Any, message: str) -> None:
    for prompted in (True, False):
        with pytest.raises(Exception, match=message):
            ids("llama3", MESSAGES, attributes=attributes, add_generation_prompt=prompted)


@pytest.mark.parametrize("role", ["tool", "function", "User"])
def test_other_roles_are_refused(role: str) -> None:
    with pytest.raises(Exception, match=f"unknown role {role}"):
        ids("llama3", [*MESSAGES, {"role": role, "content": "x"}])


@each_pair
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_an_attribute_model_reads_what_it_was_trained_on(pair: str, data: st.DataObject) -> None:
    """Whatever labels the messages have."""
    template, tokenizer = PAIRS[pair]
    system, turns = data.draw(contents(pair)), data.draw(conversations(pair))
    answer = data.draw(contents(pair))
    group, _ = encode_for_scoring(template, tokenizer, system, turns, [answer], 10_000)
    messages = messages_of(system, [*turns, Turn(ASSISTANT, answer, "humor:1,verbosity:1")])
    assert ids(pair, messages, tokenizer=exported(pair, "attribute model")) == [
        *group.prompt,
        *group.responses[0],
    ]


@pytest.mark.parametrize("content", [None, ["a", "list"], {}, 5])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_contents_that_are_no_text_are_refused(role: str, content: Any) -> None:
    """Not written as Python would write them."""
    messages = [{"role": role, "content": content}, *MESSAGES]
    with pytest.raises(Exception, match=f"the content of a message of the role {role} is no text"):
        ids("llama3", messages)


def test_names_of_attributes_may_be_awkward() -> None:
    names = ("items", "größe", "漢字", "none", "a.b-c", "2nd", "_", "true")
    schema = AttributeSchema(names)
    values = {name: i % 5 for i, name in enumerate(names)}
    default = ",".join(f"{name}:0" for name in names)
    tokenizer = exported("llama3", schema=schema, default=default)
    label = ",".join(f"{name}:{value}" for name, value in values.items())
    expected = ours("llama3", SYSTEM, QUESTION, label)
    assert ids("llama3", MESSAGES, tokenizer=tokenizer, attributes=values) == expected
    assert ids("llama3", MESSAGES, tokenizer=tokenizer, attributes=label) == expected
    with pytest.raises(Exception, match="unknown attribute x, known: items, größe, 漢字, none"):
        ids("llama3", MESSAGES, tokenizer=tokenizer, attributes={"x": 1})


def test_an_attribute_model_needs_an_answer() -> None:
    with pytest.raises(Exception, match="the last message must be the assistant's"):
        ids("llama3", MESSAGES, tokenizer=exported("llama3", "attribute model"))
