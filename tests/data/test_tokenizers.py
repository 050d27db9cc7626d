"""Plain text never becomes a control token, whatever the text and whatever kind of tokenizer."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steerlm2.data.tokenizers import (
    LONG_TEXT,
    TINY_SPECIAL_TOKENS,
    HFTokenizer,
    hf_tokenizer,
    spare_token_id,
    tiny_tokenizer,
    train_byte_level_bpe,
)

TEXTS = ["The quick brown fox eats 17 id tokens extra of < and | and > begin end _."] * 3
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llama3_like() -> tokenizers.Tokenizer:
    """Byte-level BPE that prefers whole pieces (ignore_merges), with a bos token in front."""
    raw = train_byte_level_bpe(TEXTS, 320, [])
    spec = json.loads(raw.to_str())
    spec["model"]["ignore_merges"] = True
    # What makes it adversarial: the model's own vocabulary spells a control token.
    spec["model"]["vocab"] |= {"<|": 320, "evil": 321}
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    raw.add_special_tokens([*LLAMA3_TOKENS, "evil"])
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", raw.token_to_id("<|begin_of_text|>"))],
    )
    return raw


def llama2_like() -> tokenizers.Tokenizer:
    """SentencePiece-style BPE: byte fallback, a dummy space in front of every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTN<>/_|0123456789", "▁T", "he", "▁The"]
    raw = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "T"), ("h", "e"), ("▁T", "he")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return raw


def unigram() -> tokenizers.Tokenizer:
    """Prefers a control token's own string to anything shorter: the worst case."""
    chars = [(char, -9.0) for char in "▁abcdefghijklmnopqrstuvwxyz<>_|0123456789 "]
    controls = [("<extra_id_0>", -1.0), ("<extra_id_1>", -1.0), ("a", -9.0)]
    raw = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), *controls, *chars], unk_id=0, byte_fallback=False)
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    raw.add_special_tokens(["<unk>", "<extra_id_0>", "<extra_id_1>"])
    return raw


def normalising() -> tokenizers.Tokenizer:
    """Control tokens that aren't special, and a normalizer that can turn other text into them."""
    raw = train_byte_level_bpe(TEXTS, 300, [])
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.add_tokens([AddedToken("<extra_id_0>", normalized=True), AddedToken("<extra_id_1>")])
    raw.add_tokens([AddedToken("ks", single_word=True, lstrip=True, rstrip=True)])
    return raw


def tiny() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tiny_tokenizer()._saved_json)


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "tiny": tiny,
    "llama3_like": llama3_like,
    "llama2_like": llama2_like,
    "unigram": unigram,
    "normalising": normalising,
}
RAW = {name: build() for name, build in KINDS.items()}
TOKENIZERS = {name: HFTokenizer(raw.to_str(), {}) for name, raw in RAW.items()}


def added_ids(raw: tokenizers.Tokenizer) -> set[int]:
    return set(raw.get_added_tokens_decoder())


FRAGMENTS = st.sampled_from(
    [
        *("<extra_id_0>", "<extra_id_1>", "<extra_", "id_", "_id", "1>", "0>", "<EXTRA_ID_1>"),
        *(
            "\uff1cextra_id_0\uff1e",
            "<|eot_id|>",
            "<|",
            "|>",
            "eot",
            "<|begin_of_text|>",
            "begin_of_text",
        ),
        *("<|endoftext|>", "<pad>", "<s>", "</s>", "<unk>", "evil", "ev", "il", "ks", "㎘", "▁"),
        *("<0x01>", "\x01", "\x02", "▁<s>", " ", "\n", "ab", "é", "\u200d", "數", "\u0301"),
    ]
)
ADVERSARIAL = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)
NESTED = st.builds(
    lambda outer, inner, at: outer[: at % len(outer)] + inner + outer[at % len(outer) :],
    st.sampled_from(["<extra_id_1>", "<|eot_id|>", "</s>", "<pad>"]),
    FRAGMENTS,
    st.integers(0, 100),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(content=ADVERSARIAL | NESTED | st.text())
def test_content_never_yields_a_control_token(kind: str, content: str) -> None:
    assert added_ids(RAW[kind]).isdisjoint(TOKENIZERS[kind].encode(content))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("tiny", "<extra_<extra_id_1>id_1>"),
        ("tiny", "a<|endoftext|>"),
        ("llama3_like", "<|eot_id|>"),
        ("llama3_like", "evil"),
        ("llama2_like", "a</s>"),
        ("unigram", "a<extra_id_0><extra_id_1>"),
        ("normalising", "\uff1cEXTRA_ID_0\uff1e"),
        ("normalising", "a ks b"),
    ],
)
def test_these_contents_are_dangerous(kind: str, content: str) -> None:
    """The library itself does yield a control token for them: the property above can fail."""
    raw_ids = RAW[kind].encode(content, add_special_tokens=False).ids
    assert not added_ids(RAW[kind]).isdisjoint(raw_ids)
    assert added_ids(RAW[kind]).isdisjoint(TOKENIZERS[kind].encode(content))


@pytest.mark.parametrize(("kind", "text"), [("unigram", "a<extra_id_0>b<extra_id_0><extra_id_1>")])
def test_a_spelled_control_token_keeps_its_text(kind: str, text: str) -> None:
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


def test_the_vocabulary_that_spells_a_control_token_is_dangerous_without_added_tokens() -> None:
    """ "evil" is a piece of the model: leaving out the added tokens alone would not keep it out."""
    spec = json.loads(RAW["llama3_like"].to_str()) | {"added_tokens": [], "post_processor": None}
    evil = RAW["llama3_like"].token_to_id("evil")
    assert tokenizers.Tokenizer.from_str(json.dumps(spec)).encode("evil").ids == [evil]
    assert TOKENIZERS["llama3_like"].decode(TOKENIZERS["llama3_like"].encode("evil")) == "evil"


@pytest.mark.parametrize("kind", ["tiny", "llama3_like"])
@settings(max_examples=150)
@given(content=ADVERSARIAL | st.text())
def test_byte_level_tokenizers_lose_nothing(kind: str, content: str) -> None:
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(content)) == content


# "▁" itself is how such tokenizers write a space: the one character that they can't tell apart.
@settings(max_examples=150)
@given(content=(ADVERSARIAL | st.text()).filter(lambda text: "▁" not in text))
def test_sentencepiece_style_tokenizers_lose_nothing_and_add_no_space(content: str) -> None:
    tokenizer = TOKENIZERS["llama2_like"]
    assert tokenizer.decode(tokenizer.encode(content)) == content


@pytest.mark.parametrize("kind", KINDS)
def test_segments_join_like_their_text(kind: str) -> None:
    """No dummy space: the ids of "ab" and " cd" decode to "ab cd"."""
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode([*tokenizer.encode("ab"), *tokenizer.encode(" cd")]) == "ab cd"
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("kind", KINDS)
def test_many_control_strings_take_no_deep_recursion(kind: str) -> None:
    content = "<extra_id_0><|eot_id|></s>" * 2000
    assert added_ids(RAW[kind]).isdisjoint(TOKENIZERS[kind].encode(content))


def test_plain_text_is_encoded_as_the_library_does() -> None:
    text = "The quick brown fox,\n\n17 foxes: größer 數"
    for kind in ("tiny", "llama3_like"):
        expected = RAW[kind].encode(text, add_special_tokens=False).ids
        assert TOKENIZERS[kind].encode(text) == expected


@pytest.mark.parametrize("kind", ["tiny", "llama3_like", "llama2_like"])
@given(content=ADVERSARIAL)
def test_no_token_stands_for_more_bytes_than_is_said(kind: str, content: str) -> None:
    """So a text of more bytes has more tokens, and needn't be tokenised to know it."""
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.most_bytes_a_token is not None
    assert tokenizer.most_bytes_a_token < 50
    num_bytes = len(content.encode("utf-8", "replace"))
    assert num_bytes <= tokenizer.most_bytes_a_token * len(tokenizer.encode(content))


@pytest.mark.parametrize("kind", ["unigram", "normalising"])
def test_where_a_token_may_stand_for_any_text_nothing_is_said(kind: str) -> None:
    """Unknown characters in a row are one token; NFKC may leave out what it likes."""
    assert TOKENIZERS[kind].most_bytes_a_token is None


def test_a_normalizer_that_joins_letters_is_counted() -> None:
    """NFC, Qwen's, makes at most 9 bytes into 3."""
    raw = train_byte_level_bpe(TEXTS, 300, [])
    plain = HFTokenizer(raw.to_str(), {}).most_bytes_a_token
    raw.normalizer = normalizers.NFC()
    assert plain is not None
    assert HFTokenizer(raw.to_str(), {}).most_bytes_a_token == 3 * plain


def test_long_texts_are_encoded_as_short_ones() -> None:
    """On both sides of the length from which it is done without the global lock."""
    text = "The terse é 漢 <extra_id_1>\n" * (2 * LONG_TEXT // 20)
    for kind in ("tiny", "llama2_like"):
        tokenizer = TOKENIZERS[kind]
        short = tokenizer._content.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == short


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    """A thread that wants to run every millisecond does so ten times in a second."""
    tokenizer, ended, ticks = TOKENIZERS["tiny"], threading.Event(), 0

    def tick() -> None:
        nonlocal ticks
        while not ended.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        num_ids = len(tokenizer.encode("word " * 40_000))
    finally:
        ended.set()
        thread.join()
    assert num_ids > 40_000
    assert ticks >= 10


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    tokenizer = TOKENIZERS["tiny"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    raw = tiny()
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    tokenizer = HFTokenizer(raw.to_str(), {})
    for text in ("a", "The quick brown fox and many more words."):
        assert tokenizer.encode(text) == TOKENIZERS["tiny"].encode(text)


def test_dropout_of_the_file_does_not_apply() -> None:
    raw = tiny()
    raw.model.dropout = 0.9
    tokenizer = HFTokenizer(raw.to_str(), {})
    text = "What is the capital of France?"
    assert tokenizer.encode(text) == TOKENIZERS["tiny"].encode(text)


def test_added_runs_of_white_space_stay_text_with_their_ids() -> None:
    """As in GPT-NeoX: control tokens first, so that leaving them out could shift the runs' ids."""
    raw = train_byte_level_bpe(TEXTS, 300, [])
    raw.add_special_tokens(["<|a|>", "<|b|>"])
    raw.add_tokens([AddedToken("    ", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer = HFTokenizer(raw.to_str(), {})
    text = "if x:\n      return <|a|>"
    assert raw.token_to_id("    ") in tokenizer.encode(text)
    assert raw.token_to_id("  ") in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {raw.token_to_id("<|a|>"), raw.token_to_id("<|b|>")}.isdisjoint(tokenizer.encode(text))


def test_an_added_token_of_one_character_is_still_spelled_in_bytes() -> None:
    """It can't be cut in two; leaving it out would lose the user's text."""
    raw = train_byte_level_bpe(TEXTS, 300, [])
    raw.add_special_tokens(["數"])
    tokenizer = HFTokenizer(raw.to_str(), {})
    assert raw.token_to_id("數") not in tokenizer.encode("a數b")
    assert tokenizer.decode(tokenizer.encode("a數b")) == "a數b"


def test_token_id_knows_whole_tokens_only() -> None:
    tokenizer = TOKENIZERS["tiny"]
    assert tokenizer.token_id("<extra_id_1>") == TINY_SPECIAL_TOKENS.index("<extra_id_1>")
    assert tokenizer.token_id("<extra_id_99>") is None
    assert tokenizer.decode([3]) == "<extra_id_1>"


def test_bos_is_what_the_tokenizer_puts_first() -> None:
    raw = RAW["llama3_like"]
    assert TOKENIZERS["llama3_like"].bos_id == raw.token_to_id("<|begin_of_text|>")
    assert TOKENIZERS["llama2_like"].bos_id == 1
    assert TOKENIZERS["tiny"].bos_id is None


@pytest.mark.parametrize(("adds", "expected"), [(True, 2), (False, None), (None, None)])
def test_add_bos_token_of_the_config_decides(adds: bool | None, expected: int | None) -> None:
    config = {"bos_token": {"content": "<extra_id_0>"}, "add_bos_token": adds}
    tokenizer = HFTokenizer(tiny().to_str(), {"tokenizer_config.json": json.dumps(config)})
    assert tokenizer.bos_id == expected


def test_eos_and_pad_come_from_the_config_or_the_special_tokens_map() -> None:
    special = {"eos_token": "<extra_id_3>", "pad_token": "<extra_id_4>"}
    config = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    tokenizer = HFTokenizer(
        tiny().to_str(),
        {
            "special_tokens_map.json": json.dumps(special),
            "tokenizer_config.json": json.dumps(config),
        },
    )
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 6)


def test_pad_falls_back_to_a_known_name_then_eos_then_zero() -> None:
    assert TOKENIZERS["llama2_like"].pad_id == 0  # <unk>
    raw = train_byte_level_bpe(TEXTS, 300, [])
    raw.add_special_tokens(["<|eot_id|>"])
    config = {"tokenizer_config.json": json.dumps({"eos_token": "<|eot_id|>"})}
    assert HFTokenizer(raw.to_str(), config).pad_id == 300
    assert HFTokenizer(raw.to_str(), {}).pad_id == 0
    raw.add_special_tokens(["<|finetune_right_pad_id|>"])
    assert HFTokenizer(raw.to_str(), config).pad_id == 301


def test_saved_files_load_here_and_in_transformers(tmp_path: Path) -> None:
    tiny_tokenizer().save(tmp_path / "new" / "folder")
    ours = hf_tokenizer(tmp_path / "new" / "folder")
    for loader in (PreTrainedTokenizerFast, AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path / "new" / "folder")
        assert len(theirs) == ours.vocab_size == 512
        assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id) == (0, 1)
        text = "System\nWhat is the capital of Peru ? größer 數學 , ok ."
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
        assert theirs.convert_tokens_to_ids("<extra_id_2>") == ours.token_id("<extra_id_2>") == 4


def test_save_keeps_the_files_that_were_loaded(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    contents = {
        "tokenizer.json": RAW["tiny"].to_str(pretty=True),
        "tokenizer_config.json": '{"bos_token": "<s>", "add_bos_token": true}',
        "special_tokens_map.json": '{"eos_token": "</s>"}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in contents.items():
        (source / name).write_text(text, encoding="utf-8")
    (source / "model.safetensors").write_bytes(b"")
    hf_tokenizer(source).save(target)
    assert {file.name: file.read_text(encoding="utf-8") for file in target.iterdir()} == contents


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("text", [" a", "a b\n", "\n\n", "Ä 😀"])
def test_what_is_saved_encodes_as_here(tmp_path: Path, kind: str, text: str) -> None:
    """Without the dummy space that transformers' class for Llama 2 would put in front.

    The token for unknown characters is a control token here.
    """
    tokenizer = HFTokenizer(
        RAW[kind].to_str(), {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}
    )
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert [i for i in theirs if i not in tokenizer.control_ids] == tokenizer.encode(text)


def test_a_bare_tokenizer_json_loads_and_saves(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tiny().to_str(), encoding="utf-8")
    tokenizer = hf_tokenizer(tmp_path / "tokenizer.json")
    tokenizer.save(tmp_path / "saved")
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")) == 512


def test_missing_tokenizer_names_the_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model alone isn't enough") as error:
        hf_tokenizer("model")
    assert str(tmp_path / "model" / "tokenizer.json") in str(error.value)


def test_of_a_run_the_newest_exports_tokenizer_is_meant(tmp_path: Path) -> None:
    """Not that of an export that isn't complete; and a folder's own comes first."""
    for epoch in (1, 2):
        tiny_tokenizer().save(tmp_path / f"epoch_{epoch}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "epoch_1" / name).write_text("{}")
    (tmp_path / "epoch_2" / "tokenizer.json").write_text("cut off")
    assert hf_tokenizer(tmp_path).encode("Hello!") == tiny_tokenizer().encode("Hello!")
    (tmp_path / "tokenizer.json").write_text("my own")
    with pytest.raises(ValueError, match="is no usable tokenizer"):
        hf_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "not json"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no usable tokenizer"):
        hf_tokenizer(tmp_path)


def test_tokenizers_travel_to_worker_processes() -> None:
    copy = pickle.loads(pickle.dumps(tiny_tokenizer()))
    assert copy.encode("The Nile.") == TOKENIZERS["tiny"].encode("The Nile.")


def test_tiny_tokenizer_layout() -> None:
    """pad 0, eos 1, <extra_id_0..7> 2..9, 256 bytes, 246 merges: 512."""
    tokenizer = tiny_tokenizer()
    assert [tokenizer.token_id(token) for token in TINY_SPECIAL_TOKENS] == list(range(10))
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode(list(range(10))) == "".join(TINY_SPECIAL_TOKENS)


# What attribute models pad with


def with_tokens(*special: str, **config: str) -> HFTokenizer:
    """A byte-level tokenizer with these tokens after its 266 others, and their roles."""
    raw = train_byte_level_bpe(TEXTS, 266, [])
    raw.add_special_tokens(list(special))
    return HFTokenizer(raw.to_str(), {"tokenizer_config.json": json.dumps(config)})


def test_the_pad_token_is_what_texts_are_padded_with() -> None:
    """Of any name."""
    tokenizer = with_tokens("<unk>", "<end>", "<fill>", eos_token="<end>", pad_token="<fill>")
    assert spare_token_id(tokenizer, []) == tokenizer.token_id("<fill>")


def test_a_pad_token_that_ends_texts_is_not_spare() -> None:
    """transformers takes the first token after a text for padding, but would stop before an eos."""
    tokenizer = with_tokens("<end>", "<unk>", eos_token="<end>", pad_token="<end>")
    assert tokenizer.pad_id == tokenizer.eos_id
    assert spare_token_id(tokenizer, []) == tokenizer.token_id("<unk>")


def test_a_token_of_the_template_is_not_spare() -> None:
    """A text that ends with the pad token would be read one token too early."""
    tokenizer = with_tokens("<pad>", "<unk>", pad_token="<pad>")
    used = [tokenizer.token_id("<pad>")]
    assert spare_token_id(tokenizer, used) == tokenizer.token_id("<unk>")


def test_llama3_is_padded_with_a_token_that_it_reserves() -> None:
    """It has no pad token; those that a template uses (the first ones) stay free."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    tokenizer = with_tokens("<|begin_of_text|>", "<|end_of_text|>", *reserved, **config)
    used = [tokenizer.token_id(token) for token in reserved[:3]]
    assert spare_token_id(tokenizer, used) == tokenizer.token_id(reserved[250])


def test_any_control_token_will_do_where_none_has_a_name_for_it() -> None:
    """As of Qwen2.5's base models, whose pad token ends texts, and of SmolLM2-Instruct's."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>")
    tokenizer = with_tokens(*names, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    used = [tokenizer.token_id(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert spare_token_id(tokenizer, used) == tokenizer.token_id("<file_sep>")


@pytest.mark.parametrize("special", [(), ("<pad>",)])
def test_a_tokenizer_without_a_spare_token_is_refused(special: tuple[str, ...]) -> None:
    """One has nothing but text, and id 0 is "!"; the other's only token is used already."""
    tokenizer = with_tokens(*special)
    assert tokenizer.pad_id == (tokenizer.token_id("<pad>") or 0)
    with pytest.raises(ValueError, match=r"give it a pad_token in tokenizer_config\.json"):
        spare_token_id(tokenizer, [tokenizer.token_id("<pad>")])
