"""What is made of chat data: conversations with labels, pairs with a preference, or groups."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from steerlm2.attributes import encode_label, label_log_probs, parse_label
from steerlm2.data.conversations import Conversation
from steerlm2.data.records import ASSISTANT, USER, Record, Response, Turn
from steerlm2.data.sources.base import SplitRecord, Unit
from steerlm2.data.sources.chat_reading import Item, Options, Reading, Scored
from steerlm2.data.sources.helpsteer import PREFERENCE_ATTRIBUTE
from steerlm2.data.sources.layout_rows import Sample
from steerlm2.data.sources.oasst import label_values

_REJECTED = "rejected answers without a label"
_NOT_BEST = "answers that aren't among the best"
_TIED = "whose answers are equally good"
_EQUAL = "whose two answers are the same"
_ALONE = "with fewer than two answers"
_NO_SHARED = "whose answers share no attribute of the label"
_ORDER = "whose turns don't alternate between user and assistant"


def _count(reading: Reading, answers: Iterable[Scored]) -> None:
    for answer in answers:
        reading.tally.conversations += 1
        reading.tally.labelled += bool(answer.values)
        reading.tally.values.update(answer.values.keys())


def _system(sample: Sample, options: Options) -> str:
    return options.system_prompt if sample.system is None else sample.system


def _conversations(items: Iterable[Item], reading: Reading) -> Iterator[Unit]:
    options, tally = reading.options, reading.tally
    for row, sample, answers in items:
        system = _system(sample, options)
        if not sample.answers:
            tally.conversations += 1
            labels = [turn.label for turn in sample.turns if turn.label]
            tally.labelled += len(labels)
            for label in labels:
                tally.values.update(parse_label(label).keys())
            yield Unit([Conversation(sample.turns, system, sample.extra)], row.split)
            continue
        if reading.match.layout.name == "preference" and not any(a.values for a in answers):
            tally.left_out[_REJECTED] += 1
            answers = answers[:1]
        if options.keep is not None and len(answers) > options.keep:
            best = sorted(range(len(answers)), key=lambda i: -_known(answers[i].goodness))
            tally.left_out[_NOT_BEST] += len(answers) - options.keep
            answers = [answers[i] for i in sorted(best[: options.keep])]
        _count(reading, answers)
        yield Unit(
            [_conversation(sample.turns, system, a.value, a.label) for a in answers], row.split
        )


def _known(goodness: float) -> float:
    return -math.inf if math.isnan(goodness) else goodness


def _conversation(turns: list[Turn], system: str, answer: str, label: str | None) -> Conversation:
    return Conversation([*turns, Turn(ASSISTANT, answer, label)], system)


def _pairs(items: Iterable[Item], reading: Reading) -> Iterator[Unit]:
    options, tally = reading.options, reading.tally
    label = pair_label(options)
    if reading.match.layout.name != "preference":
        items = _joined(items)
    for row, sample, answers in items:
        if cause := _why_no_pair(reading, answers):
            tally.left_out[cause] += 1
            continue
        if reading.match.layout.name != "preference":
            rated = [a for a in answers if not math.isnan(a.goodness)]
            answers = [
                max(rated, key=lambda a: a.goodness),
                min(rated, key=lambda a: a.goodness),
            ]
        system = _system(sample, options)
        pair = [_conversation(sample.turns, system, a.value, label) for a in answers]
        yield Unit(pair, row.split, is_pair=True)


def pair_label(options: Options) -> str:
    """The label of every pair: below 0, the first answer is better."""
    names = options.schema.names
    attribute = PREFERENCE_ATTRIBUTE if PREFERENCE_ATTRIBUTE in names else names[0]
    return f"{attribute}:{-options.strength}"


def _why_no_pair(reading: Reading, answers: Sequence[Scored]) -> str | None:
    if reading.match.layout.name == "preference":
        return _EQUAL if answers[0].value == answers[1].value else None
    rated = [answer.goodness for answer in answers if not math.isnan(answer.goodness)]
    if len(rated) < 2:
        return _ALONE
    return _TIED if max(rated) == min(rated) else None


def _joined(items: Iterable[Item]) -> Iterator[Item]:
    """Items that follow one another and have the same prompt, as one."""

    def prompt(item: Item) -> Any:
        sample = item.sample
        return item.row.split, sample.system, [(turn.role, turn.value) for turn in sample.turns]

    for _, group in itertools.groupby(items, key=prompt):
        first, *more = group
        yield first._replace(answers=[*first.answers, *(a for each in more for a in each.answers)])


def _groups(items: Iterable[Item], reading: Reading) -> Iterator[Record]:
    options, tally = reading.options, reading.tally
    if reading.match.layout.name == "steerlm2":
        yield from _own_records(items, reading)
        return
    for row, sample, answers in _joined(items):
        values: dict[str, int] = {}
        prompt = json.dumps([turn.value for turn in sample.turns])
        if options.label not in ("sampled", "best"):
            values = parse_label(options.label)
        elif len(answers) > 1:
            values = label_values(
                options.label,
                [answer.values for answer in answers],
                [_known(answer.goodness) for answer in answers],
                options.schema,
                f"{options.seed}:{prompt}",
            )
        roles = [turn.role for turn in sample.turns]
        if len(answers) < 2:
            tally.left_out[_ALONE] += 1
        elif not values:
            tally.left_out[_NO_SHARED] += 1
        elif roles != [(USER, ASSISTANT)[i % 2] for i in range(len(roles))] or len(roles) % 2 == 0:
            tally.left_out[_ORDER] += 1
        else:
            _count(reading, answers)
            yield SplitRecord(
                system=_system(sample, options),
                prompt_turns=sample.turns,
                label=encode_label(values, options.schema),
                responses=_responses(answers, values, options),
                split=row.split,
            )


def _responses(
    answers: Sequence[Scored], values: Mapping[str, int], options: Options
) -> list[Response]:
    """With log P(a|x,y) where every answer has values for the label."""
    scores = [{name: float(value) for name, value in answer.values.items()} for answer in answers]
    log_p: list[float] | list[None] = [None] * len(answers)
    if all(name in own for own in scores for name in values):
        log_p = label_log_probs(scores, values, options.concentration, options.bins, options.schema)
    return [
        Response(answer.value, log_p_attributes=own_log_p, scores=own or None)
        for answer, own, own_log_p in zip(answers, scores, log_p, strict=True)
    ]


def _own_records(items: Iterable[Item], reading: Reading) -> Iterator[Record]:
    for item in items:
        record = item.sample.record
        assert record is not None
        _count(reading, item.answers)
        yield SplitRecord(**vars(record), split=item.row.split)


MAKERS: dict[str, Callable[[Iterable[Item], Reading], Iterator[Any]]] = {
    "conversations": _conversations,
    "pairs": _pairs,
    "groups": _groups,
}
