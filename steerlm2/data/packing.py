"""Packed sequences: prompts with their responses, or conversations, without padding in between.

Dimension letters: T tokens of a packed sequence, R response tokens to predict, N responses,
G groups, A attributes, X attention blocks.

A prompt and its n responses form one packed sequence, [prompt | y_1 | ... | y_n]: the prompt is
computed once instead of n times. Each response attends to the prompt and to itself, and its
position ids continue the prompt's. A response's first token is predicted at the last prompt
position; its last token (the stop token) predicts nothing, so it is a target but no input. A packed
sequence can hold several groups, which don't attend to each other.

For an attribute model a response ends with the token at which its scores are read, so that its last
token is an input too.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from steerlm2.models.attention import attention_blocks

PADDING = -1
"""The group number of padding tokens in `PackedSequence.group_T`."""
ALIGNMENT = 16
"""Bytes; inputs of kernels that Inductor compiles must begin at a multiple, or it copies them."""


class Packable(Protocol):
    """The interface of what packed sequences hold: groups and conversations."""

    @property
    def num_tokens(self) -> int:
        """Input tokens in a packed sequence."""

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and a token that it attends to."""


PackableT = TypeVar("PackableT", bound=Packable)


@dataclass(frozen=True)
class PromptGroup(abc.ABC):
    """One prompt with its tokenised responses.

    `index` is the index of the record in its data set, `responses_kept` the indices of the
    responses in their record.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    index: int = 0
    responses_kept: Sequence[int] = ()

    @property
    @abc.abstractmethod
    def input_lengths(self) -> list[int]:
        """Input tokens of each response in a packed sequence."""

    @property
    def num_tokens(self) -> int:
        """Input tokens of the group in a packed sequence."""
        return len(self.prompt) + sum(self.input_lengths)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and a token that it attends to."""
        prompt = len(self.prompt)
        return _triangle(prompt) + sum(prompt * n + _triangle(n) for n in self.input_lengths)

    def slices(self, size: int) -> list[Self]:
        """The group as groups of at most `size` responses: prompt and responses only.

        Their `index` is this group's; their `responses_kept` are indices of this group's responses.
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
    """A prompt with its responses for SteerLM 2.0: each response ends in the stop token.

    `log_q` and `weights` (w') are None until they are known. `log_proposal` are the log-probs that
    ratios are taken against where that isn't log Q', `drawn` is the number of responses that were
    drawn where the loss corrects for duplicates that were left out; both are None otherwise.
    """

    log_p_attributes: Sequence[float] | None = None
    log_p_response: Sequence[float] | None = None
    log_q: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    log_proposal: Sequence[float] | None = None
    drawn: int | None = None

    @property
    def input_lengths(self) -> list[int]:
        return [len(response) - 1 for response in self.responses]


@dataclass(frozen=True)
class RewardGroup(PromptGroup):
    """A prompt with its responses for an attribute model: each ends in the label-start token.

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

    `target_positions` are the positions of the tokens to be predicted, in ascending order; the
    first is above 0. `index` is the index of the conversation in its data set.
    """

    tokens: Sequence[int]
    target_positions: Sequence[int]
    index: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) - 1  # the last one predicts nothing

    @property
    def num_pairs(self) -> int:
        return _triangle(self.num_tokens)


@dataclass(frozen=True)
class PackedSequence:
    """Groups one after the other, as inputs of a decoder. Without groups it is all padding."""

    tokens_T: Tensor
    """[T] token ids, int64, padding at the end."""
    input_pos_T: Tensor
    """[T] position ids, int64: from 0 in a prompt; each response continues its prompt's."""
    group_T: Tensor
    """[T] index of a token's group in the packed sequence, int64; PADDING for padding."""
    segment_T: Tensor
    """[T] int64: 0 in a prompt, 1 + i in the i-th response of the packed sequence."""
    blocks_X5: Tensor
    """[X, 5] the pairs of `attention_mask_TT` as blocks, int64 (`attention_blocks`)."""

    def attention_mask_TT(self) -> Tensor:
        """Boolean [T, T]: a query (row) attends to a key (column) of its own prompt or segment."""
        position_T = torch.arange(len(self.tokens_T), device=self.tokens_T.device)
        causal_TT = position_T[:, None] >= position_T
        same_group_TT = self.group_T[:, None] == self.group_T
        visible_TT = (self.segment_T == 0) | (self.segment_T[:, None] == self.segment_T)
        return causal_TT & same_group_TT & visible_TT

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, **_tensors_on(device, self))


@dataclass(frozen=True)
class Targets:
    """The arguments of the loss that don't depend on the model, one group after the other."""

    sizes_G: Tensor
    """[G] responses of each group, int64."""
    response_lengths_N: Tensor
    """[N] tokens of each response, its stop token included, int64."""
    log_q_N: Tensor | None
    """[N] log-probs of the proposal, log Q' as a rule, in nats, float64; None where a group doesn't
    have them yet."""
    w_N: Tensor | None
    """[N] weights w', float64; None where a group doesn't have them yet."""
    drawn_G: Tensor | None
    """[G] responses drawn for each group, float64; None where a group doesn't need it."""

    @property
    def num_responses(self) -> int:
        return len(self.response_lengths_N)

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(self, **_tensors_on(device, self))


@dataclass(frozen=True)
class PackedGroups(PackedSequence, Targets):
    """Groups in a packed sequence with the targets of the loss; without groups there are none."""

    source_R: Tensor
    """[R] position in the packed sequence that predicts the target, int64."""
    targets_R: Tensor
    """[R] token ids to be predicted, int64."""
    response_R: Tensor
    """[R] index of the target's response in the packed sequence, int64."""


@dataclass(frozen=True)
class PackedDialogues(PackedSequence):
    """Conversations in a packed sequence with their targets; an empty one has none."""

    source_R: Tensor
    """[R] position in the packed sequence that predicts the target, int64."""
    targets_R: Tensor
    """[R] token ids to be predicted, int64."""


@dataclass(frozen=True)
class PackedRewardGroups(PackedSequence):
    """Groups in a packed sequence for an attribute model; an empty one has no responses."""

    score_position_N: Tensor
    """[N] position of each response's last token, where its scores are read, int64."""
    labels_NA: Tensor | None
    """[N, A] attribute values, float64, NOT_LABELLED where there is none; None where a group has no
    labels."""
    strength_G: Tensor | None
    """[G] strengths of preferences, float64; None where a group has none."""


def targets_of(groups: Sequence[Group]) -> Targets:
    """The targets of groups, in their order."""
    lengths = [len(response) for group in groups for response in group.responses]
    return Targets(
        sizes_G=torch.tensor([len(group.responses) for group in groups], dtype=torch.long),
        response_lengths_N=torch.tensor(lengths, dtype=torch.long),
        log_q_N=_join([group.log_proposal or group.log_q for group in groups]),
        w_N=_join([group.weights for group in groups]),
        drawn_G=_join([None if group.drawn is None else [group.drawn] for group in groups]),
    )


def pack(groups: Sequence[Group], *, pad_id: int = 0, multiple_of: int = 1) -> PackedGroups:
    """Groups in one packed sequence, padded at the end to a multiple of `multiple_of` tokens."""
    source: list[int] = []
    targets: list[int] = []
    response_ids: list[int] = []
    position = 0
    for group in groups:
        position += len(group.prompt)
        prompt_end = position - 1
        for response in group.responses:
            response_ids += [response_ids[-1] + 1 if response_ids else 0] * len(response)
            source += [prompt_end, *range(position, position + len(response) - 1)]
            targets += response
            position += len(response) - 1
    inputs = [(group.prompt, [response[:-1] for response in group.responses]) for group in groups]
    return PackedGroups(
        **vars(targets_of(groups)),
        **vars(_lay_out(inputs, pad_id, multiple_of)),
        source_R=torch.tensor(source, dtype=torch.long),
        targets_R=torch.tensor(targets, dtype=torch.long),
        response_R=torch.tensor(response_ids, dtype=torch.long),
    )


def pack_dialogues(
    dialogues: Sequence[Dialogue], *, pad_id: int = 0, multiple_of: int = 1
) -> PackedDialogues:
    """Conversations in one packed sequence, padded at the end to a multiple of `multiple_of`."""
    source: list[int] = []
    targets: list[int] = []
    start = 0
    for dialogue in dialogues:
        source += [start + position - 1 for position in dialogue.target_positions]
        targets += [dialogue.tokens[position] for position in dialogue.target_positions]
        start += dialogue.num_tokens
    inputs: list[tuple[Sequence[int], list[Sequence[int]]]] = [
        (dialogue.tokens[:-1], []) for dialogue in dialogues
    ]
    return PackedDialogues(
        **vars(_lay_out(inputs, pad_id, multiple_of)),
        source_R=torch.tensor(source, dtype=torch.long),
        targets_R=torch.tensor(targets, dtype=torch.long),
    )


def pack_for_reward(
    groups: Sequence[RewardGroup], *, pad_id: int = 0, multiple_of: int = 1
) -> PackedRewardGroups:
    """Groups to be scored in one packed sequence, padded to a multiple of `multiple_of` tokens."""
    score_positions: list[int] = []
    position = 0
    for group in groups:
        position += len(group.prompt)
        for response in group.responses:
            position += len(response)
            score_positions.append(position - 1)
    labels = [group.labels for group in groups]
    return PackedRewardGroups(
        **vars(_lay_out([(g.prompt, g.responses) for g in groups], pad_id, multiple_of)),
        score_position_N=torch.tensor(score_positions, dtype=torch.long),
        labels_NA=_join(labels),
        strength_G=_join([None if g.strength is None else [g.strength] for g in groups]),
    )


def _lay_out(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int, multiple_of: int
) -> PackedSequence:
    """Lay out prompts, each with the input tokens of its responses, one after the other."""
    tokens: list[int] = []
    positions: list[int] = []
    group_ids: list[int] = []
    segments: list[int] = []
    causal: list[tuple[int, int]] = []
    full_blocks: list[tuple[int, int, int, int]] = []
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
        full_blocks.append((stop, len(tokens), start, stop))
        group_ids += [g] * (len(tokens) - len(group_ids))
    # An empty sequence has two tokens: a compiled model would specialise on a length of one.
    padding = -len(tokens) % multiple_of if tokens else 2 * multiple_of
    causal.append((len(tokens), len(tokens) + padding))
    return PackedSequence(
        tokens_T=torch.tensor(tokens + [pad_id] * padding),
        input_pos_T=torch.tensor(positions + [0] * padding),
        group_T=torch.tensor(group_ids + [PADDING] * padding),
        segment_T=torch.tensor(segments + [0] * padding),
        blocks_X5=attention_blocks(causal, full_blocks),
    )


def _triangle(length: int) -> int:
    """Pairs of a causal sequence."""
    return length * (length + 1) // 2


def _tensors_on(device: torch.device, batch: PackedSequence | Targets) -> dict[str, Any]:
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    if device.type != "cuda":
        return {name: value.to(device) for name, value in tensors.items()}
    # A copy from pageable memory would wait for everything that is queued on the GPU.
    joined = join_bytes(list(tensors.values())).pin_memory().to(device, non_blocking=True)
    parts = split_bytes(joined, list(tensors.values()))
    return dict(zip(tensors, parts, strict=True))


def join_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The contents of tensors in one tensor of bytes, each at a multiple of ALIGNMENT."""
    parts = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors]
    return torch.cat([nn.functional.pad(part, (0, -len(part) % ALIGNMENT)) for part in parts])


def split_bytes(joined: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what `join_bytes` joined, with the types and shapes of the tensors `like`."""
    parts = []
    start = 0
    for tensor in like:
        part = joined[start : start + tensor.nbytes]
        parts.append(part.view(tensor.dtype).view(tensor.shape))
        start += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    return parts


def _join(values: Sequence[Sequence[Any] | None]) -> Tensor | None:
    """The values of all groups in one float64 tensor; None where a group has none."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return torch.tensor([x for v in known for x in v], dtype=torch.float64)
