"""Labelled texts and preference pairs for attribute models, tokenised, in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steerlm2.attributes import (
    DEFAULT_RANGE,
    DEFAULT_SCHEMA,
    NOT_LABELLED,
    AttributeSchema,
    UnknownAttributes,
    parse_label,
    schema_argument,
    value_problems,
)
from steerlm2.data.conversations import (
    Conversation,
    has_empty_answer,
    parse_conversation,
    parse_regression_text,
    regression_names,
)
from steerlm2.data.jsonl import LineProblems, iter_json_lines
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import BROKEN, REPLACEMENT, Turn
from steerlm2.data.synthetic import ATTRIBUTES, synthetic_records
from steerlm2.data.templates import (
    Template,
    encode_for_scoring,
    extra_id_template,
)
from steerlm2.data.tokenizers import Tokenizer

MAX_STRENGTH = 3
"""The largest strength of a synthetic preference, as in HelpSteer2."""
LABELS_FROM = (
    "prepare_data makes labels of the columns that 'schema' names, and annotate_attributes has "
    "those of another attribute model"
)
PAIRS_FROM = "prepare_data makes pairs of chosen and rejected answers"


@dataclass
class RewardDataset(Sequence[RewardGroup]):
    """Tokenised texts with their labels, or pairs of texts with a preference.

    A text longer than `max_seq_len` is cut at its beginning. One whose scored answer isn't valid
    UTF-8 is left out, in a pair with the other.
    """

    groups: list[RewardGroup] = field(default_factory=list)
    num_cut: int = 0
    num_broken: int = 0
    """Texts or pairs with U+FFFD in an answer that is to be scored."""
    ignored: set[str] = field(default_factory=set)
    """Labelled attributes that the model's schema doesn't have."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(g.prompt) + max(map(len, g.responses)) for g in self.groups)

    def num_labels(self, schema: AttributeSchema) -> dict[str, int]:
        """Attribute -> the number of texts that have a label of it."""
        labels = [labels for group in self.groups for labels in group.labels or ()]
        return {
            name: sum(own[i] != NOT_LABELLED for own in labels)
            for i, name in enumerate(schema.names)
        }

    def summary(self, schema: AttributeSchema) -> str:
        """What there is of what, for the log of a run."""
        texts = sum(len(group.responses) for group in self.groups)
        if self.groups[0].strength is not None:
            what = f"{texts // 2} pairs"
        else:
            counts = (f"{name} {number}" for name, number in self.num_labels(schema).items())
            what = f"{texts} texts with labels of {', '.join(counts)}"
        left_out = f"; labels left out: {', '.join(sorted(self.ignored))}" if self.ignored else ""
        if self.num_broken:
            left_out += f"; {self.num_broken} left out: an answer with U+FFFD, {BROKEN}"
        return f"{what} (cut at the beginning, being too long: {self.num_cut} texts{left_out})"

    def refuse_unlabelled(self, schema: AttributeSchema) -> None:
        """Check that a head that is trained on these texts from the start learns all of `schema`.

        Raises:
            ValueError: naming the attributes that no text has a label of, whose scores would be
                noise.
        """
        counts = self.num_labels(schema)
        lacking = [name for name, number in counts.items() if not number]
        if lacking:
            trained = schema.select(name for name, number in counts.items() if number)
            raise ValueError(
                f"dataset: no text has a label of {', '.join(lacking)}, so an attribute model's "
                "scores of it would be noise: add texts that have, or leave it out with "
                f"{schema_argument(trained)}"
            )


@dataclass(frozen=True)
class LabelledText:
    """A response, the conversation before it, and the values of its label."""

    system: str
    turns: list[Turn]
    response: str
    values: dict[str, float]
    line: int


def attribute_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_seq_len: int,
    schema: AttributeSchema = DEFAULT_SCHEMA,
    pairs: bool = False,
    template: Template | None = None,
) -> RewardDataset:
    """Labelled texts of a JSONL file, in the conversation or the regression format.

    Every labelled turn of a conversation gives a text. Only the conversation format holds contents
    that spell the markers of the regression format, which reads them as turns. With `pairs` two
    lines form a pair: the same conversation with two responses, both labelled only with the
    strength of the preference, below 0 where the first is preferred.

    Args:
        source: a .jsonl or .jsonl.gz file.
        max_seq_len: tokens of a text; a longer one is cut at its beginning, and counted.
        schema: attributes of the model. Other labels are ignored. The values of a regression file
            are those of the schema, or of the default schema with nine attributes.
        pairs: read preferences instead of attribute values.
        template: defaults to the extra_id template.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming every bad line (the first 10), among them texts without any label of the
            schema or with values outside their attribute's range, or an empty file.
    """
    problems = LineProblems(source)
    texts = _labelled_texts(source, schema, problems)
    groups = _pairs(texts, problems) if pairs else _texts(texts, schema, problems)
    dataset = RewardDataset()
    for text, responses, labels in groups:
        if any(REPLACEMENT in response for response in responses):
            dataset.num_broken += 1
            continue
        if labels is not None:
            dataset.ignored |= text.values.keys() - set(schema.names)
        group, num_cut = encode_for_scoring(
            template or extra_id_template(),
            tokenizer,
            text.system,
            text.turns,
            responses,
            max_seq_len,
        )
        strength = next(iter(text.values.values())) if pairs else None
        dataset.groups.append(dataclasses.replace(group, labels=labels, strength=strength))
        dataset.num_cut += num_cut
    problems.raise_if_any()
    if not dataset.groups:
        broken = f"; {dataset.num_broken} left out: an answer with U+FFFD, {BROKEN}"
        raise ValueError(
            f"{source} holds no {'pair' if pairs else 'labelled text'}"
            f"{broken if dataset.num_broken else ''}; {PAIRS_FROM if pairs else LABELS_FROM}"
        )
    return dataset


def synthetic_attribute_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    responses_per_prompt: int,
    max_seq_len: int,
    schema: AttributeSchema = DEFAULT_SCHEMA,
    pairs: bool = False,
    template: Template | None = None,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
) -> RewardDataset:
    """The responses of `synthetic_dataset`, labelled with their computed scores.

    Args:
        pairs: pairs of responses, of which the longer one is preferred, by at most MAX_STRENGTH.

    Raises:
        ValueError: where the schema has neither humor nor verbosity, or other ranges for them.
    """
    if not pairs:
        check_computed_labels(schema, "the synthetic data is")
    dataset = RewardDataset()
    size = 2 if pairs else 1
    for record in synthetic_records(num_records, responses_per_prompt, seed, split=split):
        for start in range(0, len(record.responses) - size + 1, size):
            responses = record.responses[start : start + size]
            group, num_cut = encode_for_scoring(
                template or extra_id_template(),
                tokenizer,
                record.system,
                record.prompt_turns,
                [response.value for response in responses],
                max_seq_len,
            )
            scores = [response.scores or {} for response in responses]
            if pairs:
                gap = round(scores[1]["verbosity"] - scores[0]["verbosity"])
                strength = float(max(-MAX_STRENGTH, min(MAX_STRENGTH, gap)))
                group = dataclasses.replace(group, strength=strength)
            else:
                labels = [scores[0].get(name, NOT_LABELLED) for name in schema.names]
                group = dataclasses.replace(group, labels=[labels])
            dataset.groups.append(group)
            dataset.num_cut += num_cut
    return dataset


def check_computed_labels(schema: AttributeSchema, what: str) -> None:
    """Check that the schema has attributes of `score_text`, on whose scale its scores are.

    Args:
        what: is labelled so, the beginning of the message.

    Raises:
        ValueError: where it has none of them, or has another range for one.
    """
    computed = [name for name in ATTRIBUTES if name in schema.names]
    if not computed:
        raise ValueError(
            f"{what} labelled with {', '.join(ATTRIBUTES)}, none of which is in schema.names"
        )
    if schema.select(computed).shared_range != DEFAULT_RANGE:
        low, high = DEFAULT_RANGE
        raise ValueError(
            f"{what} labelled with values from {low} to {high}, the schema has "
            f"{schema.select(computed)}"
        )


_Texts = tuple[LabelledText, list[str], list[list[float]] | None]
"""A text, the responses to its conversation (two for a pair), and their labels (or None)."""


def _labelled_texts(
    source: str, schema: AttributeSchema, problems: LineProblems
) -> Iterator[LabelledText]:
    for line, obj in iter_json_lines(source, problems):
        try:
            if isinstance(obj, dict) and "text" in obj:
                yield _regression_text(obj, schema, line)
            else:
                conversation = parse_conversation(obj)
                for i, turn in enumerate(conversation.turns):
                    if not turn.label:
                        continue
                    values = {k: float(v) for k, v in parse_label(turn.label).items()}
                    before = conversation.turns[:i]
                    yield LabelledText(conversation.system, before, turn.value, values, line)
        except ValueError as error:
            problems.add(line, error)


def _regression_text(obj: dict[str, Any], schema: AttributeSchema, line: int) -> LabelledText:
    text, label = obj["text"], obj.get("label")
    if not isinstance(text, str):
        raise ValueError("'text' must be text")
    system, turns = parse_regression_text(text)
    if has_empty_answer(Conversation(turns, system)):
        raise ValueError("the response text is empty")
    names = regression_names(schema)
    if isinstance(label, list) and len(label) != len(names):
        names = DEFAULT_SCHEMA.names
    if not isinstance(label, list) or len(label) != len(names):
        sizes = " or ".join(map(str, sorted({len(schema.names), len(names)})))
        raise ValueError(f"'label' must be a list of {sizes} numbers")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in label):
        raise ValueError("'label' must be a list of numbers")
    values = {
        name: float(value)
        for name, value in zip(names, label, strict=True)
        if value != NOT_LABELLED
    }
    return LabelledText(system, turns[:-1], turns[-1].value, values, line)


def _texts(
    texts: Iterable[LabelledText], schema: AttributeSchema, problems: LineProblems
) -> Iterator[_Texts]:
    for text in texts:
        labels = [text.values.get(name, NOT_LABELLED) for name in schema.names]
        outside = [
            problem
            for name, value in zip(schema.names, labels, strict=True)
            if value != NOT_LABELLED
            for problem in value_problems(name, value, schema, whole=False)
        ]
        if set(labels) == {NOT_LABELLED}:
            message = (
                f"nothing of {', '.join(schema.names)} is labelled in the text that ends with "
                f"{text.response[-40:]!r}"
            )
            unknown = UnknownAttributes(message, text.values, schema)
            problems.add(text.line, unknown if text.values else message)
        elif outside:
            problems.add(text.line, "; ".join(outside))
        else:
            yield text, [text.response], [labels]


def _pairs(texts: Iterable[LabelledText], problems: LineProblems) -> Iterator[_Texts]:
    first = None
    for text in texts:
        strengths = list(text.values.values())
        if len(strengths) != 1 or not math.isfinite(strengths[0]):
            given = ", ".join(f"{name}:{value:g}" for name, value in text.values.items())
            problems.add(
                text.line,
                "a text of a pair must be labelled with the preference strength alone, got "
                f"{given or 'nothing'}",
            )
        if first is None:
            first = text
            continue
        ours, theirs = (
            (each.system, [(turn.role, turn.value) for turn in each.turns], each.values)
            for each in (first, text)
        )
        if ours != theirs:
            problems.add(
                text.line,
                f"makes a pair with line {first.line}, but has another conversation before the "
                "response, or another preference strength",
            )
        elif len(text.values) == 1:
            yield first, [first.response, text.response], None
        first = None
    if first is not None:
        problems.add(first.line, "the last text has no partner: pairs are two adjacent lines")
