"""Data sets for `dataset:` in a config: records, tokenised into groups, in memory.

A builder takes the tokenizer first and its settings by name, as torchtune's builders do. Groups for
SteerLM 2.0 come first, labelled texts and pairs for attribute models second.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from steerlm2.attributes import DEFAULT_SCHEMA, NOT_LABELLED, AttributeSchema, parse_label
from steerlm2.data.conversations import parse_conversation, parse_regression_text
from steerlm2.data.packing import Group, RewardGroup
from steerlm2.data.records import (
    LOG_PROB_KEYS,
    LineProblems,
    Record,
    Turn,
    iter_json_lines,
    read_records,
)
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import (
    Template,
    encode_for_scoring,
    encode_prompt,
    encode_response,
    extra_id_template,
)
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.losses import target_weights


@dataclass
class SteerLM2Dataset(Sequence[Group]):
    """Tokenised groups, and what was left out to make them fit.

    A response that is cut off no longer matches its stored log Q', so one that doesn't fit into
    `max_seq_len` is dropped, and so is a group with fewer than two left.
    """

    records: list[Record]
    groups: list[Group]
    tokenizer: Tokenizer
    template: Template
    dropped_responses: int
    dropped_groups: int

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def without_label(self) -> list[Group]:
        """The same groups with prompts that show no label, in no turn: the input of log P(y|x)."""
        groups = []
        for group in self.groups:
            record = self.records[group.index]
            turns = [dataclasses.replace(turn, label=None) for turn in record.prompt_turns]
            record = dataclasses.replace(record, prompt_turns=turns, label=None)
            prompt = _prompt(record, self.tokenizer, self.template)
            groups.append(dataclasses.replace(group, prompt=prompt))
        return groups

    def longest(self) -> int:
        """Tokens of the longest prompt with a response."""
        return max(len(g.prompt) + max(map(len, g.responses)) for g in self.groups)

    def summary(self) -> str:
        responses = sum(len(group.responses) for group in self.groups)
        return (
            f"{len(self.groups)} groups with {responses} responses "
            f"(dropped as too long: {self.dropped_responses} responses, "
            f"{self.dropped_groups} groups)"
        )


def steerlm2_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_seq_len: int,
    template: Template | None = None,
    require: Sequence[str] = tuple(LOG_PROB_KEYS),
    num_samples: int | None = None,
    seed: int = 0,
) -> SteerLM2Dataset:
    """SteerLM2 records of a JSONL file.

    Args:
        source: a .jsonl or .jsonl.gz file.
        max_seq_len: tokens of a prompt with one of its responses.
        template: defaults to the extra_id template.
        require: the log-probs that every response must have.
        num_samples: use only so many records, drawn with `seed`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming every bad line, or where no group is left.
    """
    records = read_records(source, require=require)
    if num_samples is not None and num_samples < len(records):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(records), generator=generator)[:num_samples]
        records = [records[i] for i in sorted(chosen.tolist())]
    return tokenize_records(records, tokenizer, template, max_seq_len, source)


def synthetic_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    responses_per_prompt: int,
    max_seq_len: int,
    template: Template | None = None,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
    num_samples: int | None = None,
) -> SteerLM2Dataset:
    """Templated questions and answers with computable attributes, made on the spot.

    They have log P(a|x,y) only: the run must score them with its start weights
    (`steerlm2.score_with_start_model`).
    """
    count = num_records if num_samples is None else min(num_records, num_samples)
    records = synthetic_records(count, responses_per_prompt, seed, split=split)
    return tokenize_records(records, tokenizer, template, max_seq_len, "the synthetic data set")


def tokenize_records(
    records: list[Record],
    tokenizer: Tokenizer,
    template: Template | None,
    max_seq_len: int,
    source: str,
) -> SteerLM2Dataset:
    """Records as groups; see `SteerLM2Dataset` for what is dropped.

    Raises:
        ValueError: where no group is left.
    """
    template = template or extra_id_template()
    groups = []
    dropped_responses = 0
    for index, record in enumerate(records):
        prompt = _prompt(record, tokenizer, template)
        responses = [
            _compact(encode_response(template, tokenizer, r.value)) for r in record.responses
        ]
        kept = [i for i, r in enumerate(responses) if len(prompt) + len(r) <= max_seq_len]
        dropped_responses += len(responses) - len(kept)
        if len(kept) >= 2:
            group = Group(prompt, [responses[i] for i in kept], index, kept)
            groups.append(_with_stored_log_probs(group, record))
    if not groups:
        raise ValueError(
            f"{source}: none of its {len(records)} records has two responses that fit into "
            f"max_seq_len={max_seq_len} tokens together with their prompt; raise max_seq_len"
        )
    dropped_groups = len(records) - len(groups)
    return SteerLM2Dataset(records, groups, tokenizer, template, dropped_responses, dropped_groups)


def with_log_probs(
    group: Group, *, log_p_response: Sequence[float], log_q: Sequence[float]
) -> Group:
    """The group with these log-probs, and the target weights that follow from them."""
    assert group.log_p_attributes is not None
    values = [torch.tensor(v, dtype=torch.float64) for v in
              (group.log_p_attributes, log_p_response, log_q)]  # fmt: skip
    weights = target_weights(values[0], values[1], values[2], [len(group.responses)])
    return dataclasses.replace(
        group, log_p_response=log_p_response, log_q=log_q, weights=weights.tolist()
    )


@dataclass
class RewardDataset(Sequence[RewardGroup]):
    """Tokenised texts with their labels, or pairs of texts with a preference.

    A text that is longer than `max_seq_len` has lost its beginning.
    """

    groups: list[RewardGroup] = field(default_factory=list)
    num_cut: int = 0
    ignored: set[str] = field(default_factory=set)
    """Labelled attributes that the model's schema doesn't have."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(g.prompt) + max(map(len, g.responses)) for g in self.groups)

    def summary(self) -> str:
        texts = sum(len(group.responses) for group in self.groups)
        what = f"{texts // 2} pairs" if self.groups[0].strength is not None else f"{texts} texts"
        left_out = f"; labels left out: {', '.join(sorted(self.ignored))}" if self.ignored else ""
        return f"{what} (cut at the beginning, being too long: {self.num_cut} texts{left_out})"


@dataclass(frozen=True)
class LabelledText:
    """A response in its conversation, and the values that its label names."""

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

    Every labelled turn of a conversation is a text. As pairs, two lines make one: the same
    conversation with two responses, both labelled with the strength of the preference alone, below
    0 where the first is preferred.

    Args:
        source: a .jsonl or .jsonl.gz file.
        max_seq_len: tokens of a text; a longer one loses its beginning, and is counted.
        schema: attributes of the model. Other labels are left out; those of a regression file are
            the schema's, or the default schema's nine.
        pairs: read preferences instead of attribute values.
        template: defaults to the extra_id template.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming every bad line (the first 10), among them texts without any label of the
            schema, or an empty file.
    """
    problems = LineProblems(source)
    texts = _labelled_texts(source, schema, problems)
    groups = _pairs(texts, problems) if pairs else _texts(texts, schema, problems)
    dataset = RewardDataset()
    for text, responses, labels in groups:
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
        raise ValueError(f"{source} holds no {'pair' if pairs else 'labelled text'}")
    return dataset


def synthetic_attribute_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    responses_per_prompt: int,
    max_seq_len: int,
    schema: AttributeSchema = DEFAULT_SCHEMA,
    template: Template | None = None,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
) -> RewardDataset:
    """The responses of `synthetic_dataset`, labelled with what can be counted in them.

    Raises:
        ValueError: where the schema has neither humor nor verbosity.
    """
    dataset = RewardDataset()
    for record in synthetic_records(num_records, responses_per_prompt, seed, split=split):
        for response in record.responses:
            scores = response.scores or {}
            labels = [[scores.get(name, NOT_LABELLED) for name in schema.names]]
            if set(labels[0]) == {NOT_LABELLED}:
                raise ValueError(
                    f"the synthetic data is labelled with {', '.join(scores)}, none of which "
                    "is in schema.names"
                )
            group, num_cut = encode_for_scoring(
                template or extra_id_template(),
                tokenizer,
                record.system,
                record.prompt_turns,
                [response.value],
                max_seq_len,
            )
            dataset.groups.append(dataclasses.replace(group, labels=labels))
            dataset.num_cut += num_cut
    return dataset


_Texts = tuple[LabelledText, list[str], list[list[float]] | None]
"""A text with the responses that share its conversation, and their labels (None for a pair)."""


def _labelled_texts(
    source: str, schema: AttributeSchema, problems: LineProblems
) -> Iterator[LabelledText]:
    for line, obj in iter_json_lines(source, problems):
        try:
            if isinstance(obj, dict) and "text" in obj:
                yield _regression_text(obj, schema, line)
            else:
                conversation = parse_conversation(obj)
                labelled = [i for i, turn in enumerate(conversation.turns) if turn.label]
                if not labelled:
                    raise ValueError("no turn has a label")
                for i in labelled:
                    turn = conversation.turns[i]
                    values = {k: float(v) for k, v in parse_label(str(turn.label)).items()}
                    before = conversation.turns[:i]
                    yield LabelledText(conversation.system, before, turn.value, values, line)
        except ValueError as error:
            problems.add(line, str(error))


def _regression_text(obj: dict[str, Any], schema: AttributeSchema, line: int) -> LabelledText:
    text, label = obj["text"], obj.get("label")
    if not isinstance(text, str):
        raise ValueError("'text' must be text")
    system, turns = parse_regression_text(text)
    names = schema.names
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
        known = [value for value in labels if value != NOT_LABELLED]
        outside = [v for v in known if not schema.min_value <= v <= schema.max_value]
        if not known:
            problems.add(
                text.line,
                f"nothing of {', '.join(schema.names)} is labelled in the text that ends with "
                f"{text.response[-40:]!r}",
            )
        elif outside:
            allowed = f"{schema.min_value} to {schema.max_value}"
            problems.add(text.line, f"labels must be from {allowed}, got {outside[0]:g}")
        else:
            yield text, [text.response], [labels]


def _pairs(texts: Iterable[LabelledText], problems: LineProblems) -> Iterator[_Texts]:
    first = None
    for text in texts:
        if len(text.values) != 1:
            problems.add(
                text.line,
                "a text of a pair must be labelled with the preference strength alone, got "
                f"{', '.join(text.values) or 'nothing'}",
            )
        if first is None:
            first = text
            continue
        pair = (first.system, [(t.role, t.value) for t in first.turns], [*first.values.values()])
        same = (text.system, [(t.role, t.value) for t in text.turns], [*text.values.values()])
        if pair != same:
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


def _prompt(record: Record, tokenizer: Tokenizer, template: Template) -> Sequence[int]:
    return _compact(
        encode_prompt(template, tokenizer, record.system, record.prompt_turns, record.label)
    )


def _compact(tokens: list[int]) -> Sequence[int]:
    """4 bytes a token instead of the 36 of a list: every process holds the whole data set."""
    return array("i", tokens)


def _with_stored_log_probs(group: Group, record: Record) -> Group:
    """The group with the log-probs that its record has for all of its responses."""
    responses = [record.responses[i] for i in group.responses_kept]
    log_p_attributes = _known([r.log_p_attributes for r in responses])
    log_p_response = _known([r.log_p_response for r in responses])
    log_q = _known([r.log_q for r in responses])
    if log_p_attributes is None:
        return group
    group = dataclasses.replace(group, log_p_attributes=log_p_attributes)
    if log_p_response is None or log_q is None:
        return group
    return with_log_probs(group, log_p_response=log_p_response, log_q=log_q)


def _known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
