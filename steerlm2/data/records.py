"""SteerLM2 records: a prompt, the wanted attribute values and the responses to weigh.

The published JSON key names ("from", "log(P(a|x,y))", ...) are used in files only; in memory
everything has Python names. Unknown keys are kept and written back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm2.attributes import AttributeSchema, read_label
from steerlm2.data.jsonl import (
    LineProblems,
    is_unicode,
    iter_json_lines,
    json_line,
    open_for_writing,
)
from steerlm2.files import replace_durably

LOG_PROB_KEYS = {
    "log_p_attributes": "log(P(a|x,y))",
    "log_p_response": "log(P(y|x))",
    "log_q": "log(Q(y|a,x))",
}
"""Field of Response -> JSON key. All are natural logarithms, summed over the response's tokens."""

HIGHEST_LOG_PROB = 1e-3
"""Of a text; no probability is above 1, but rounding may add up to this. A choice: sums of float32
over thousands of near-certain tokens stay below it. Not of P(a|x,y): a density serves as well, as
only its differences within a group count."""

CLAMPED_LOG_PROB = -9999.0
"""What vLLM gives in place of a log-prob that is lower, -inf among them."""

STOP, LENGTH = "stop", "length"
"""Finish reasons of sampled responses: at the stop token, or at the largest number of tokens.
Responses with another one ("other_stop", a server's "abort") were cut off as well."""

TOKEN_IDS, OTHERWISE, FINISH_REASON = "token_ids", "encodes_otherwise", "finish_reason"
"""JSON keys of a response about its sampling."""
TOKEN_IDS_DIGEST = "token_ids_digest"
"""JSON key of a record: the template and tokenizer of its responses' token ids."""
SAMPLING = "sampling"
"""JSON key of a record: how its responses were drawn (`Sampling`)."""
SAMPLER_LOG_PROB = "sampler_log_prob"
"""JSON key of a response: log-prob of its tokens in what was drawn from, at the sampler's
temperature and top_p, nats."""

DUPLICATES = "duplicates"
"""The cause in `Sampling.left_out` of what was drawn before."""

CUT_OFF = "cut off"
BROKEN = "not valid UTF-8"
OTHER_TOKENS = "of other tokens than their text encodes to"
UNKNOWN_TOKENS = "of unknown tokens"
"""What makes a response another one than was sampled (`flaw_of`), in words that follow a number."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


USER, ASSISTANT = "User", "Assistant"

_UNSEEN = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
    + "".join(map(chr, range(0xFE00, 0xFE10)))
)
"""Characters without ink of other categories than Cc, Cf and Z: fillers, variation selectors, and
the empty Braille cell (Unicode's Default_Ignorable_Code_Point, which Python's tables lack)."""

_TOO_LARGE = 2**31
"""Token ids are kept in 4 bytes."""


@dataclass
class Turn:
    """One message of the conversation before the responses."""

    role: str
    """"User" or "Assistant"."""
    value: str
    label: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Response:
    """One candidate answer. Log-probabilities in nats; None where not known yet."""

    value: str
    log_p_attributes: float | None = None
    log_p_response: float | None = None
    log_q: float | None = None
    scores: dict[str, float] | None = None
    """Attribute -> human label or regression score, on the scale of the label, unrounded."""
    token_ids: array[int] | None = None
    """What was sampled, the stop token included; None: not sampled, or not known."""
    encodes_otherwise: bool = False
    """The text encodes to other tokens than were sampled."""
    finish_reason: str | None = None
    """Of the sampling; None: not sampled, or not known."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def sampler_log_prob(self) -> float | None:
        """Log-prob of the tokens in the distribution that they were drawn from; None: not known."""
        value = self.extra.get(SAMPLER_LOG_PROB)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if -math.inf < value <= HIGHEST_LOG_PROB else None

    @property
    def is_cut_off(self) -> bool:
        """Whether the sampling is known not to have come to the stop token."""
        return self.finish_reason not in (None, STOP)

    @property
    def is_broken(self) -> bool:
        """Whether the text isn't made of valid UTF-8.

        Decoders write U+FFFD for bytes that are no UTF-8 (half an emoji). The character itself can
        be sampled too: it is that where the text encodes to the very tokens that were sampled. Of a
        text without such tokens nothing shows that it was whole.
        """
        whole = self.token_ids is not None and not self.encodes_otherwise
        return REPLACEMENT in self.value and not whole


def is_blank(text: str) -> bool:
    """Whether a text has nothing to read: only whitespace, control and zero-width characters."""
    return all(
        character in _UNSEEN or unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs")
        for character in text
    )


def flaw_of(response: Response) -> str | None:
    """BROKEN, CUT_OFF, OTHER_TOKENS or UNKNOWN_TOKENS, the first that holds; None: it has none.

    UNKNOWN_TOKENS: it was sampled, and nothing tells whether its text encodes to what was sampled.
    """
    if response.is_broken:
        return BROKEN
    if response.is_cut_off:
        return CUT_OFF
    if response.encodes_otherwise:
        return OTHER_TOKENS
    if response.finish_reason is not None and response.token_ids is None:
        return UNKNOWN_TOKENS
    return None


def count_flaws(responses: Iterable[Response]) -> Counter[str]:
    """[flaw] -> responses that have it (`flaw_of`)."""
    return Counter(flaw for each in responses if (flaw := flaw_of(each)) is not None)


def causes_text(counts: Mapping[str, int], none: str = "none") -> str:
    """Causes with their numbers, "3 cut off, 1 not valid UTF-8"; `none` where there are none."""
    found = [f"{count} {cause}" for cause, count in sorted(counts.items()) if count]
    return ", ".join(found) or none


@dataclass(frozen=True)
class Sampling:
    """How the responses of a record were drawn."""

    drawn: int
    """Responses drawn, those that were left out included."""
    temperature: float
    top_p: float
    top_k: int = 0
    """0: all tokens."""
    distinct: bool = True
    """Whether duplicates were left out."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """[cause] -> responses that were drawn and aren't there. With those that are there they make
    `drawn`."""

    @property
    def is_cut(self) -> bool:
        """Whether top_p or top_k made answers impossible that the model can give."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def is_plain(self) -> bool:
        """Whether the responses are samples of the model itself."""
        return self.temperature == 1 and not self.is_cut

    def __str__(self) -> str:
        top_k = f", top_k {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}{top_k}"


@dataclass
class Record:
    """A group: one prompt, one attribute label, and the responses that share them."""

    system: str
    prompt_turns: list[Turn]
    label: str | None
    responses: list[Response]
    extra: dict[str, Any] = field(default_factory=dict)
    token_ids_digest: str | None = None
    """The template and tokenizer of the responses' `token_ids` (`templates.token_ids_digest`)."""
    sampling: Sampling | None = None
    """None: not sampled, or not known."""


def parse_record(
    obj: object,
    *,
    require: Collection[str] = tuple(LOG_PROB_KEYS),
    schema: AttributeSchema | None = None,
    min_responses: int = 2,
) -> Record:
    """Check one decoded JSON object of the SteerLM2 format and build the record.

    Args:
        require: the log-probability fields of Response that every response must have.
        schema: if given, labels may use only its names and values, and come in its order.
        min_responses: a group of one response has nothing to compare.

    Raises:
        ValueError: with all problems of the record in one message.
    """
    if not isinstance(obj, dict):
        raise ValueError(f"a record must be a JSON object, got {_kind(obj)}")
    problems: list[str] = []
    system = _text(obj, "system", "", problems)
    turns = _turns(obj, schema, problems)
    label = _label(obj, "", schema, problems)
    responses = _responses(obj, require, min_responses, problems)
    digest = _optional_text(obj, TOKEN_IDS_DIGEST, problems)
    if problems:
        raise ValueError("; ".join(problems))
    known = {"system", "prompt_turns", "label", "responses", TOKEN_IDS_DIGEST}
    if (sampling := _sampling(obj.get(SAMPLING))) is not None:
        known.add(SAMPLING)
    return Record(system, turns, label, responses, _rest(obj, known), digest, sampling)


def record_to_json(record: Record) -> dict[str, Any]:
    """The record as a JSON object in the published format. Unknown values (None) are left out."""
    turns = [
        {"from": turn.role, "value": turn.value}
        | ({} if turn.label is None else {"label": turn.label})
        | turn.extra
        for turn in record.prompt_turns
    ]
    digest = record.token_ids_digest
    return (
        {
            "system": record.system,
            "prompt_turns": turns,
            "label": record.label,
            "responses": [_response_to_json(response) for response in record.responses],
        }
        | ({} if digest is None else {TOKEN_IDS_DIGEST: digest})
        | record.extra
        | ({} if record.sampling is None else {SAMPLING: dataclasses.asdict(record.sampling)})
    )


def read_records(
    path: str | Path,
    *,
    require: Collection[str] = tuple(LOG_PROB_KEYS),
    schema: AttributeSchema | None = None,
    min_responses: int = 2,
) -> list[Record]:
    """All records of a SteerLM2 JSONL file (.jsonl or .jsonl.gz); arguments as in `parse_record`.

    Raises:
        FileNotFoundError: with the absolute path.
        ValueError: naming the bad lines (the first 10) with all their problems, or an empty file.
    """
    return list(iter_records(path, require=require, schema=schema, min_responses=min_responses))


def iter_records(
    path: str | Path,
    *,
    require: Collection[str] = tuple(LOG_PROB_KEYS),
    schema: AttributeSchema | None = None,
    min_responses: int = 2,
) -> Iterator[Record]:
    """`read_records` in constant memory: bad lines are skipped, and raise after the last record."""
    problems = LineProblems(path)
    found = False
    for line_number, obj in iter_json_lines(path, problems):
        found = True
        try:
            record = parse_record(obj, require=require, schema=schema, min_responses=min_responses)
        except ValueError as error:
            problems.add(line_number, str(error))
        else:
            yield record
    problems.raise_if_any()
    if not found:
        raise ValueError(f"{path} holds no records: the file is empty")


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSONL (.gz: compressed) and return how many.

    The file appears under its name only when it is complete; missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open_for_writing(temporary, compressed=path.suffix == ".gz") as file:
            for record in records:
                file.write(json_line(record_to_json(record)))
                count += 1
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _turns(obj: dict[str, Any], schema: AttributeSchema | None, problems: list[str]) -> list[Turn]:
    items = _objects(obj, "prompt_turns", problems)
    if items is None:
        return []
    if len(items) % 2 == 0:
        problems.append(
            "prompt_turns must alternate User/Assistant and end with the user: odd count, "
            f"got {len(items)}"
        )
    turns = []
    for i, item in enumerate(items):
        where = f"prompt_turns[{i}]"
        role, expected = item.get("from"), (USER, ASSISTANT)[i % 2]
        if role != expected:
            problems.append(f"{where}: 'from' must be {expected!r}, got {role!r}")
        value = _text(item, "value", where, problems)
        label = _label(item, where, schema, problems)
        turns.append(Turn(str(role), value, label, _rest(item, {"from", "value", "label"})))
    return turns


def _responses(
    obj: dict[str, Any], require: Collection[str], min_responses: int, problems: list[str]
) -> list[Response]:
    items = _objects(obj, "responses", problems)
    if items is None:
        return []
    if len(items) < min_responses:
        problems.append(f"needs at least {min_responses} responses, got {len(items)}")
    responses = []
    indices_of: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        own: list[str] = []
        responses.append(_response(item, require, own))
        for problem in own:
            indices_of.setdefault(problem, []).append(i)
    for problem, indices in indices_of.items():
        problems.append(f"responses[{','.join(map(str, indices))}]: {problem}")
    return responses


def _response(item: dict[str, Any], require: Collection[str], problems: list[str]) -> Response:
    if item.get("from", ASSISTANT) != ASSISTANT:
        problems.append(f"'from' must be {ASSISTANT!r}, got {item['from']!r}")
    value = _text(item, "value", "", problems)
    if isinstance(item.get("value"), str) and is_blank(item["value"]):
        problems.append("the response text is empty")
    missing = [key for name, key in LOG_PROB_KEYS.items() if name in require and key not in item]
    if missing:
        problems.append(f"missing {', '.join(map(repr, missing))} (recipe score_responses adds it)")
    log_probs = {
        name: _number(item[key], repr(key), name in require, problems)
        for name, key in LOG_PROB_KEYS.items()
        if key in item
    }
    for name, log_prob in log_probs.items():
        if log_prob == CLAMPED_LOG_PROB:
            problems.append(
                f"{LOG_PROB_KEYS[name]!r} is {log_prob:g}, which vLLM writes for an unknown one: "
                "leave out the response, or the key (recipe score_responses adds it)"
            )
        elif log_prob is not None and log_prob > HIGHEST_LOG_PROB and name != "log_p_attributes":
            problems.append(
                f"{LOG_PROB_KEYS[name]!r} must be a log-probability, 0 or less, got {log_prob:g}"
            )
    scores = item.get("scores")
    if scores is not None and not isinstance(scores, dict):
        problems.append(f"'scores' must be an object of numbers, got {_kind(scores)}")
        scores = None
    if scores is not None:
        numbers = {
            name: _number(score, f"the score {name!r}", True, problems)
            for name, score in scores.items()
        }
        scores = {name: number for name, number in numbers.items() if number is not None}
    known = {"from", "value", "scores", TOKEN_IDS, OTHERWISE, FINISH_REASON}
    return Response(
        value,
        scores=scores,
        token_ids=_token_ids(item, problems),
        encodes_otherwise=bool(item.get(OTHERWISE)),
        finish_reason=_optional_text(item, FINISH_REASON, problems),
        extra=_rest(item, known.union(LOG_PROB_KEYS.values())),
        **log_probs,
    )


def _response_to_json(response: Response) -> dict[str, Any]:
    known = {"from": ASSISTANT, "value": response.value}
    optional = {key: getattr(response, name) for name, key in LOG_PROB_KEYS.items()}
    optional["scores"] = response.scores
    optional[FINISH_REASON] = response.finish_reason
    optional[TOKEN_IDS] = None if response.token_ids is None else response.token_ids.tolist()
    optional[OTHERWISE] = response.encodes_otherwise or None
    return known | {k: v for k, v in optional.items() if v is not None} | response.extra


def _objects(obj: dict[str, Any], key: str, problems: list[str]) -> list[dict[str, Any]] | None:
    """The list of objects under `key`; None, with the reason in `problems`, if it isn't one."""
    items = obj.get(key)
    if key not in obj:
        problems.append(f"missing {key!r}")
    elif not isinstance(items, list):
        problems.append(f"{key!r} must be a list, got {_kind(items)}")
    else:
        wrong = [f"{key}[{i}]" for i, item in enumerate(items) if not isinstance(item, dict)]
        if not wrong:
            return items
        problems.append(f"{', '.join(wrong)} must be a JSON object")
    return None


def _text(obj: dict[str, Any], key: str, where: str, problems: list[str]) -> str:
    prefix = f"{where}: " if where else ""
    value = obj.get(key)
    if key not in obj:
        problems.append(f"{prefix}missing {key!r}")
    elif not isinstance(value, str):
        problems.append(f"{prefix}{key!r} must be text, got {_kind(value)}")
    elif not is_unicode(value):
        problems.append(f"{prefix}{key!r} holds half of a surrogate pair: not valid Unicode text")
    else:
        return value
    return ""


def _optional_text(obj: dict[str, Any], key: str, problems: list[str]) -> str | None:
    return None if obj.get(key) is None else _text(obj, key, "", problems)


def _token_ids(item: dict[str, Any], problems: list[str]) -> array[int] | None:
    ids = item.get(TOKEN_IDS)
    if ids is None:
        return None
    if isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < _TOO_LARGE for i in ids):
        return array("i", ids)
    problems.append(f"{TOKEN_IDS!r} must be a list of token ids, whole numbers from 0")
    return None


def _sampling(value: object) -> Sampling | None:
    """The object of that key; None where it isn't ours: other programs may use the name too."""
    names = {each.name for each in dataclasses.fields(Sampling)}
    if (
        not isinstance(value, dict)
        or not {"drawn", "temperature", "top_p"} <= value.keys() <= names
    ):
        return None
    found = Sampling(**value)
    counts = found.left_out.values() if isinstance(found.left_out, dict) else [None]
    whole = all(type(each) is int and each >= 0 for each in (found.drawn, found.top_k, *counts))
    settings = (found.temperature, found.top_p)
    real = all(type(each) in (int, float) and each >= 0 for each in settings)
    return found if whole and real and type(found.distinct) is bool else None


def _label(
    obj: dict[str, Any], where: str, schema: AttributeSchema | None, problems: list[str]
) -> str | None:
    prefix = f"{where}: " if where else ""
    label = obj.get("label")
    if label is None:
        return None
    if not isinstance(label, str):
        problems.append(f"{prefix}'label' must be text or null, got {_kind(label)}")
        return None
    try:
        return read_label(label, schema)
    except ValueError as error:
        problems.append(f"{prefix}{error}")
    return label


def _number(value: object, name: str, required: bool, problems: list[str]) -> float | None:
    if value is None and not required:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.append(f"{name} must be a number, got {_kind(value)}")
        return None
    with contextlib.suppress(OverflowError):
        if math.isfinite(value):
            return float(value)
    problems.append(f"{name} must be finite, got {value if isinstance(value, float) else 'huge'}")
    return None


def _rest(obj: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in obj.items() if key not in known}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
