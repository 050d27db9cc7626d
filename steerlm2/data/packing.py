"""Groups that share their prompt, packed into rows.

Dimension letters: T tokens of a packed row, R response tokens to predict, N responses, G groups,
A attributes.

A prompt and its n responses stand in one row, [prompt | y_1 | ... | y_n]: the prompt is computed
once instead of n times and nothing is padded. Each response attends to the prompt and to itself,
and its positions continue the prompt's. A response's first token is predicted at the last prompt
position; its last token (the stop token) predicts nothing, so it is a target but no input. Several
groups can stand in one row; they don't see each other.

An attribute model reads the same rows with one difference: a response ends with the token at which
its scores are read, so that one is an input too.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from steerlm2.models.attention import attention_blocks

PADDING = -1
"""The group number of padding tokens."""


class Packable(Protocol):
    """What rows are filled with."""

    @property
    def num_tokens(self) -> int:
        """Tokens in a packed row."""

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it sees."""


PackableT = TypeVar("PackableT", bound=Packable)


@dataclass(frozen=True)
class PromptGroup(abc.ABC):
    """One prompt with its tokenised responses.

    `index` is the place of the record in its data set, `responses_kept` the places of the
    responses in their record.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    index: int = 0
    responses_kept: Sequence[int] = ()

    @property
    @abc.abstractmethod
    def input_lengths(self) -> list[int]:
        """Tokens of each response in a packed row."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the group in a packed row."""
        return len(self.prompt) + sum(self.input_lengths)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it sees."""
        prompt = len(self.prompt)
        return _triangle(prompt) + sum(prompt * n + _triangle(n) for n in self.input_lengths)

    def slices(self, size: int) -> list[Self]:
        """The group as groups of at most `size` responses: prompt and responses only.

        Their `index` is this group's; `responses_kept` are places in this group.
        """
        starts = range(0, len(self.responses), size)
        return [self._part(start, min(start + size, len(self.responses))) for start in starts]

    def slices_within(self, max_tokens: int) -> list[Self]:
        """The same by tokens: slices of at most `max_tokens` tokens, or of a single response."""
        parts: list[Self] = []
        start = 0
        for stop in range(1, len(self.responses) + 1):
            if stop == len(self.responses) or (self._part(start, stop + 1).num_tokens > max_tokens):
                parts.append(self._part(start, stop))
                start = stop
        return parts

    def _part(self, start: int, stop: int) -> Self:
        return type(self)(self.prompt, self.responses[start:stop], self.index, range(start, stop))


GroupT = TypeVar("GroupT", bound=PromptGroup)


@dataclass(frozen=True)
class Group(PromptGroup):
    """What SteerLM 2.0 is trained on: each response ends in the stop token.

    `log_q` and `weights` (w') are None until they are known.
    """

    log_p_attributes: Sequence[float] | None = None
    log_p_response: Sequence[float] | None = None
    log_q: Sequence[float] | None = None
    weights: Sequence[float] | None = None

    @property
    def input_lengths(self) -> list[int]:
        return [len(response) - 1 for response in self.responses]


@dataclass(frozen=True)
class RewardGroup(PromptGroup):
    """What an attribute model reads: each response ends in the label-start token.

    `labels` are the attribute values of each response, NOT_LABELLED where there is none; of a pair
    with a preference `strength` is known instead (below 0 the first is preferred).
    """

    labels: Sequence[Sequence[float]] | None = None
    strength: float | None = None

    @property
    def input_lengths(self) -> list[int]:
        return [len(response) for response in self.responses]


@dataclass(frozen=True)
class Dialogue:
    """A conversation as one sequence, for supervised fine-tuning.

    `target_places` are those of the tokens to be predicted, in ascending order; the first is above
    0. `index` is the place of the conversation in its data set.
    """

    tokens: Sequence[int]
    target_places: Sequence[int]
    index: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) - 1  # the last one predicts nothing

    @property
    def num_pairs(self) -> int:
        return _triangle(self.num_tokens)


@dataclass(frozen=True)
class Row:
    """Groups in one row of tokens. An empty row (no groups) is padding."""

    tokens_T: Tensor
    input_pos_T: Tensor
    group_T: Tensor
    """Which group of the row a token is of; PADDING for padding."""
    segment_T: Tensor
    """0 in a prompt, 1 + i in the i-th response of the row."""
    blocks_X5: Tensor
    """`attention_mask_TT` as the pairs to compute (`attention_blocks`)."""

    def attention_mask_TT(self) -> Tensor:
        """Boolean [T, T]: query (row) sees key (column): its own prompt and itself, causally."""
        place_T = torch.arange(len(self.tokens_T), device=self.tokens_T.device)
        causal_TT = place_T[:, None] >= place_T
        same_group_TT = self.group_T[:, None] == self.group_T
        visible_TT = (self.segment_T == 0) | (self.segment_T[:, None] == self.segment_T)
        return causal_TT & same_group_TT & visible_TT

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, **_tensors_on(device, self))


@dataclass(frozen=True)
class Targets:
    """What the loss needs to know of groups, one group after the other."""

    sizes_G: Tensor
    """Responses of each group."""
    response_lengths_N: Tensor
    """Tokens of each response, its stop token included."""
    log_q_N: Tensor | None
    w_N: Tensor | None
    """As `log_q_N` None where a group doesn't have them yet."""

    @property
    def num_responses(self) -> int:
        return len(self.response_lengths_N)

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, **_tensors_on(device, self))


@dataclass(frozen=True)
class PackedRow(Row, Targets):
    """A row of groups with the targets of the loss; none in an empty row."""

    source_R: Tensor
    """Position in the row that predicts the target."""
    targets_R: Tensor
    response_R: Tensor
    """Which response of the row a target belongs to."""


@dataclass(frozen=True)
class DialogueRow(Row):
    """A row of conversations with what is to be predicted; nothing in an empty row."""

    source_R: Tensor
    """Position in the row that predicts the target."""
    targets_R: Tensor


@dataclass(frozen=True)
class RewardRow(Row):
    """A row of groups for an attribute model; an empty one has nothing to read."""

    read_N: Tensor
    """Place of each response's last token."""
    labels_NA: Tensor | None
    strength_G: Tensor | None
    """As `labels_NA` None where a group has none."""


def targets_of(groups: Sequence[Group]) -> Targets:
    """The targets of groups, in their order."""
    lengths = [len(response) for group in groups for response in group.responses]
    return Targets(
        sizes_G=torch.tensor([len(group.responses) for group in groups], dtype=torch.long),
        response_lengths_N=torch.tensor(lengths, dtype=torch.long),
        log_q_N=_join([group.log_q for group in groups]),
        w_N=_join([group.weights for group in groups]),
    )


def pack(groups: Sequence[Group], *, pad_id: int = 0, multiple_of: int = 1) -> PackedRow:
    """Groups as one row, padded at the end to a multiple of `multiple_of` tokens."""
    source: list[int] = []
    targets: list[int] = []
    response_ids: list[int] = []
    place = 0
    for group in groups:
        place += len(group.prompt)
        last_prompt_place = place - 1
        for response in group.responses:
            response_ids += [response_ids[-1] + 1 if response_ids else 0] * len(response)
            source += [last_prompt_place, *range(place, place + len(response) - 1)]
            targets += response
            place += len(response) - 1
    inputs = [(group.prompt, [response[:-1] for response in group.responses]) for group in groups]
    return PackedRow(
        **vars(targets_of(groups)),
        **vars(_row(inputs, pad_id, multiple_of)),
        source_R=torch.tensor(source, dtype=torch.long),
        targets_R=torch.tensor(targets, dtype=torch.long),
        response_R=torch.tensor(response_ids, dtype=torch.long),
    )


def pack_dialogues(
    dialogues: Sequence[Dialogue], *, pad_id: int = 0, multiple_of: int = 1
) -> DialogueRow:
    """Conversations as one row, padded at the end to a multiple of `multiple_of` tokens."""
    source: list[int] = []
    targets: list[int] = []
    start = 0
    for dialogue in dialogues:
        source += [start + place - 1 for place in dialogue.target_places]
        targets += [dialogue.tokens[place] for place in dialogue.target_places]
        start += dialogue.num_tokens
    inputs: list[tuple[Sequence[int], list[Sequence[int]]]] = [
        (dialogue.tokens[:-1], []) for dialogue in dialogues
    ]
    return DialogueRow(
        **vars(_row(inputs, pad_id, multiple_of)),
        source_R=torch.tensor(source, dtype=torch.long),
        targets_R=torch.tensor(targets, dtype=torch.long),
    )


def pack_for_reward(
    groups: Sequence[RewardGroup], *, pad_id: int = 0, multiple_of: int = 1
) -> RewardRow:
    """Groups as one row to be scored, padded at the end to a multiple of `multiple_of` tokens."""
    read: list[int] = []
    place = 0
    for group in groups:
        place += len(group.prompt)
        for response in group.responses:
            place += len(response)
            read.append(place - 1)
    labels = [group.labels for group in groups]
    return RewardRow(
        **vars(_row([(g.prompt, g.responses) for g in groups], pad_id, multiple_of)),
        read_N=torch.tensor(read, dtype=torch.long),
        labels_NA=_join(labels),
        strength_G=_join([None if g.strength is None else [g.strength] for g in groups]),
    )


def _row(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int, multiple_of: int
) -> Row:
    """The layout of prompts and the input tokens of their responses."""
    tokens: list[int] = []
    positions: list[int] = []
    group_ids: list[int] = []
    segments: list[int] = []
    causal: list[tuple[int, int]] = []
    whole: list[tuple[int, int, int, int]] = []
    num_responses = 0
    for g, (prompt, responses) in enumerate(groups):
        start, stop = len(tokens), len(tokens) + len(prompt)
        causal.append((start, stop))
        tokens += prompt
        positions += range(len(prompt))
        segments += [0] * len(prompt)
        for response in responses:
            num_responses += 1
            causal.append((len(tokens), len(tokens) + len(response)))
            tokens += response
            positions += range(len(prompt), len(prompt) + len(response))
            segments += [num_responses] * len(response)
        whole.append((stop, len(tokens), start, stop))
        group_ids += [g] * (len(tokens) - len(group_ids))
    # two tokens for an empty row: a compiled model would specialise on a length of one
    padding = -len(tokens) % multiple_of if tokens else 2 * multiple_of
    causal.append((len(tokens), len(tokens) + padding))
    return Row(
        tokens_T=torch.tensor(tokens + [pad_id] * padding),
        input_pos_T=torch.tensor(positions + [0] * padding),
        group_T=torch.tensor(group_ids + [PADDING] * padding),
        segment_T=torch.tensor(segments + [0] * padding),
        blocks_X5=attention_blocks(causal, whole),
    )


def _triangle(length: int) -> int:
    """Pairs of a causal sequence."""
    return length * (length + 1) // 2


def _tensors_on(device: torch.device, row: Row | Targets) -> dict[str, Any]:
    tensors = {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}
    if device.type != "cuda":
        return {name: value.to(device) for name, value in tensors.items()}
    # From pageable memory it would wait for all that is queued on the GPU.
    return {n: value.pin_memory().to(device, non_blocking=True) for n, value in tensors.items()}


def _join(values: Sequence[Sequence[Any] | None]) -> Tensor | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return torch.tensor([x for v in known for x in v], dtype=torch.float64)
