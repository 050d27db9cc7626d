"""Open Assistant conversation trees (OASST1 and OASST2), in either of the two published forms.

The tree export has one tree a line: `prompt` with nested `replies`; a message has `role` (prompter
or assistant), `text`, and human `labels`: name -> {"value": 0..1, "count": raters}. The message
table, which the hub has, has one message a row, with `message_tree_id` and `parent_id`; the rows of
a tree are adjacent.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlm2.attributes import (
    AttributeSchema,
    as_schema,
    beta_log_prob,
    encode_label,
    parse_label,
)
from steerlm2.data.conversations import Conversation, is_text
from steerlm2.data.jsonl import LineProblems
from steerlm2.data.records import (
    ASSISTANT,
    USER,
    Record,
    Response,
    Turn,
    is_blank,
)
from steerlm2.data.sources.base import DEFAULT_SYSTEM_PROMPT, Unit
from steerlm2.data.sources.rows import Row, iter_rows

ROLES = {"prompter": USER, "assistant": ASSISTANT}

OASST_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity")
"""Open Assistant's labels that the published models are trained on."""

_Path = list[dict[str, Any]]
"""The messages of a tree from its prompt to one of them."""

_log = logging.getLogger(__name__)


def oasst_groups(
    source: str | Path,
    *,
    label: str = "sampled",
    schema: AttributeSchema | Mapping[str, Any] | None = None,
    seed: int = 0,
    concentration: float = 24.0,
    bins: str = "midpoint",
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    keep_rejected: bool = False,
) -> Iterator[Record]:
    """Every prompter message with at least 2 human-labelled replies, as a SteerLM2 record.

    The human labels, scaled to their attribute's range and not rounded, become the `scores` of a
    response, and log P(a|x,y) is their Beta likelihood (`beta_log_prob`). log P(y|x) and
    log Q'(y|a,x) remain unknown. A record's label names only attributes that every reply of the
    group has a score for. Groups without such an attribute are left out, and their number is
    logged.

    Args:
        source: a file, folder or hub id (`iter_rows`); read as a stream, one tree at a time.
        label: the label a: "sampled" takes the rounded human labels of one reply of the group,
            drawn with `seed`; "best" those of the reply with the highest quality; anything else
            is a label string for all groups.
        schema: the attributes to keep and their range (a mapping in a config).
        seed: a group's draw depends on it and on the group's message id alone.
        concentration: of the Beta likelihood.
        bins: of the Beta likelihood.
        system_prompt: of every record.
        keep_rejected: as in `oasst_conversations`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for invalid arguments; after the last record, naming the lines that
            aren't conversation trees.
    """
    schema = as_schema(schema)
    if label not in ("sampled", "best"):
        try:
            encode_label(parse_label(label), schema)
        except ValueError as error:
            raise ValueError(
                f"label must be 'sampled', 'best' or a label string: {error}"
            ) from error
    return _groups(source, label, schema, seed, concentration, bins, system_prompt, keep_rejected)


def oasst_conversations(
    source: str | Path,
    *,
    attributes: Sequence[str] = OASST_ATTRIBUTES,
    schema: AttributeSchema | Mapping[str, Any] | None = None,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
    keep_rejected: bool = False,
) -> Iterator[Unit]:
    """Every thread of a tree, from its prompt to a message without replies, as a conversation.

    The human labels of an assistant's message, scaled to the attributes' ranges and rounded, are
    its label. The threads of a tree are one unit (shuffled, split and sampled together), because
    they share their first messages. Threads of a single message are left out; a unit may be empty.
    Messages that were deleted or that the reviewers rejected are left out with all replies to them,
    and so are answers without text; their numbers are logged.

    Args:
        source: a file, folder or hub id (`iter_rows`); read as a stream, one tree at a time.
        attributes: the names to keep, in the label's order.
        schema: has their ranges (a mapping in a config); None: 0 to 4, as published.
        system_prompt: of every conversation.
        keep_rejected: keep deleted and rejected messages, as the published data do.

    Raises:
        FileNotFoundError: if there is no such file.
        UnknownAttributes: for attributes that the schema doesn't have.
        ValueError: after the last tree, naming the lines that aren't conversation trees.
    """
    names = tuple(attributes)
    kept = AttributeSchema(names) if schema is None else as_schema(schema).select(names)
    problems = LineProblems(source)
    left_out = LeftOut(source, keep_rejected)
    for paths in _iter_trees(source, problems, left_out):
        threads = [path for path in paths if len(path) > 1 and not path[-1].get("replies")]
        conversations = [
            Conversation([_turn(message, kept) for message in path], system_prompt)
            for path in threads
        ]
        yield Unit(conversations)  # empty ones too, which count in the published split
    problems.raise_if_any()
    left_out.log()


def _turn(message: dict[str, Any], schema: AttributeSchema) -> Turn:
    """The label is "" where none of the labels is of the schema, as in the published data."""
    turn = Turn(ROLES[message["role"]], message["text"])
    labels = message.get("labels")
    if turn.role == ASSISTANT and labels is not None:
        scores = _scores(message, schema)
        turn.label = ",".join(f"{name}:{round(score)}" for name, score in scores.items())
    return turn


def _groups(
    source: str | Path,
    label: str,
    schema: AttributeSchema,
    seed: int,
    concentration: float,
    bins: str,
    system_prompt: str,
    keep_rejected: bool,
) -> Iterator[Record]:
    problems = LineProblems(source)
    num_left_out = 0
    left_out = LeftOut(source, keep_rejected)
    for paths in _iter_trees(source, problems, left_out):
        for path in paths:
            prompt = path[-1]
            if prompt["role"] != "prompter":
                continue
            replies = [reply for reply in prompt.get("replies") or [] if _scores(reply, schema)]
            if len(replies) < 2:
                continue
            message_id = prompt.get("message_id")
            scores = [_scores(reply, schema) for reply in replies]
            quality = [score.get("quality", -math.inf) for score in scores]
            values = label_values(label, scores, quality, schema, f"{seed}:{message_id}")
            if not values:
                num_left_out += 1
                continue
            log_p = beta_log_prob(
                [[score[name] for name in values] for score in scores],
                [*values.values()],
                concentration,
                bins,
                schema.select(values),
            ).sum(dim=-1)
            yield Record(
                system=system_prompt,
                prompt_turns=[Turn(ROLES[m["role"]], m["text"]) for m in path],
                label=encode_label(values, schema),
                responses=[
                    Response(
                        value=reply["text"],
                        log_p_attributes=log_p_attributes,
                        scores=score,
                        extra={"message_id": reply.get("message_id")},
                    )
                    for reply, score, log_p_attributes in zip(
                        replies, scores, log_p.tolist(), strict=True
                    )
                ],
                extra={"message_id": message_id},
            )
    if num_left_out:
        _log.warning(
            "%s: left out %d prompts whose replies share no score for the label",
            source,
            num_left_out,
        )
    left_out.log()
    problems.raise_if_any()


@dataclass
class LeftOut:
    """Leaves messages out, with all replies to them, and counts them by cause."""

    source: str | Path
    keep_rejected: bool
    counts: Counter[str] = field(default_factory=Counter)

    def without(self, paths: list[_Path]) -> list[_Path]:
        """The paths of a tree that are left; their messages have the replies that are left."""
        gone: set[int] = set()
        for path in paths:  # a message comes before the replies to it
            below = len(path) > 1 and id(path[-2]) in gone
            if cause := "replies to those" if below else self._cause(path[-1]):
                gone.add(id(path[-1]))
                self.counts[cause] += 1
        kept = [path for path in paths if id(path[-1]) not in gone]
        for *_, message in kept:
            message["replies"] = [r for r in message.get("replies") or [] if id(r) not in gone]
        return kept

    def _cause(self, message: dict[str, Any]) -> str | None:
        if not self.keep_rejected:
            if message.get("deleted"):
                return "deleted"
            if message.get("review_result") is False:
                return "rejected by the reviewers"
        if message["role"] == "assistant" and is_blank(message["text"]):
            return "without text"
        return None

    def log(self) -> None:
        """Say how many, if there are any."""
        if self.counts:
            counts = ", ".join(f"{number} {cause}" for cause, number in sorted(self.counts.items()))
            _log.warning("%s: left out messages: %s", self.source, counts)


def _iter_trees(
    source: str | Path, problems: LineProblems, left_out: LeftOut
) -> Iterator[list[_Path]]:
    """Every tree as the paths to its messages; invalid trees go to `problems`."""
    rows = iter_rows(source, problems)
    for _, group in itertools.groupby(rows, key=_tree_key):
        tree_rows = list(group)
        first = tree_rows[0]
        try:
            tree = _assemble(tree_rows) if _is_message(first) else first.value
            paths = list(_paths(tree))
        except ValueError as error:
            problems.add(first.number, str(error), first.path)
        else:
            yield left_out.without(paths)


def _tree_key(row: Row) -> object:
    """A key that rows of one tree share; a row of the tree export is a whole tree."""
    return row.path, row.value.get("message_tree_id") if _is_message(row) else row.number


def _is_message(row: Row) -> bool:
    return isinstance(row.value, dict) and "role" in row.value


def _assemble(rows: list[Row]) -> dict[str, Any]:
    """The tree of these rows of the message table, in the form of the tree export."""
    messages = {}
    for row in rows:
        labels = row.value.get("labels")
        if isinstance(labels, dict) and isinstance(labels.get("name"), list):
            values = zip(labels["name"], labels.get("value") or [], strict=False)
            labels = {name: {"value": value} for name, value in values}
        messages[row.value.get("message_id")] = row.value | {"labels": labels, "replies": []}
    roots = []
    for message in messages.values():
        parent = message.get("parent_id")
        if parent is None:
            roots.append(message)
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            raise ValueError(
                f"the parent {parent!r} of a message is not among the rows next to it: the rows of "
                "a tree must follow one another, sort the table by 'message_tree_id'"
            )
    if len(roots) != 1 or len(messages) < len(rows):
        raise ValueError(
            f"the {len(rows)} messages of this tree need ids that differ, and one of them no "
            f"parent; got {len(messages)} ids and {len(roots)} without a parent"
        )
    return {"prompt": roots[0]}


def _paths(tree: object) -> Iterator[_Path]:
    """The path from the prompt to every message of a tree, in depth-first order.

    Raises:
        ValueError: for the first invalid message.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("prompt"), dict):
        raise ValueError("a conversation tree must be a JSON object with a 'prompt' object")
    pending: list[tuple[_Path, str]] = [([tree["prompt"]], "prompt")]
    while pending:
        path, where = pending.pop()
        message = path[-1]
        expected = ("assistant", "prompter")[len(path) % 2]
        role, text = message.get("role"), message.get("text")
        replies = message.get("replies") or []
        if role != expected:
            raise ValueError(f"{where}: 'role' must be {expected!r} here, got {role!r}")
        if not is_text(text):
            raise ValueError(f"{where}: 'text' must be text, got {text!r}")
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise ValueError(f"{where}: 'replies' must be a list of messages")
        for key in ("deleted", "review_result"):
            if message.get(key) not in (None, True, False):
                raise ValueError(f"{where}: {key!r} must be true, false or null")
        _check_labels(message, where)
        yield path
        pending += [
            ([*path, reply], f"{where}.replies[{i}]")
            for i, reply in reversed([*enumerate(replies)])
        ]


def _check_labels(message: dict[str, Any], where: str) -> None:
    labels = message.get("labels") or {}
    if not isinstance(labels, dict):
        raise ValueError(f"{where}: 'labels' must be an object")
    for name, entry in labels.items():
        value = entry.get("value") if isinstance(entry, dict) else None
        if not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN fails too
            raise ValueError(f"{where}: the label {name!r} must have a value from 0 to 1")


def _scores(reply: dict[str, Any], schema: AttributeSchema) -> dict[str, float]:
    """The reply's human labels on the scale of the schema, in its order."""
    labels = reply.get("labels") or {}
    return {
        name: low + labels[name]["value"] * (high - low)
        for name, (low, high) in zip(schema.names, schema.ranges, strict=True)
        if name in labels
    }


def label_values(
    label: str,
    scores: Sequence[Mapping[str, float]],
    goodness: Sequence[float],
    schema: AttributeSchema,
    draw_seed: str,
) -> dict[str, int]:
    """The values of a group's label, for the attributes that all its responses have a score for.

    Args:
        label: "sampled": those of a response that is drawn; "best": those of the best one; else a
            label string.
        scores: of each response.
        goodness: of each response, for "best".
        draw_seed: of the draw.
    """
    shared = [name for name in schema.names if all(name in score for score in scores)]
    if label == "sampled":
        chosen: Mapping[str, float] = random.Random(draw_seed).choice(scores)
    elif label == "best":
        chosen = scores[max(range(len(scores)), key=goodness.__getitem__)]
    else:
        chosen = {name: float(value) for name, value in parse_label(label).items()}
    return {name: round(chosen[name]) for name in shared if name in chosen}
