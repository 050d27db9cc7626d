"""The layouts that chat data comes in: which one a file has, and what its rows say.

A layout names its parts ("prompt", "response", ...). The column that has a part is found by the
usual names, or given. Every layout reads a row as a `Sample`: turns, and the answers to them.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerlm2.data.conversations import has_empty_answer, is_text, parse_conversation
from steerlm2.data.records import ASSISTANT, USER, Record, Turn, is_blank, parse_record

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

TOOLS = "with tool calls or tool turns"
NO_TEXT = "with content that isn't text"
EMPTY_ANSWER = "with an empty answer"
EMPTY_PROMPT = "without a prompt"
LATE_SYSTEM = "with a system message after the first turn, or several"
NOT_TRAINED = "with an answer of weight 0"
NO_ANSWER = "without an answer"
APART = "whose two conversations differ before their last answers"
"""Why rows are left out, in words that follow a number."""


_LONGEST_ROW = 400
"""Characters of a row in a message."""


class LeftOut(Exception):
    """A row that is valid, and that no conversation can hold; its text is the cause."""


@dataclass
class Answer:
    """An answer, and everything that the row has besides it, in which its scores may be."""

    value: str
    fields: Json = field(default_factory=dict)
    label: str | None = None
    """A label that stands with the message."""


@dataclass
class Sample:
    """What a row says: one answer, several, or the chosen one and the rejected one."""

    system: str | None
    turns: list[Turn]
    """Before the answers; the whole conversation if there are none."""
    answers: list[Answer]
    fields: Json = field(default_factory=dict)
    """What the row has besides turns that no answer follows, or whose last is the answer."""
    extra: Json = field(default_factory=dict)
    """Kept with a conversation."""
    record: Record | None = None
    """The row itself, if it is a SteerLM2 record."""


@dataclass(frozen=True)
class Layout:
    """One way in which people write chat data."""

    name: str
    parts: Mapping[str, tuple[str, ...]]
    """Part -> usual names of its column, in lower case."""
    required: tuple[str, ...]
    fits: Callable[[Json], bool]
    """Whether the values of a row's parts are of the kinds that this layout has."""
    read: Callable[[Json, Json], Sample]
    """The sample of a row, from its parts and the other columns.

    Raises LeftOut for what no conversation can hold, and ValueError for mistakes."""
    looks: str
    """For messages."""


# The kinds of values


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


def _is_list_of(value: Any, *keys: str) -> bool:
    """Whether it is a list of objects that have these keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and all(key in each for key in keys) for each in value)
    )


def _turn_list(value: Any) -> list[Json] | None:
    """The messages that a value is, or spells."""
    value = structure(value)
    if _is_list_of(value, "role") or _is_list_of(value, "from", "value"):
        return value
    return None


def is_content(value: Any) -> bool:
    return isinstance(value, str) or _turn_list(value) is not None


# Messages


_MESSAGE_KEYS = {
    *("role", "from", "content", "value", "label", "weight", "tool_calls", "function_call")
}
"""What is read of a message, or refused; what else an assistant's has may be its values."""


def _text_of(content: Any, where: str) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        texts: list[Any] = []
        for part in content:
            if isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS:
                raise LeftOut(NO_TEXT)
            texts.append(part.get("text") if isinstance(part, dict) else part)
        content = "".join(texts) if all(map(is_text, texts)) else None
    if not is_text(content):
        raise ValueError(f"{where} must be text, got {_short(content)}")
    return str(content)


def _role_of(message: Json, where: str) -> str:
    name = message.get("role", message.get("from"))
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r}; known: {', '.join(_ROLES)}")
    if role == _TOOL or message.get("tool_calls") or message.get("function_call"):
        raise LeftOut(TOOLS)
    return role


def _conversation(messages: Any, where: str) -> tuple[str | None, list[Turn]]:
    """(system text, turns) of messages; `extra` of an assistant's turn has its other keys."""
    messages = structure(messages)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where!r} must be a list of messages, got {_short(messages)}")
    system: str | None = None
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"{place} must be an object, got {_short(message)}")
        # Parquet has null for every key that only other rows have.
        message = {key: value for key, value in message.items() if value is not None}
        role = _role_of(message, place)
        usual = "value" if "from" in message else "content"
        key = next((key for key in ("content", "value") if key in message), usual)
        content = message.get(key)
        if role == ASSISTANT and content is None:
            raise LeftOut(EMPTY_ANSWER)
        text = _text_of(content, f"{place}: {key!r}")
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


def _either(content: Any, role: str, where: str) -> tuple[str | None, list[Turn]]:
    """(system text, turns) of messages, or of one text."""
    if (messages := _turn_list(content)) is not None:
        return _conversation(messages, where)
    if role == USER and (turns := _spelled_prompt(content)):
        return None, turns
    text = _text_of(content, repr(where))
    if is_blank(text):
        raise LeftOut(EMPTY_ANSWER if role == ASSISTANT else EMPTY_PROMPT)
    return None, [Turn(role, text)]


def _system_of(parts: Json, own: str | None = None) -> str | None:
    """The system text of a message, else of the column, in which "" is none."""
    if own is not None:
        return own
    system = parts.get("system")
    if system is None or system == "":
        return None
    return _text_of(system, "'system'")


def _answered(system: str | None, turns: list[Turn], fields: Json) -> Sample:
    """A sample of a conversation; what it ends with is the answer if it is the assistant's."""
    if not turns:
        raise LeftOut(EMPTY_PROMPT)
    if turns[-1].role != ASSISTANT:
        return Sample(system, turns, [], fields)
    last = turns[-1]
    return Sample(system, turns[:-1], [Answer(last.value, fields | last.extra, last.label)])


def _read_messages(parts: Json, others: Json) -> Sample:
    system, turns = _conversation(parts["messages"], "messages")
    return _answered(_system_of(parts, system), turns, others)


# Prompt and response


def _read_prompt_response(parts: Json, others: Json) -> Sample:
    system, before = _either(parts["prompt"], USER, "prompt")
    own, answer = _either(parts["response"], ASSISTANT, "response")
    if own is not None:
        raise LeftOut(LATE_SYSTEM)
    _drop_space(parts["prompt"], answer[-1])
    return _answered(_system_of(parts, system), before + answer, others)


def _read_prompt(parts: Json, others: Json) -> Sample:
    system, turns = _either(parts["prompt"], USER, "prompt")
    return Sample(_system_of(parts, system), turns, [], others)


def _read_alpaca(parts: Json, others: Json) -> Sample:
    _, asked = _either(parts["instruction"], USER, "instruction")
    _, answer = _either(parts["output"], ASSISTANT, "output")
    extra = parts.get("input")
    if extra is not None and _text_of(extra, "'input'").strip():
        asked[0].value += f"\n\n{extra}"
    turns: list[Turn] = []
    for i, pair in enumerate(structure(parts.get("history")) or []):
        where = f"history[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{where} must be a question and its answer, got {_short(pair)}")
        turns += _either(pair[0], USER, where)[1] + _either(pair[1], ASSISTANT, where)[1]
    return _answered(_system_of(parts), [*turns, *asked, *answer], others)


# Preferences


def _read_preference(parts: Json, others: Json) -> Sample:
    sides = [_side(parts[name], name, parts.get("prompt")) for name in ("chosen", "rejected")]
    (system, before, chosen), (other_system, other_before, rejected) = sides
    if (system, _spoken(before)) != (other_system, _spoken(other_before)):
        raise LeftOut(APART)
    asked_system, asked = None, before
    if parts.get("prompt") is not None:
        asked_system, prompt = _either(parts["prompt"], USER, "prompt")
        # Most repeat the prompt in both conversations.
        said, asking = _spoken(before), _spoken(prompt)
        repeated = said[: len(asking)] == asking or (len(asking) == 1 and asking[0] in said)
        asked = before if repeated else prompt + before
    if not asked:
        raise ValueError("has no prompt: neither a column nor turns that both conversations share")
    answers = [
        Answer(turn.value, fields_of_side(others, name) | turn.extra, turn.label)
        for name, turn in (("chosen", chosen), ("rejected", rejected))
    ]
    return Sample(_system_of(parts, system if system is not None else asked_system), asked, answers)


def _spoken(turns: Iterable[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.value) for turn in turns]


def _side(content: Any, name: str, prompt: Any) -> tuple[str | None, list[Turn], Turn]:
    """(system text, turns before the answer, answer)."""
    is_text = _turn_list(content) is None and isinstance(content, str)
    spelled = _spelled_turns(content) if is_text else []
    if is_text and prompt is None and not spelled:
        raise ValueError(
            f"{name!r} is one text and there is no prompt column: name it with builder.columns="
            "{prompt: NAME}"
        )
    if spelled and (prompt is None or (len(spelled) > 1 and spelled[0].role == USER)):
        system, turns = None, spelled
    else:
        system, turns = _either(content, ASSISTANT, name)
        _drop_space(prompt, turns[-1])
    if turns[-1:] and turns[-1].role == ASSISTANT and not is_blank(turns[-1].value):
        return system, turns[:-1], turns[-1]
    raise LeftOut(EMPTY_ANSWER if turns[-1:] and turns[-1].role == ASSISTANT else NO_ANSWER)


def _has_prompt(content: Any) -> bool:
    return _turn_list(content) is not None or bool(_spelled_turns(content))


_SPOKEN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _spelled_turns(text: str) -> list[Turn]:
    """The turns of a text like "\\n\\nHuman: ... \\n\\nAssistant: ..."; none of another text."""
    first, *pieces = _SPOKEN.split(text)
    if first.strip() or not pieces:
        return []
    roles, texts = pieces[::2], pieces[1::2]
    return [Turn(_ROLES[role.lower()], own) for role, own in zip(roles, texts, strict=True)]


def _spelled_prompt(content: Any) -> list[Turn]:
    """The turns of a prompt that ends with "\\n\\nAssistant:"; none of another one."""
    turns = _spelled_turns(content) if isinstance(content, str) else []
    if len(turns) < 2 or turns[0].role != USER:
        return []
    *before, last = turns
    return before if last.role == ASSISTANT and is_blank(last.value) else []


def _drop_space(prompt: Any, answer: Turn) -> None:
    """Answers to prompts that end with "Assistant:" begin with the space after it."""
    if _spelled_prompt(prompt):
        answer.value = answer.value.removeprefix(" ")


def fields_of_side(others: Json, name: str) -> Json:
    """`score_chosen`, `chosen_score`, `chosen-score` -> `score`."""
    found = {}
    for key, value in others.items():
        words = re.split(r"[\W_]+", key)
        if name in words and len(words) > 1:
            found["_".join(word for word in words if word != name)] = value
    return found


# Several responses

_TEXT_KEYS = ("response", "value", "text", "content", "completion", "answer", "output")
NESTED = ("scores", "label", "labels", "attributes", "annotations", "ratings")
_RATING_KEYS = ("Rating", "rating", "score", "value")


def _is_responses(value: Any) -> bool:
    value = structure(value)
    if not isinstance(value, list) or not value or _turn_list(value) is not None:
        return False
    return all(
        each is None
        or isinstance(each, str)
        or (isinstance(each, dict) and _text_key(each) is not None)
        for each in value
    )


def _text_key(item: Json) -> str | None:
    """The key of a response's text, which may be null."""
    given = (key for key in _TEXT_KEYS if isinstance(item.get(key), str))
    return next(given, next((key for key in _TEXT_KEYS if key in item and item[key] is None), None))


def _read_responses(parts: Json, others: Json) -> Sample:
    system, turns = _either(parts["prompt"], USER, "prompt")
    items = structure(parts["responses"])
    if not isinstance(items, list):
        raise ValueError(f"'responses' must be a list, got {_short(items)}")
    if not items:
        raise LeftOut(NO_ANSWER)
    lists = {k: value for k, raw in others.items() if isinstance(value := structure(raw), list)}
    answers = []
    for i, item in enumerate(items):
        key = _text_key(item) if isinstance(item, dict) else None
        text = item[key] if isinstance(item, dict) and key else item
        text = "" if text is None else text
        own = {k: v for k, v in item.items() if k != key} if isinstance(item, dict) else {}
        fields = {
            name: values[i] if len(values) == len(items) else NotParallel(len(values), len(items))
            for name, values in lists.items()
        }
        answers.append(Answer(_text_of(text, f"responses[{i}]"), fields | own))
    return Sample(_system_of(parts, system), turns, answers)


@dataclass(frozen=True)
class NotParallel:
    """What a list beside the responses gives a response where their lengths differ: no value, and
    an error for those who take the list for an attribute."""

    num_values: int
    num_responses: int

    def __str__(self) -> str:
        return f"has {self.num_values} values for {self.num_responses} responses"


def flat_fields(fields: Json) -> Json:
    """The fields, and those in objects such as `scores` and `labels`."""
    nested = [fields[key] for key in NESTED if key in fields]
    found = {key: value for key, value in fields.items() if key not in NESTED}
    for value in map(structure, nested):
        if isinstance(value, dict):
            found |= value
    for key in NESTED:
        if key in fields and not isinstance(structure(fields[key]), dict):
            found[key] = fields[key]
    return found


def rating(value: Any) -> Any:
    """The number in an annotation such as {"Rating": "4", "Rationale": ...}; else the value."""
    if isinstance(value, dict):
        return next((value[key] for key in _RATING_KEYS if key in value), value)
    return value


# Our own


def _is_own(value: Any) -> bool:
    return _is_list_of(value, "from", "value") and all(
        turn["from"] in (USER, ASSISTANT) for turn in value
    )


def _read_own(parts: Json, others: Json) -> Sample:
    own = others | {"conversations": structure(parts["conversations"])}
    conversation = parse_conversation(own, default_system="", allow_empty=True)
    if has_empty_answer(conversation):
        raise LeftOut(EMPTY_ANSWER)
    extra = conversation.extra
    return Sample(own.get("system"), conversation.turns, [], fields=extra, extra=extra)


def _read_record(parts: Json, others: Json) -> Sample:
    own = {part: structure(value) for part, value in parts.items()}
    record = parse_record(others | own, require=(), min_responses=0)
    answers = [Answer(response.value, dict(response.scores or {})) for response in record.responses]
    return Sample(record.system, record.prompt_turns, answers, record=record)


# All of them

_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_MESSAGES_NAMES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
_PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "user")
_RESPONSE_NAMES = (*("response", "completion", "answer", "output", "reply", "assistant", "target"),)

LAYOUTS = (
    Layout(
        "preference",
        {
            "prompt": _PROMPT_NAMES,
            "chosen": ("chosen", "chosen_response", "chosen_answer"),
            "rejected": ("rejected", "rejected_response", "rejected_answer"),
            "system": _SYSTEM_NAMES,
        },
        ("chosen", "rejected"),
        lambda parts: all(
            is_content(parts[name])
            and (parts.get("prompt") is not None or _has_prompt(parts[name]))
            for name in ("chosen", "rejected")
        ),
        _read_preference,
        "columns prompt, chosen, rejected (texts, or lists of messages)",
    ),
    Layout(
        "steerlm2",
        {"prompt_turns": ("prompt_turns",), "responses": ("responses",)},
        ("prompt_turns", "responses"),
        lambda parts: all(isinstance(structure(value), list) for value in parts.values()),
        _read_record,
        "our records with prompt_turns and responses",
    ),
    Layout(
        "conversations",
        {"conversations": ("conversations",)},
        ("conversations",),
        lambda parts: _is_own(structure(parts["conversations"])),
        _read_own,
        'our conversations, [{"from": "User", "value": "..."}, {"from": "Assistant", ...}]',
    ),
    Layout(
        "messages",
        {"messages": _MESSAGES_NAMES, "system": _SYSTEM_NAMES},
        ("messages",),
        lambda parts: _is_list_of(structure(parts["messages"]), "role"),
        _read_messages,
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}',
    ),
    Layout(
        "sharegpt",
        {"messages": _MESSAGES_NAMES, "system": _SYSTEM_NAMES},
        ("messages",),
        lambda parts: _is_list_of(structure(parts["messages"]), "from", "value"),
        _read_messages,
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}',
    ),
    Layout(
        "responses",
        {
            "prompt": _PROMPT_NAMES,
            "responses": (
                *("responses", "completions", "answers", "candidates", "generations", "outputs"),
            ),
            "system": _SYSTEM_NAMES,
        },
        ("prompt", "responses"),
        lambda parts: is_content(parts["prompt"]) and _is_responses(parts["responses"]),
        _read_responses,
        'columns prompt, responses ([{"text": "...", "scores": {...}}, ...], or a list of texts)',
    ),
    Layout(
        "alpaca",
        {
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "output": ("output", "response"),
            "history": ("history",),
            "system": _SYSTEM_NAMES,
        },
        ("instruction", "output"),
        lambda parts: all(isinstance(parts[name], str) for name in ("instruction", "output")),
        _read_alpaca,
        "columns instruction, input (may be empty), output; system, history",
    ),
    Layout(
        "prompt_response",
        {"prompt": _PROMPT_NAMES, "response": _RESPONSE_NAMES, "system": _SYSTEM_NAMES},
        ("prompt", "response"),
        lambda parts: is_content(parts["prompt"]) and is_content(parts["response"]),
        _read_prompt_response,
        "columns prompt, response (texts, or lists of messages)",
    ),
    Layout(
        "prompts",
        {"prompt": _PROMPT_NAMES, "system": _SYSTEM_NAMES},
        ("prompt",),
        lambda parts: is_content(parts["prompt"]),
        _read_prompt,
        "column prompt, without answers",
    ),
)
_ANSWER_PARTS = {"response", "responses", "output", "chosen", "rejected"}
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def normalised(name: str) -> str:
    """A column's name for comparison: "Formality Score " -> "formality_score"."""
    # Some systems write an accent as a character of its own.
    return re.sub(r"\W+", "_", unicodedata.normalize("NFC", name).strip().lower()).strip("_")


def find_column(names: Iterable[str], usual: Iterable[str]) -> str | None:
    """The first of the names that is, as it is or normalised, the first possible of the usual."""
    names = list(names)
    by_normal = {normalised(name): name for name in reversed(names)}
    for each in usual:
        if each in names:
            return each
        if (found := by_normal.get(normalised(each))) is not None:
            return found
    return None


@dataclass(frozen=True)
class Match:
    """A layout, and the columns that have its parts."""

    layout: Layout
    columns: Mapping[str, str]
    """Part -> column, as the first rows have them."""
    seen: frozenset[str]
    """All columns of the first rows."""

    def columns_of(self, row: Json) -> dict[str, str]:
        """Part -> column, of a row that may have columns which the first rows lack."""
        columns = dict(self.columns)
        late = [name for name in row if name not in self.seen and row[name] is not None]
        for part, usual in self.layout.parts.items():
            if late and part not in columns and (name := find_column(late, usual)):
                columns[part] = name
                late.remove(name)
        return columns

    def parts(self, row: Json) -> Json:
        """The row's values by part, without those that it lacks."""
        return {part: row[name] for part, name in self.columns_of(row).items() if name in row}

    def fits(self, row: Any) -> bool:
        """Whether a row is of this layout."""
        if not isinstance(row, dict):
            return False
        parts = self.parts(row)
        return all(name in parts for name in self.layout.required) and self.layout.fits(parts)

    def read(self, row: Any) -> Sample:
        """The sample of a row.

        Raises:
            LeftOut: for a row that no conversation can hold.
            ValueError: for a row of another layout, and for mistakes.
        """
        if not isinstance(row, dict):
            raise ValueError(f"must be an object, got {_short(row)}")
        parts = self.parts(row)
        required = self.layout.required
        if lacking := [self.columns[part] for part in required if part not in parts]:
            raise ValueError(f"has no {' and no '.join(map(repr, lacking))}")
        if null := [part for part in required if parts[part] is None]:
            raise LeftOut(EMPTY_ANSWER if null[0] in _ANSWER_PARTS else EMPTY_PROMPT)
        used = {*self.columns_of(row).values()}
        others = {key: value for key, value in row.items() if key not in used}
        sample = self.layout.read(parts, others)
        if not any(turn.role == USER and not is_blank(turn.value) for turn in sample.turns):
            raise LeftOut(EMPTY_PROMPT)
        return sample


def match_of(
    rows: Sequence[Any], layouts: Iterable[Layout], given: Mapping[str, str]
) -> Match | None:
    """The first layout that at least half as many rows fit as the one that most fit.

    Prompts alone are what all layouts with prompts have, so they come last.

    Args:
        rows: the first rows of a file.
        layouts: those that it may have.
        given: part -> column, where it isn't one of the usual names.
    """
    keys = dict.fromkeys(itertools.chain.from_iterable(r for r in rows if isinstance(r, dict)))
    found: list[tuple[int, Match]] = []
    for layout in layouts:
        columns: dict[str, str] = {}
        for part, usual in layout.parts.items():
            left = [key for key in keys if key not in columns.values()]
            column = given.get(part) or find_column(left, usual)
            if column is not None:
                columns[part] = column
        match = Match(layout, columns, frozenset(keys))
        if all(name in columns for name in layout.required) and (
            count := sum(map(match.fits, rows))
        ):
            found.append((count, match))
    better = [each for each in found if each[1].layout.name != "prompts"] or found
    most = max((count for count, _ in better), default=0)
    return next((match for count, match in better if 2 * count >= most), None)


def what_was_found(rows: Sequence[Any], container: str) -> str:
    """A file's container, its columns and a row, for the message that it isn't understood."""
    objects = [row for row in rows if isinstance(row, dict)]
    if not objects:
        kinds = Counter(type(row).__name__ for row in rows)
        return f"{container} whose rows are no objects: {_short(rows[0])} ({dict(kinds)})"
    keys = dict.fromkeys(itertools.chain.from_iterable(objects))
    row = _short(objects[0])
    row = row if len(row) <= _LONGEST_ROW else row[:_LONGEST_ROW] + "..."
    return f"{container} with the columns {', '.join(map(str, keys))}; a row: {row}"


def _short(value: Any, limit: int = 60) -> str:
    """A value on one line, its long texts cut."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    if isinstance(value, list) and value:
        more = f", ... {len(value) - 1} more" if len(value) > 1 else ""
        return f"[{_short(value[0], limit)}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_short(v, limit)}" for k, v in value.items()) + "}"
    return repr(value)


def fitting_config(rows: Sequence[Any]) -> str | None:
    """What to do with a published layout that isn't one of LAYOUTS."""
    row = next((row for row in rows if isinstance(row, dict)), {})
    config = None
    if isinstance(row.get("prompt"), dict) or "message_tree_id" in row:
        config = "data/oasst (or data/oasst_groups)"
    elif "overall_preference" in row:
        config = "data/helpsteer3"
    elif "preference_strength" in row:
        config = "data/helpsteer2 with preference=true"
    elif isinstance(row.get("text"), str) and isinstance(row.get("label"), list):
        return (
            "It is the regression format, which prepare_data writes: reward_distributed reads it "
            "as it is (steerlm2.datasets.attribute_dataset)."
        )
    return None if config is None else f"The config {config} reads it."
