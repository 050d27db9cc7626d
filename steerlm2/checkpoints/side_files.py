"""The files beside an export's weights: the tokenizer's, and what says where a text ends.

They are of the tokenizer and the template that the model was trained with, whatever the checkpoint
has that the run started from. Nothing else of that folder comes along: no code, no links, no other
weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerlm2.checkpoint_dirs import read_json
from steerlm2.data.records import ASSISTANT, Turn
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import TOKENIZER_FILES, Tokenizer, hf_tokenizer

GENERATION_CONFIG = "generation_config.json"
SIDE_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)


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


def remove_side_files(folder: Path) -> None:
    """Remove what an earlier export left: links too, which would be written through."""
    for name in SIDE_FILES:
        (folder / name).unlink(missing_ok=True)


def write_tokenizer(folder: Path, text: TrainedText, pad_id: int) -> None:
    """Write the tokenizer's files; the stop token is their end of text.

    A chat template stays if it writes conversations as the run's template does.
    """
    remove_side_files(folder)
    text.tokenizer.save(folder)
    special = {"pad_token": text.spelled(pad_id)}
    if text.stop_id is not None:
        special["eos_token"] = text.spelled(text.stop_id)
    config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(config_file) if config_file.exists() else {}
    if config.pop("auto_map", None):  # the code of a tokenizer, which doesn't come along
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    in_config = config.pop("chat_template", None)
    in_file = template_file.read_text(encoding="utf-8") if template_file.exists() else None
    kept = [chat for chat in (in_file, in_config) if chat and _writes_as(chat, config, text)]
    if (in_file or in_config) and not kept:
        print("the checkpoint's chat template is of another template: it isn't in the export")
    if in_config in kept:
        config["chat_template"] = in_config
    if in_file not in kept:
        template_file.unlink(missing_ok=True)
    _write_json(config_file, config | special)
    if (map_file := folder / "special_tokens_map.json").exists():  # transformers prefers it
        update_json(map_file, special)


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
    token_of_start: Callable[[int], str | None],
) -> dict[str, Any]:
    """A generation_config.json: the first end of a text is the stop token.

    Args:
        known: that of the checkpoint that the run started from.
        ends: of its config.json, where `known` has none: an id, several, or None.
        token_of_start: what its tokenizer calls an id. Its other ends stay ends where the run's
            tokenizer calls them the same.
    """
    ends = known.get("eos_token_id", ends)
    others = [*(ends if isinstance(ends, list) else [ends]), text.tokenizer.eos_id]
    kept = [
        i
        for i in dict.fromkeys(others)
        if i not in (text.stop_id, None)
        and (i == text.tokenizer.eos_id or token_of_start(i) == text.tokenizer.decode([i]) != "")
    ]
    ids = token_ids(text, pad_id) | {"eos_token_id": [text.stop_id, *kept]}
    # With `_from_model_config` transformers takes the ends from config.json again.
    rest = {k: v for k, v in known.items() if k not in ids and k != "_from_model_config"}
    return rest | ids


def token_names(folder: Path) -> Callable[[int], str | None]:
    """What the tokenizer of a folder calls an id; None where it has no usable tokenizer.json."""
    try:
        tokenizer = hf_tokenizer(folder)
    except (ValueError, OSError):
        return lambda token_id: None
    return lambda token_id: tokenizer.decode([token_id])


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    _write_json(folder / GENERATION_CONFIG, config)


def update_json(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of the JSON object in a file; other keys stay."""
    _write_json(file, (read_json(file) if file.exists() else {}) | dict(values))


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _writes_as(chat_template: Any, config: Mapping[str, Any], text: TrainedText) -> bool:
    """Whether a chat template, as transformers renders it, writes what the run's template does."""
    turns = [Turn("User", "1"), Turn(ASSISTANT, "2"), Turn("User", "3")]
    ours = "".join(segment.text for segment in text.template.prompt("4", turns, None))
    messages = [{"role": turn.role.lower(), "content": turn.value} for turn in turns]
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        theirs = jinja.from_string(chat_template).render(
            messages=[{"role": "system", "content": "4"}, *messages],
            add_generation_prompt=True,
            **special,
        )
    except (TemplateError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return theirs == ours
