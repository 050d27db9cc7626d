"""Packed rows compute what a model computes for one response at a time: log-probs and gradients.

Dimension letters: N responses, V vocabulary, T tokens.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import Group, Strategy, pack, plan_step
from steerlm2.losses import SteerLM2Loss
from steerlm2.models.llama import end_at_hidden_states
from steerlm2.training.distributed import World
from steerlm2.training.forward import response_logps, score_groups

CPU = World(torch.device("cpu"))
MAX_SEQ_LEN = 64

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def decoder() -> TransformerDecoder:
    """The tiny recipe's Llama, with weights large enough to make attention far from uniform."""
    torch.manual_seed(0)
    decoder = llama3(
        vocab_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=128,
        max_seq_len=2048,
        rope_base=10_000,
        intermediate_dim=384,
    )
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return decoder


@pytest.fixture(scope="module")
def packed_decoder(decoder: TransformerDecoder) -> TransformerDecoder:
    packed = copy.deepcopy(decoder)
    end_at_hidden_states(packed)
    return packed


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    """3 groups of 3, 2 and 5 responses; lengths from 1 token (the stop token alone) to what fits
    into 64 tokens together with the prompt.
    """
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(512, (count,), generator=generator).tolist()

    made: list[Group] = []
    for prompt, lengths in ((5, (1, 59, 7)), (20, (44, 1)), (1, (2, 63, 1, 30, 3))):
        assert prompt + max(lengths) == MAX_SEQ_LEN
        made.append(
            Group(
                tokens(prompt),
                [tokens(length) for length in lengths],
                index=len(made),
                log_q=(-6.0 * torch.tensor(lengths)).tolist(),
                weights=torch.rand(len(lengths), generator=generator).softmax(dim=0).tolist(),
            )
        )
    return made


def one_at_a_time(decoder: TransformerDecoder, groups: list[Group]) -> Tensor:
    """[N] of each response by itself: log-softmax of plain causal logits over prompt + response."""
    sums = []
    for group in groups:
        for response in group.responses:
            logits_TV = decoder(torch.tensor([[*group.prompt, *response]]))[0].double()
            logps_TV = logits_TV[len(group.prompt) - 1 : -1].log_softmax(dim=1)
            sums.append(logps_TV.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def loss_of(logps_N: Tensor, groups: list[Group]) -> Tensor:
    row = pack(groups)
    assert row.log_q_N is not None
    assert row.w_N is not None
    return SteerLM2Loss()(logps_N, row.log_q_N, row.w_N, row.group_sizes, row.response_lengths_N)


def gradients(decoder: TransformerDecoder) -> Gradients:
    """What has been added up, taken out of the decoder."""
    found = {}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def gradients_of_step(
    decoder: TransformerDecoder,
    groups: list[Group],
    strategy: Strategy,
    *,
    max_tokens: int = 1000,
    slice_size: int = 2,
) -> Gradients:
    """Of one optimizer step on one rank, micro-batch after micro-batch."""
    plan = plan_step(
        groups,
        rank=0,
        num_ranks=1,
        strategy=strategy,
        max_tokens_per_microbatch=max_tokens,
        micro_batch_size=slice_size,
        forward_micro_batch_size=slice_size + 1,
    )
    for batch in plan.single_pass:
        logps_N = response_logps(decoder, pack(batch), CPU)
        (loss_of(logps_N, batch) * len(batch) / len(groups)).backward()
    for group in plan.two_pass:
        with torch.no_grad():
            parts = [pack([part]) for part in group.slices(slice_size + 1)]
            logps_N = torch.cat([response_logps(decoder, part, CPU) for part in parts])
        logps_N.requires_grad_()
        (grad_N,) = torch.autograd.grad(loss_of(logps_N, [group]) / len(groups), logps_N)
        for part in group.slices(slice_size):
            grad_of_part_N = grad_N[part.responses_kept[0] : part.responses_kept[-1] + 1]
            (response_logps(decoder, pack([part]), CPU) * grad_of_part_N).sum().backward()
    return gradients(decoder)


def assert_same_gradients(actual: Gradients, expected: Gradients) -> None:
    """Relative to the norm of each parameter's gradient: 1e-4."""
    assert actual.keys() == expected.keys()
    for name in expected:
        difference = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-4, f"{name}: {difference}"


@torch.no_grad()
def test_packed_log_probs_equal_one_response_at_a_time(
    decoder: TransformerDecoder, packed_decoder: TransformerDecoder, groups: list[Group]
) -> None:
    """fp32, 1e-5 relative: sums of up to 63 tokens at about 7 nats."""
    logps_N = response_logps(packed_decoder, pack(groups), CPU)
    torch.testing.assert_close(logps_N, one_at_a_time(decoder, groups), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_changes_no_log_prob(
    packed_decoder: TransformerDecoder, groups: list[Group]
) -> None:
    padded = response_logps(packed_decoder, pack(groups, multiple_of=256), CPU)
    torch.testing.assert_close(
        padded, response_logps(packed_decoder, pack(groups), CPU), rtol=1e-6, atol=1e-5
    )


@pytest.fixture(scope="module")
def single_pass(packed_decoder: TransformerDecoder, groups: list[Group]) -> Gradients:
    return gradients_of_step(packed_decoder, groups, "single_pass")


def test_single_pass_gradients_equal_one_response_at_a_time(
    decoder: TransformerDecoder, groups: list[Group], single_pass: Gradients
) -> None:
    loss_of(one_at_a_time(decoder, groups), groups).backward()
    assert_same_gradients(single_pass, gradients(decoder))


@pytest.mark.parametrize("slice_size", [1, 2, 5])
def test_two_pass_gradients_equal_single_pass(
    packed_decoder: TransformerDecoder,
    groups: list[Group],
    single_pass: Gradients,
    slice_size: int,
) -> None:
    """Slices of 1 response, of 2 (the last of 3 and 5 is smaller), of the whole group."""
    two_pass = gradients_of_step(packed_decoder, groups, "two_pass", slice_size=slice_size)
    assert_same_gradients(two_pass, single_pass)


def test_mixed_passes_have_the_gradients_of_single_pass(
    packed_decoder: TransformerDecoder, groups: list[Group], single_pass: Gradients
) -> None:
    """auto with a budget of 80: of 69, 63 and 95 tokens the last takes two passes."""
    assert [group.num_tokens for group in groups] == [69, 63, 95]
    mixed = gradients_of_step(packed_decoder, groups, "auto", max_tokens=80)
    assert_same_gradients(mixed, single_pass)


def test_an_empty_row_has_no_log_probs_and_zero_gradients(
    packed_decoder: TransformerDecoder,
) -> None:
    """A rank without groups takes part in a backward and adds nothing to any parameter."""
    logps_N = response_logps(packed_decoder, pack([]), CPU)
    assert logps_N.shape == (0,)
    SteerLM2Loss()(logps_N, torch.zeros(0), torch.zeros(0), [], []).backward()
    assert all((gradient == 0).all() for gradient in gradients(packed_decoder).values())


@torch.no_grad()
@pytest.mark.parametrize("budget", [1000, 80, 1])
def test_scores_stand_in_the_groups_order_under_any_budget(
    packed_decoder: TransformerDecoder, groups: list[Group], budget: int
) -> None:
    """One row; groups in slices; every response alone. Largest groups are computed first."""
    scores = score_groups(packed_decoder, groups, CPU, max_tokens_per_microbatch=budget)
    assert [len(group) for group in scores] == [3, 2, 5]
    expected_N = response_logps(packed_decoder, pack(groups), CPU)
    flat_N = torch.tensor([score for group in scores for score in group], dtype=torch.float64)
    torch.testing.assert_close(flat_N, expected_N, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_groups_own_numbers(
    packed_decoder: TransformerDecoder, groups: list[Group]
) -> None:
    """The same group twice, under one index: both get their scores."""
    scores = score_groups(
        packed_decoder, [groups[1], groups[1]], CPU, max_tokens_per_microbatch=1000
    )
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_no_groups_have_no_scores(packed_decoder: TransformerDecoder) -> None:
    assert score_groups(packed_decoder, [], CPU, max_tokens_per_microbatch=10) == []
