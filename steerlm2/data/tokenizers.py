"""Tokenizers that never encode plain text as a control token.

A Hugging Face tokenizer finds its added tokens ("<|eot_id|>", "<extra_id_1>") in any text that it
encodes. Content is therefore encoded by a second tokenizer, built from the same file without them.
A vocabulary may also hold a control token as an ordinary piece; such a piece is found by its id and
cut in two.

SentencePiece-style tokenizers (Llama 2) put a dummy space in front of every text. It is turned off:
a conversation is encoded in segments, and a space before each would match neither pretraining nor
the decoded text. All other normalisation of the tokenizer stays.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from steerlm2.checkpoint_dirs import newest_export, read_json, read_own

TINY_TOKENIZER_DIR = Path(__file__).parent / "tiny_tokenizer"
TINY_SPECIAL_TOKENS = ("<pad>", "<|endoftext|>", *(f"<extra_id_{i}>" for i in range(8)))
TINY_VOCAB_SIZE = 512

_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", *_SIDE_FILES, *_OTHER_FORMS)
"""All that belongs to a tokenizer in a folder."""

LONG_TEXT = 4096
"""Characters from which a text is encoded without Python's global lock: it takes milliseconds, in
which the other threads of a server would stand still."""

_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<unk>")


class Tokenizer(Protocol):
    """The interface of tokenizers that templates, data sets and recipes use."""

    def __hash__(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """The highest token id plus one."""

    @property
    def bos_id(self) -> int | None:
        """The token that starts every text of the model; None if it has none."""

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def control_ids(self) -> Collection[int]:
        """The ids that `encode` never yields."""

    @property
    def most_bytes_a_token(self) -> int | None:
        """Bytes of UTF-8 that one token stands for at most; None: not known."""

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; no text gives the id of a control token."""

    def token_id(self, token: str) -> int | None:
        """The id of `token` if it is one token of the vocabulary."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, control tokens spelled out."""

    def save(self, directory: str | Path) -> None:
        """Write the files from which transformers and vLLM load the same tokenizer."""

    @property
    def digest(self) -> str:
        """Equal for tokenizers that encode and decode alike, bos apart: short, of hex digits."""


class HFTokenizer:
    """A Hugging Face tokenizer file. Build it with `hf_tokenizer` or `tiny_tokenizer`."""

    def __init__(
        self,
        tokenizer_json: str,
        side_files: dict[str, str],
        other_forms: dict[str, bytes] | None = None,
    ) -> None:
        """Load a tokenizer from texts of its files.

        Args:
            tokenizer_json: the text of tokenizer.json.
            side_files: file name -> text of the files beside it, kept for `save`.
            other_forms: file name -> content of the same tokenizer's files for other programs, kept
                for `save`.
        """
        self._side_files = side_files
        self._other_forms = other_forms or {}
        spec = json.loads(tokenizer_json)
        before = copy.deepcopy(spec)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (spec.get(part) or {}).get("type") != "ByteLevel" or part != "decoder":
                spec[part] = _without_dummy_space(spec.get(part))
        for token in filter(_is_control, spec["added_tokens"]):
            token |= {"lstrip": False, "rstrip": False}  # the text beside it stays as it is
        self._is_changed = spec != before
        self._saved_json = (
            json.dumps(spec, ensure_ascii=False) if self._is_changed else tokenizer_json
        )
        spec.update(truncation=None, padding=None)
        self._all = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.control_ids = frozenset(
            token["id"] for token in spec["added_tokens"] if _is_control(token)
        )
        self._content = tokenizers.Tokenizer.from_str(json.dumps(_content_spec(spec)))

        self.vocab_size = 1 + max(self._all.get_vocab(with_added_tokens=True).values())
        config = self._special_tokens()
        self.bos_id = self._find_bos(config)
        self.eos_id = self._id_of(config.get("eos_token"))
        fallbacks = [self._id_of(config.get("pad_token")), *map(self.token_id, _PAD_TOKENS)]
        known = [token_id for token_id in [*fallbacks, self.eos_id] if token_id is not None]
        self.pad_id: int = known[0] if known else 0

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; no text gives the id of an added token.

        Where the vocabulary holds a control token as an ordinary piece, the piece is cut in two; a
        single character whose only token is a control token is left out. Added tokens of white
        space only count as text. Halves of surrogate pairs, which aren't Unicode text, become "?".
        """
        plain = text.encode("utf-8", "replace").decode("utf-8")
        if len(text) < LONG_TEXT:
            encoding = self._content.encode(plain, add_special_tokens=False)
        else:
            (encoding,) = self._content.encode_batch([plain], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self.control_ids.isdisjoint(ids):
            return ids
        cuts = [
            start + 1
            for token_id, (start, end) in zip(ids, encoding.offsets, strict=True)
            if token_id in self.control_ids and end - start > 1
        ]
        if not cuts:
            return [token_id for token_id in ids if token_id not in self.control_ids]
        edges = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [token_id for start, end in edges for token_id in self.encode(text[start:end])]

    @functools.cached_property
    def most_bytes_a_token(self) -> int | None:
        """Bytes of UTF-8 that one token stands for at most.

        None: not known, where the tokenizer may leave out or replace what a text has.
        """
        spec = json.loads(self._content.to_str())
        shrinks = _most_shrinking(spec["normalizer"])
        vocabulary = self._content.get_vocab(with_added_tokens=True)
        if spec["model"]["type"] != "BPE" or shrinks is None:
            return None
        if "ByteLevel" in _part_types(spec["pre_tokenizer"]):  # a character stands for a byte
            complete = vocabulary.keys() >= _BYTE_CHARACTERS
            longest = max(
                len(token) if _BYTE_CHARACTERS.issuperset(token) else len(token.encode())
                for token in vocabulary
            )
        else:
            complete = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
            complete = complete and spec["model"].get("byte_fallback", False)
            longest = max(len(token.encode("utf-8", "replace")) for token in vocabulary)
        return longest * shrinks if complete else None

    def token_id(self, token: str) -> int | None:
        """The id of `token` if it is one token of the vocabulary, else None."""
        return self._all.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, control tokens spelled out; broken UTF-8 becomes U+FFFD."""
        return self._all.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, as it is understood here, and the files beside it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self._config("tokenizer_config.json")
        if self._is_changed or not config:
            # transformers' own classes would put the dummy space back.
            config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        files = self._side_files | {
            "tokenizer.json": self._saved_json,
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False),
        }
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        for name, content in self._other_forms.items():
            (directory / name).write_bytes(content)

    @functools.cached_property
    def digest(self) -> str:
        """Of tokenizer.json as it is understood: neither of its layout nor of the files beside it.

        The post-processor is left out: no text of ours is encoded with it.
        """
        spec = json.loads(self._all.to_str()) | {"post_processor": None}
        text = json.dumps(spec, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _special_tokens(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            merged |= {key: value for key, value in self._config(name).items() if value}
        return merged

    def _config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self._side_files.get(name, "{}"))
        return config

    def _id_of(self, token: str | dict[str, Any] | None) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self.token_id(content)

    def _find_bos(self, config: dict[str, Any]) -> int | None:
        """The token that the tokenizer itself puts first.

        A bos_token in its config isn't enough: GPT-NeoX has one that its models weren't trained
        with.
        """
        adds_bos = self._config("tokenizer_config.json").get("add_bos_token")
        if isinstance(adds_bos, bool):
            return self._id_of(config.get("bos_token")) if adds_bos else None
        plain, framed = (self._all.encode("a", add_special_tokens=add).ids for add in (False, True))
        return framed[0] if framed[:1] != plain[:1] else None


def added_tokens(path: str | Path) -> set[str]:
    """The added tokens of the tokenizer in a folder, without loading it; none where there is none.

    Args:
        path: as of `hf_tokenizer`.
    """
    try:
        spec = read_json(_tokenizer_json(path))
        return {token["content"] for token in spec["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # `hf_tokenizer` says what is wrong


def hf_tokenizer(path: str | Path) -> HFTokenizer:
    """The Hugging Face tokenizer in a folder (or of a tokenizer.json), usable as `_component_`.

    Args:
        path: a folder with tokenizer.json and, where present, tokenizer_config.json and
            special_tokens_map.json (they name bos, eos and pad), or that tokenizer.json itself; or
            the output_dir of a run, whose newest complete epoch_N folder is meant.

    Raises:
        FileNotFoundError: if there is no tokenizer.json.
        ValueError: if a file can't be read as what its name says.
    """
    file = _tokenizer_json(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.absolute()} does not exist; give a folder with the tokenizer.json of a"
            " Hugging Face model (`tune download` fetches it; a SentencePiece or tiktoken"
            " tokenizer.model alone isn't enough), or the output_dir of a run that has a complete"
            " epoch_N folder"
        )
    texts = {}
    for name in (file.name, *_SIDE_FILES):
        beside = file.with_name(name)
        if beside.is_file():
            if name != file.name and beside.suffix == ".json":
                read_json(beside)  # so that an error names it
            try:
                texts[name] = read_own(beside).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{beside.absolute()} is damaged ({error})") from error
    tokenizer_json = texts.pop(file.name)
    others = {
        beside.name: read_own(beside)
        for beside in map(file.with_name, _OTHER_FORMS)
        if beside.is_file()
    }
    try:
        return HFTokenizer(tokenizer_json, texts, others)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{file.absolute()} is no usable tokenizer: {error}") from error


def _tokenizer_json(path: str | Path) -> Path:
    """The file that `hf_tokenizer` reads, which may be missing."""
    path = Path(path).expanduser()
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        path = newest_export(path) or path
    return path / "tokenizer.json" if path.is_dir() else path


def spare_token_id(tokenizer: Tokenizer, used: Collection[int | None]) -> int:
    """The id of a token to pad with: no text, not one of `used`, and neither bos nor eos.

    Raises:
        ValueError: where the tokenizer has none.
    """
    names = [*_PAD_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in range(255, -1, -1))]
    taken = {*used, tokenizer.bos_id, tokenizer.eos_id}
    named = map(tokenizer.token_id, names)
    for token_id in [tokenizer.pad_id, *named, *sorted(tokenizer.control_ids, reverse=True)]:
        if token_id is None or token_id in taken:
            continue
        if token_id not in tokenizer.encode(tokenizer.decode([token_id])):
            return token_id
    raise ValueError(
        "the tokenizer has no token left to pad with: give it a pad_token in tokenizer_config.json"
    )


def tiny_tokenizer() -> HFTokenizer:
    """The tokenizer of the tiny models: byte-level BPE, 512 tokens, lossless on any text.

    <pad> is 0, <|endoftext|> ends a text, <extra_id_0> to <extra_id_7> are control tokens.
    `steerlm2.data.synthetic.build_tiny_tokenizer` made it.
    """
    return hf_tokenizer(TINY_TOKENIZER_DIR)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer; the same texts give the same one. Special tokens come first."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _is_control(added_token: dict[str, Any]) -> bool:
    """Whether an added token is no text.

    Some tokenizers (GPT-NeoX, Gemma) add runs of spaces, as SentencePiece spells them, too.
    """
    return added_token["special"] or bool(added_token["content"].replace("\u2581", " ").strip())


def _content_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of plain text: the same one without control tokens."""
    model = dict(spec["model"])
    if "dropout" in model:
        model["dropout"] = None
    text_tokens = [token for token in spec["added_tokens"] if not _is_control(token)]
    if isinstance(model.get("vocab"), dict):
        # Added tokens that the model's vocabulary lacks are numbered after its last token; without
        # the control tokens they would get other ids.
        model["vocab"] = model["vocab"] | {token["content"]: token["id"] for token in text_tokens}
    else:
        text_tokens = []
    return spec | {"added_tokens": text_tokens, "model": model, "post_processor": None}


_BYTE_CHARACTERS = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def _part_types(part: dict[str, Any] | None) -> list[str]:
    """The types of a pre-tokenizer and of those in it."""
    if part is None:
        return []
    inner = part.get("pretokenizers", [])
    return [part["type"], *itertools.chain.from_iterable(map(_part_types, inner))]


def _most_shrinking(normalizer: dict[str, Any] | None) -> int | None:
    """How many times fewer bytes a text may have after a normalizer; None: not known.

    NFC makes at most 9 bytes (three letters of Hangul) into 3.
    """
    match normalizer:
        case None | {"type": "Prepend"}:
            return 1
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return 1 if len(old.encode()) <= len(new.encode()) else None
        case {"type": "NFC"}:
            return 3
        case {"type": "Sequence", "normalizers": parts}:
            factors = [_most_shrinking(inner) for inner in parts]
            known = [factor for factor in factors if factor is not None]
            return math.prod(known) if len(known) == len(factors) else None
    return None


def _without_dummy_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer or decoder that neither adds a leading space nor strips one."""
    if part is None:
        return None
    match part["type"]:
        case "Prepend":
            return None
        case "Strip" if part.get("content") == " ":
            return None
        case "Metaspace":
            old = {"add_prefix_space": False} if "add_prefix_space" in part else {}
            return part | {"prepend_scheme": "never"} | old
        case "ByteLevel":
            return part | {"add_prefix_space": False}
        case "Sequence":
            key = next(key for key in part if key != "type")
            parts = [_without_dummy_space(inner) for inner in part[key]]
            return part | {key: [inner for inner in parts if inner is not None]}
    return part
