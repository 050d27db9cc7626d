"""Messages and texts, in whatever way people write them -> turns of a conversation."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from steerlm2.data.conversations import is_text
from steerlm2.data.records import ASSISTANT, USER, Turn, is_blank

Json = dict[str, Any]

_SYSTEM, _TOOL = "system", "tool"
_ROLES = {
    **dict.fromkeys(("system", "developer"), _SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "chatbot", "ai"),
        ASSISTANT,
    ),
    **dict.fromkeys(
        (
            *("tool", "tool_call", "tool_calls", "tool_response", "tool_result", "ipython"),
            *("function", "function_call", "function_response", "observation"),
        ),
        _TOOL,
    ),
}

_TEXT_PARTS = ("text", "input_text", "output_text")
_MESSAGE_KEYS = {
    *("role", "from", "content", "value", "label", "weight", "tool_calls", "function_call")
}
"""What is read of a message, or refused; what else an assistant's has may be its values."""

TOOLS = "with tool calls or tool turns"
NO_TEXT = "with content that isn't text"
EMPTY_ANSWER = "with an empty answer"
EMPTY_PROMPT = "without a prompt"
LATE_SYSTEM = "with a system message after the first turn, or several"
NOT_TRAINED = "with an answer of weight 0"
NO_ANSWER = "without an answer"
APART = "whose two conversations differ before their last answers"
"""Why rows are left out, in words that follow a number."""


class LeftOut(Exception):
    """A row that is valid, and that no conversation can hold; its text is the cause."""


def structure(value: Any) -> Any:
    """The list or object that a cell of a table spells as JSON, or as Python does; else `value`."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def is_list_of(value: Any, *keys: str) -> bool:
    """Whether it is a list of objects that have these keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and all(key in each for key in keys) for each in value)
    )


def turn_list(value: Any) -> list[Json] | None:
    """The messages that a value is, or spells."""
    value = structure(value)
    if is_list_of(value, "role") or is_list_of(value, "from", "value"):
        return value
    return None


def is_content(value: Any) -> bool:
    """Whether it is text or messages."""
    return isinstance(value, str) or turn_list(value) is not None


def turns_of(content: Any, role: str, where: str) -> tuple[str | None, list[Turn]]:
    """(system text, turns) of messages, or of one text."""
    if (messages := turn_list(content)) is not None:
        return turns_of_messages(messages, where)
    if role == USER and (turns := spelled_prompt(content)):
        return None, turns
    text = text_of(content, repr(where))
    if is_blank(text):
        raise LeftOut(EMPTY_ANSWER if role == ASSISTANT else EMPTY_PROMPT)
    return None, [Turn(role, text)]


def turns_of_messages(messages: Any, where: str) -> tuple[str | None, list[Turn]]:
    """(system text, turns) of messages; `extra` of an assistant's turn has its other keys."""
    messages = structure(messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where!r} must be a list of messages, got {short(messages)}")
    system: str | None = None
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{place} must be an object, got {short(message)}")
        # Parquet has null for every key that only other rows have.
        message = {key: value for key, value in message.items() if value is not None}
        role = _role_of(message, place)
        usual = "value" if "from" in message else "content"
        key = next((key for key in ("content", "value") if key in message), usual)
        content = message.get(key)
        if role == ASSISTANT and content is None:
            raise LeftOut(EMPTY_ANSWER)
        text = text_of(content, f"{place}: {key!r}")
        if role == _SYSTEM:
            if turns or system is not None:
                raise LeftOut(LATE_SYSTEM)
            system = text
            continue
        if role == ASSISTANT and is_blank(text):
            raise LeftOut(EMPTY_ANSWER)
        if role == ASSISTANT and message.get("weight") in (0, "0"):
            raise LeftOut(NOT_TRAINED)
        extra = {k: v for k, v in message.items() if k not in _MESSAGE_KEYS}
        if isinstance(label := message.get("label"), dict):
            extra["label"], label = label, None
        if role == ASSISTANT and label is not None and not isinstance(label, str):
            raise ValueError(f"{place}: 'label' must be text such as 'quality:4', got {label!r}")
        if role == ASSISTANT:
            turns.append(Turn(role, text, label or None, extra))
        else:
            turns.append(Turn(role, text))
    return system, turns


def _role_of(message: Json, where: str) -> str:
    name = message.get("role", message.get("from"))
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r}; known: {', '.join(_ROLES)}")
    if role == _TOOL or message.get("tool_calls") or message.get("function_call"):
        raise LeftOut(TOOLS)
    return role


def text_of(content: Any, where: str) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        texts: list[Any] = []
        for part in content:
            if isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS:
                raise LeftOut(NO_TEXT)
            texts.append(part.get("text") if isinstance(part, dict) else part)
        content = "".join(texts) if all(map(is_text, texts)) else None
    if not is_text(content):
        raise ValueError(f"{where} must be text, got {short(content)}")
    return str(content)


_SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def spelled_turns(text: str) -> list[Turn]:
    """The turns of a text like "\\n\\nHuman: ... \\n\\nAssistant: ..."; none of another text."""
    first, *pieces = _SPOKEN.split(text)
    if first.strip() or not pieces:
        return []
    roles, texts = pieces[::2], pieces[1::2]
    return [Turn(_ROLES[role.lower()], own) for role, own in zip(roles, texts, strict=True)]


def spelled_prompt(content: Any) -> list[Turn]:
    """The turns of a prompt that ends with "\\n\\nAssistant:"; none of another one."""
    turns = spelled_turns(content) if isinstance(content, str) else []
    if len(turns) < 2 or turns[0].role != USER:
        return []
    *before, last = turns
    return before if last.role == ASSISTANT and is_blank(last.value) else []


def drop_space(prompt: Any, answer: Turn) -> None:
    """Answers to prompts that end with "Assistant:" begin with the space after it."""
    if spelled_prompt(prompt):
        answer.value = answer.value.removeprefix(" ")


def short(value: Any, limit: int = 60) -> str:
    """A value on one line, its long texts cut."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    if isinstance(value, list) and value:
        more = f", ... {len(value) - 1} more" if len(value) > 1 else ""
        return f"[{short(value[0], limit)}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {short(v, limit)}" for k, v in value.items()) + "}"
    return repr(value)
