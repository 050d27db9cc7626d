"""Packed sequences: which tokens attend to which, and which predict which.

A group is drawn as "prompt|response response ...", a letter a token. The last token of a response
(the stop token) is predicted but is no input: "ab|cde f" is packed as a b c d, "g|hi jk lmn" as
g h j l m.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from drawn_groups import group, groups_of_any_size, ids, text, two_groups
from hypothesis import given
from hypothesis import strategies as st

from steerlm2.data.packing import (
    ALIGNMENT,
    PADDING,
    Dialogue,
    Group,
    PackedSequence,
    RewardGroup,
    join_bytes,
    pack,
    pack_dialogues,
    pack_for_reward,
    split_bytes,
)


def test_packed_sequence_holds_prompts_and_responses_without_their_stop_tokens() -> None:
    assert text(pack(two_groups()).tokens_T) == "abcd" + "ghjlm"


def test_positions_restart_after_the_prompt_for_every_response() -> None:
    """a b c d: 0 1 2 3 (f has no input). g: 0, then h, j and l m each from 1 on."""
    assert pack(two_groups()).input_pos_T.tolist() == [0, 1, 2, 3, 0, 1, 1, 1, 2]


def test_every_response_token_is_a_target() -> None:
    assert text(pack(two_groups()).targets_R) == "cdef" + "hijklmn"


def test_targets_are_predicted_by_the_token_before_them() -> None:
    """c, f by the last prompt token b; d by c; e by d. h, j, l by g; i by h; k by j; m by l..."""
    batch = pack(two_groups())
    assert text(batch.tokens_T[batch.source_R]) == "bcdb" + "ghgjglm"


def test_targets_know_their_response() -> None:
    """Responses are numbered in the packed sequence: cde 0, f 1, hi 2, jk 3, lmn 4."""
    assert pack(two_groups()).response_R.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4]


def test_response_lengths_count_the_stop_token() -> None:
    assert pack(two_groups()).response_lengths_N.tolist() == [3, 1, 2, 2, 3]


def test_group_sizes_are_the_numbers_of_responses() -> None:
    assert pack(two_groups()).sizes_G.tolist() == [2, 3]


def test_mask_shows_a_token_its_prompt_and_its_own_response() -> None:
    """abcd ghjlm and 3 tokens of padding to 12 = 3 * 4. A token attends to earlier ones of its own
    group: prompts to the prompt only, h j and lm to g and to themselves, not to each other.
    """
    drawn = [
        "x...........",
        "xx..........",
        "xxx.........",
        "xxxx........",
        "....x.......",
        "....xx......",
        "....x.x.....",
        "....x..x....",
        "....x..xx...",
        ".........x..",
        ".........xx.",
        ".........xxx",
    ]
    mask_TT = pack(two_groups(), multiple_of=4).attention_mask_TT()
    assert ["".join(".x"[seen] for seen in query) for query in mask_TT.tolist()] == drawn


def test_mask_separates_responses_of_one_group_that_follow_each_other() -> None:
    """ab | cde fgh -> a b c d f g: f g see a b and themselves, not c d."""
    mask_TT = pack([group("ab|cde fgh")]).attention_mask_TT()
    assert mask_TT[4:].tolist() == [
        [True, True, False, False, True, False],
        [True, True, False, False, True, True],
    ]


@pytest.mark.parametrize(("multiple_of", "length"), [(1, 9), (2, 10), (3, 9), (4, 12), (16, 16)])
def test_packed_sequence_is_padded_to_a_multiple(multiple_of: int, length: int) -> None:
    """9 tokens."""
    batch = pack(two_groups(), pad_id=7, multiple_of=multiple_of)
    assert batch.tokens_T[9:].tolist() == [7] * (length - 9)
    assert batch.group_T[9:].tolist() == [PADDING] * (length - 9)


def test_num_tokens_leaves_padding_out() -> None:
    assert int((pack(two_groups(), multiple_of=16).group_T != PADDING).sum()) == 9


def test_packed_sequence_without_groups_is_padding() -> None:
    """Two multiples, so that every tensor-parallel rank has two tokens; no responses."""
    batch = pack([], multiple_of=4)
    assert batch.group_T.tolist() == [PADDING] * 8
    assert (batch.num_responses, batch.sizes_G.tolist()) == (0, [])
    assert len(batch.targets_R) == len(batch.source_R) == len(batch.response_R) == 0


def test_padding_sees_something() -> None:
    """A query without any key would make the softmax NaN."""
    assert pack([], multiple_of=4).attention_mask_TT().any(dim=1).all()


def test_log_probs_and_weights_stand_in_the_order_of_the_responses() -> None:
    batch = pack(
        [
            group("ab|cde f", log_q=[-1.0, -2.0], weights=[0.25, 0.75]),
            group("g|hi jk lmn", log_q=[-3.0, -4.0, -5.0], weights=[0.5, 0.25, 0.25]),
        ]
    )
    assert batch.log_q_N is not None
    assert batch.w_N is not None
    assert batch.log_q_N.tolist() == [-1, -2, -3, -4, -5]
    assert batch.w_N.tolist() == [0.25, 0.75, 0.5, 0.25, 0.25]


def test_log_probs_and_weights_are_unknown_where_one_group_lacks_them() -> None:
    known = group("ab|cde f", log_q=[-1.0, -2.0], weights=[0.25, 0.75])
    batch = pack([known, group("g|hi jk")])
    assert batch.log_q_N is None
    assert batch.w_N is None


def test_empty_packed_sequence_has_log_probs_and_weights_of_length_zero() -> None:
    """A loss of no groups takes them as it takes any others."""
    batch = pack([])
    assert batch.log_q_N is not None
    assert batch.w_N is not None
    assert (batch.log_q_N.shape, batch.w_N.shape) == ((0,), (0,))


def test_to_moves_every_tensor() -> None:
    batch = pack([group("ab|cde f", log_q=[-1.0, -2.0], weights=[0.25, 0.75])]).to(
        torch.device("meta")
    )
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 12
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@given(groups_of_any_size)
def test_a_groups_token_count_is_its_length_in_a_packed_sequence(groups: list[Group]) -> None:
    batch = pack(groups)
    assert int((batch.group_T != PADDING).sum()) == sum(group.num_tokens for group in groups)


def test_slices_share_the_prompt_and_divide_the_responses() -> None:
    """5 responses in slices of 2: 2, 2 and 1."""
    parts = group("ab|c d e f g", index=3).slices(2)
    assert [(text(p.prompt), [text(r) for r in p.responses]) for p in parts] == [
        ("ab", ["c", "d"]),
        ("ab", ["e", "f"]),
        ("ab", ["g"]),
    ]
    assert [(p.index, list(p.responses_kept)) for p in parts] == [
        (3, [0, 1]),
        (3, [2, 3]),
        (3, [4]),
    ]


def test_slices_within_a_token_budget() -> None:
    """Prompt 2, inputs of cde 2, fgh 2, i 0, jkl 2; budget 6: 2+2+2+0 = 6, then 2+2 = 4."""
    parts = group("ab|cde fgh i jkl").slices_within(6)
    assert [[text(r) for r in p.responses] for p in parts] == [["cde", "fgh", "i"], ["jkl"]]


@given(groups_of_any_size, st.integers(1, 20))
def test_slices_within_cover_all_responses_once_in_order(groups: list[Group], budget: int) -> None:
    for whole in groups:
        indices = [i for part in whole.slices_within(budget) for i in part.responses_kept]
        assert indices == list(range(len(whole.responses)))


@given(groups_of_any_size, st.integers(1, 20))
def test_slices_within_keep_to_the_budget_or_are_single_responses(
    groups: list[Group], budget: int
) -> None:
    for whole in groups:
        for part in whole.slices_within(budget):
            assert part.num_tokens <= budget or len(part.responses) == 1


@given(groups_of_any_size, st.integers(1, 20))
def test_slices_within_are_as_long_as_they_can_be(groups: list[Group], budget: int) -> None:
    """The next slice's first response would not have fitted in."""
    for whole in groups:
        parts = whole.slices_within(budget)
        for part, following in itertools.pairwise(parts):
            assert part.num_tokens + len(following.responses[0]) - 1 > budget


@given(groups_of_any_size)
def test_pairs_are_those_of_the_mask(groups: list[Group]) -> None:
    assert sum(group.num_pairs for group in groups) == _num_unmasked_pairs(pack(groups))
    reward_groups = [RewardGroup(g.prompt, g.responses) for g in groups]
    assert sum(g.num_pairs for g in reward_groups) == _num_unmasked_pairs(
        pack_for_reward(reward_groups)
    )


def _num_unmasked_pairs(batch: PackedSequence) -> int:
    return int((batch.attention_mask_TT() & (batch.group_T != PADDING)).sum())


def test_pairs_of_a_conversation_are_a_triangle() -> None:
    """5 tokens, 4 of them inputs: 1 + 2 + 3 + 4."""
    assert Dialogue([1, 2, 3, 4, 5], [4]).num_pairs == 10


def reward_group(drawn: str, index: int = 0, **values: Any) -> RewardGroup:
    prompt, responses = drawn.split("|")
    return RewardGroup(
        ids(prompt), [ids(response) for response in responses.split()], index, **values
    )


def two_reward_groups() -> list[RewardGroup]:
    return [reward_group("ab|cde f"), reward_group("g|hi jk lmn")]


def test_packed_reward_groups_hold_every_token_of_every_response() -> None:
    assert text(pack_for_reward(two_reward_groups()).tokens_T) == "abcdef" + "ghijklmn"


def test_scores_are_read_at_the_last_token_of_each_response() -> None:
    batch = pack_for_reward(two_reward_groups(), multiple_of=16)
    assert text(batch.tokens_T[batch.score_position_N]) == "ef" + "ikn"


def test_positions_of_packed_reward_groups_restart_after_the_prompt() -> None:
    """ab 0 1, cde 2 3 4, f 2; g 0, hi 1 2, jk 1 2, lmn 1 2 3."""
    positions = pack_for_reward(two_reward_groups()).input_pos_T.tolist()
    assert positions == [0, 1, 2, 3, 4, 2, 0, 1, 2, 1, 2, 1, 2, 3]


def test_reward_mask_shows_a_token_its_prompt_and_its_own_response() -> None:
    """ab cde f, and two tokens of padding."""
    drawn = [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xx...x..",
        "......x.",
        "......xx",
    ]
    batch = pack_for_reward([reward_group("ab|cde f")], multiple_of=8)
    assert ["".join(".x"[s] for s in seen) for seen in batch.attention_mask_TT().tolist()] == drawn


def test_a_response_may_stand_without_a_prompt() -> None:
    """A text that was cut down to its response: |ab sees itself alone."""
    batch = pack_for_reward([reward_group("|ab"), reward_group("c|d")])
    assert text(batch.tokens_T[batch.score_position_N]) == "bd"
    assert batch.attention_mask_TT().int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_labels_stand_in_the_order_of_the_responses() -> None:
    first = reward_group("ab|cde f", labels=[[1.0, -100.0], [2.0, 3.0]])
    batch = pack_for_reward([first, reward_group("g|h", labels=[[4.0, 0.0]])])
    assert batch.labels_NA is not None
    assert batch.labels_NA.tolist() == [[1, -100], [2, 3], [4, 0]]
    assert batch.strength_G is None


def test_strengths_stand_in_the_order_of_the_pairs() -> None:
    """A tie is a strength of 0, not one that is missing."""
    pairs = [reward_group("a|b c", strength=-3.0), reward_group("d|e f", strength=0.0)]
    batch = pack_for_reward(pairs)
    assert batch.strength_G is not None
    assert batch.strength_G.tolist() == [-3, 0]
    assert batch.labels_NA is None


def test_empty_packed_reward_groups_have_no_responses() -> None:
    batch = pack_for_reward([], multiple_of=2)
    assert batch.group_T.tolist() == [PADDING] * 4
    assert batch.labels_NA is not None
    assert batch.strength_G is not None
    assert len(batch.score_position_N) == len(batch.labels_NA) == len(batch.strength_G) == 0


def test_num_tokens_of_a_reward_group_are_those_when_packed() -> None:
    for made in two_reward_groups():
        assert made.num_tokens == len(pack_for_reward([made]).tokens_T)


def test_slices_within_a_budget() -> None:
    """Prompt of 2, responses of 3, 1, 2 and 9 tokens; at most 7 tokens with the prompt: 2 + 3 + 1,
    2 + 2, and the 9 alone, over the budget. They keep their indices and their group's number.
    """
    made = reward_group("ab|cde f gh ijklmnopq", index=7)
    parts = made.slices_within(7)
    held = [" ".join(map(text, part.responses)) for part in parts]
    assert held == ["cde f", "gh", "ijklmnopq"]
    assert [list(part.responses_kept) for part in parts] == [[0, 1], [2], [3]]
    assert {part.index for part in parts} == {7}
    assert {type(part) for part in parts} == {RewardGroup}


def dialogue(drawn: str) -> Dialogue:
    """ "ab[cd]e[f]": the conversation a b c d e f, of which c, d and f are to be predicted."""
    tokens, targets, inside = [], [], False
    for letter in drawn:
        if letter in "[]":
            inside = letter == "["
        else:
            targets += [len(tokens)] if inside else []
            tokens.append(ord(letter))
    return Dialogue(tokens, targets)


def two_dialogues() -> list[Dialogue]:
    return [dialogue("ab[cd]e[f]"), dialogue("g[h]")]


def test_packed_conversations_leave_out_their_last_tokens() -> None:
    """f and h predict nothing."""
    batch = pack_dialogues(two_dialogues())
    assert text(batch.tokens_T) == "abcde" + "g"
    assert sum(each.num_tokens for each in two_dialogues()) == len(batch.tokens_T)


def test_targets_of_conversations_are_predicted_by_the_token_before_them() -> None:
    """b predicts c, c d, e f; g h."""
    batch = pack_dialogues(two_dialogues())
    assert text(batch.targets_R) == "cdf" + "h"
    assert text(batch.tokens_T[batch.source_R]) == "bce" + "g"


def test_packed_conversations_start_at_position_0_and_see_themselves_only() -> None:
    """abcde and g, and 2 tokens of padding to 8 = 2 * 4, left out of the drawing."""
    batch = pack_dialogues(two_dialogues(), multiple_of=4)
    assert batch.input_pos_T[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert batch.group_T.tolist() == [0] * 5 + [1] + [PADDING] * 2
    drawn = ["x.....", "xx....", "xxx...", "xxxx..", "xxxxx.", ".....x"]
    mask_TT = batch.attention_mask_TT()[:6, :6]
    assert ["".join(".x"[seen] for seen in each) for each in mask_TT.tolist()] == drawn


def test_packed_sequence_without_conversations_is_padding_without_targets() -> None:
    batch = pack_dialogues([], multiple_of=4)
    assert batch.group_T.tolist() == [PADDING] * 8
    assert len(batch.targets_R) == len(batch.source_R) == 0


@pytest.mark.parametrize(
    "batch",
    [
        pack([group("ab|cde f", log_q=[-1.5, -2.5], weights=[0.25, 0.75]), group("g|hi jk lmn")]),
        pack([], multiple_of=4),
        pack_for_reward([RewardGroup([1, 2], [[3], [4, 5]], labels=[[0.5], [1.5]])]),
        pack_dialogues([Dialogue([1, 2, 3], [1])]),
    ],
    ids=["groups", "empty", "attribute model", "conversation"],
)
def test_one_copy_to_a_gpu_has_all_tensors(batch: PackedSequence) -> None:
    """Bit for bit, each where compiled kernels take it as it is."""
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    joined = join_bytes(tensors)
    for part, tensor in zip(split_bytes(joined, tensors), tensors, strict=True):
        assert (part.dtype, part.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(part, tensor)
        assert part.storage_offset() * part.element_size() % ALIGNMENT == 0


def test_tensors_of_other_sizes_are_joined_too() -> None:
    """Single bytes, a part of a larger tensor, a number."""
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(12, dtype=torch.float32).view(3, 4)[:, 1::2],
        torch.tensor(7),
    ]
    parts = split_bytes(join_bytes(tensors), tensors)
    assert all(map(torch.equal, parts, tensors))
