"""The files beside an export's weights: the tokenizer's, and what says where a text ends.

They are of the tokenizer and the template that the model was trained with, whatever the checkpoint
has that the run started from. Nothing else of that folder comes along: no code, no links, no other
weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm2.checkpoint_dirs import read_json
from steerlm2.data.chat_templates import chat_template
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import TOKENIZER_FILES, Tokenizer, hf_tokenizer
from steerlm2.facts import ModelFacts
from steerlm2.files import SUMS_FILE, sha256, sync, write_sums

GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"
CHAT_TEMPLATE = "chat_template.jinja"
SIDE_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)

_PATH = re.compile(r"[/~]|[A-Za-z]:[/\\]|\\\\|file:")
_PATH_KEYS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}

_CODE_KEYS = {"auto_map", "custom_generate", "custom_pipelines"}

_OF_A_TOKENIZER = re.compile(
    r".*(_token|_token_ids?|_token_index|_words_ids|suppress_tokens)"
    r"|constraints|forced_decoder_ids|lang_to_id|sequence_bias|stop_strings|task_specific_params"
    r"|task_to_id|tokenizer_class"
)
"""Keys of config.json and generation_config.json that mean something with one tokenizer only."""

_BESIDE_THE_STOP_TOKEN = re.compile(r"forced_eos_token_id|stop_.*")
"""Keys that end a response elsewhere than at the stop token."""

_OF_SINGLE_TOKENS = re.compile(r".*suppress_tokens|bad_words_ids|forced_.*_ids?|sequence_bias")
"""Keys that make tokens impossible, certain, or more or less likely."""


@dataclass(frozen=True)
class TrainedText:
    """How the texts are written that a model was trained on."""

    tokenizer: Tokenizer
    template: Template
    stop_id: int | None = None
    """Of a language model: the token that it was trained to end a response with."""

    def spelled(self, token_id: int) -> str:
        """A token as the files name it; a byte token isn't the byte that it stands for."""
        for token in self.template.control_tokens:
            if self.tokenizer.token_id(token) == token_id:
                return token
        return self.tokenizer.decode([token_id])


def check_side_files(folder: Path) -> None:
    """Check that a checkpoint's small files can be read, before anything is trained.

    Raises:
        ValueError: naming the file that can't.
    """
    for name in ("config.json", GENERATION_CONFIG):
        if (folder / name).is_file():
            read_json(folder / name)


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without the names of its code, which doesn't come along."""
    return {key: value for key, value in config.items() if key not in _CODE_KEYS}


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's config without the folders that its makers' tools have noted in it."""
    return {
        key: value
        for key, value in config.items()
        if key not in _PATH_KEYS
        and (key.endswith("_token") or not (isinstance(value, str) and _PATH.match(value)))
    }


def remove_side_files(folder: Path) -> None:
    """Remove what an earlier export left: links too, which would be written through."""
    for name in (*SIDE_FILES, SUMS_FILE):
        (folder / name).unlink(missing_ok=True)


def write_tokenizer(
    folder: Path, text: TrainedText, pad_id: int, facts: ModelFacts | None = None
) -> None:
    """Write the tokenizer's files; the stop token is their end of text.

    The chat template is the run's template; one that the tokenizer came with doesn't stay.

    Args:
        facts: of the model; None: without a chat template.
    """
    remove_side_files(folder)
    text.tokenizer.save(folder)
    special = {"pad_token": text.spelled(pad_id)}
    if text.stop_id is not None:
        special["eos_token"] = text.spelled(text.stop_id)
    config_file, template_file = folder / "tokenizer_config.json", folder / CHAT_TEMPLATE
    config = without_paths(read_json(config_file)) if config_file.exists() else {}
    if config.pop("auto_map", None):  # the code of a tokenizer, which doesn't come along
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("chat_template", None)
    template_file.unlink(missing_ok=True)
    if facts is not None:
        chat = chat_template(text.template, text.tokenizer, facts)
        if chat is None:
            print("the export has no chat template: none is known for the run's `template`")
        else:
            template_file.write_text(chat, encoding="utf-8")
    _add_control_tokens(folder / "tokenizer.json", text)
    write_json(config_file, config | special)
    if (map_file := folder / "special_tokens_map.json").exists():  # transformers prefers it
        update_json(map_file, special)


def seal(folder: Path, sums: Mapping[str, str] | None = None) -> None:
    """Wait until the files of an export are on the disk, and write their digests.

    README.md isn't among them: an evaluation and people write into it.

    Args:
        sums: digests that are known, by name, of files that are on the disk.
    """
    known = dict(sums or {})
    for file in folder.iterdir():
        if file.is_file() and file.name not in (*known, SUMS_FILE, MODEL_CARD):
            sync(file)
            known[file.name] = sha256(file)
    write_sums(folder, known)


def _add_control_tokens(tokenizer_json: Path, text: TrainedText) -> None:
    """Make sure that a Hugging Face tokenizer finds the template's control tokens in a text.

    Llama 2's are byte tokens, which are ordinary pieces of its vocabulary.
    """
    if not tokenizer_json.is_file():
        return  # a tokenizer of another kind
    spec = read_json(tokenizer_json)
    found = {token["content"] for token in spec["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    missing = [
        {"id": text.tokenizer.token_id(token), "content": token, **flags, "special": True}
        for token in text.template.control_tokens
        if token not in found
    ]
    if missing:
        added = sorted([*spec["added_tokens"], *missing], key=lambda token: token["id"])
        write_json(tokenizer_json, spec | {"added_tokens": added})


def without_other_tokens(
    config: Mapping[str, Any], text: TrainedText, base: Tokenizer | None
) -> dict[str, Any]:
    """A checkpoint's config without what doesn't hold for the run's tokenizer and stop token.

    Of another tokenizer no key stays that names tokens. Of the same one those go that contradict
    the stop token, and those with ids that it doesn't have.

    Args:
        base: the checkpoint's tokenizer; None: unknown.
    """
    is_same = _is_same_tokenizer(text, base)

    def holds(key: str, value: Any) -> bool:
        if not _OF_A_TOKENIZER.fullmatch(key):
            return True
        ids = set(_whole_numbers(value))
        return (
            is_same
            and all(i < text.tokenizer.vocab_size for i in ids)
            and not (
                text.stop_id is not None
                and (
                    _BESIDE_THE_STOP_TOKEN.fullmatch(key)
                    or (text.stop_id in ids and _OF_SINGLE_TOKENS.fullmatch(key))
                )
            )
        )

    return {key: value for key, value in config.items() if holds(key, value)}


def _whole_numbers(value: Any) -> Iterator[int]:
    """All in a JSON value of lists."""
    if isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def config_of_run(
    config: Mapping[str, Any], text: TrainedText, pad_id: int, base: Tokenizer | None
) -> dict[str, Any]:
    """A config.json with the special tokens of the run.

    Args:
        config: that of the checkpoint that the run started from.
        base: its tokenizer; None: unknown.
    """
    kept = without_other_tokens(without_code(without_paths(config)), text, base)
    if "bos_token_id" in config or not _is_same_tokenizer(text, base):
        kept.setdefault("bos_token_id", None)  # without the key transformers' Llama says 1
    return kept | token_ids(text, pad_id)


def _is_same_tokenizer(text: TrainedText, base: Tokenizer | None) -> bool:
    return base is not None and base.digest == text.tokenizer.digest


def token_ids(text: TrainedText, pad_id: int) -> dict[str, int]:
    """The special tokens of a config.json."""
    ends = text.stop_id if text.stop_id is not None else text.tokenizer.eos_id
    ids = {"bos_token_id": text.tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": pad_id}
    return {key: token_id for key, token_id in ids.items() if token_id is not None}


def generation_config(
    known: Mapping[str, Any],
    ends: Any,
    text: TrainedText,
    pad_id: int,
    base: Tokenizer | None,
) -> dict[str, Any]:
    """A generation_config.json: the first end of a text is the stop token.

    Args:
        known: that of the checkpoint that the run started from.
        ends: of its config.json, where `known` has none: an id, several, or None.
        base: its tokenizer; None: unknown. Its other ends stay ends where the run's tokenizer calls
            them the same.
    """
    ends = known.get("eos_token_id", ends)
    others = [*(ends if isinstance(ends, list) else [ends]), text.tokenizer.eos_id]
    kept = [
        i
        for i in dict.fromkeys(others)
        if i not in (text.stop_id, None)
        and (i == text.tokenizer.eos_id or _is_same_token(i, text.tokenizer, base))
    ]
    ids = token_ids(text, pad_id) | {"eos_token_id": [text.stop_id, *kept]}
    # With `_from_model_config` transformers takes the ends from config.json again.
    rest = {k: v for k, v in known.items() if k != "_from_model_config"}
    return without_other_tokens(without_code(without_paths(rest)), text, base) | ids


def _is_same_token(token_id: int, tokenizer: Tokenizer, base: Tokenizer | None) -> bool:
    return base is not None and base.decode([token_id]) == tokenizer.decode([token_id]) != ""


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has no usable tokenizer.json."""
    try:
        return hf_tokenizer(folder)
    except (ValueError, OSError):
        return None


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_json(folder / GENERATION_CONFIG, config)


def update_json(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of the JSON object in a file; other keys stay."""
    write_json(file, (read_json(file) if file.exists() else {}) | dict(values))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json_text(values), encoding="utf-8")


def json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
