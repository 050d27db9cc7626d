"""Packed sequences compute what a model computes for one response at a time: log-probs, attribute
scores, and their gradients.

Dimension letters: N responses, V vocabulary, T tokens, A attributes, D hidden.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.data.packing import (
    Dialogue,
    Group,
    RewardGroup,
    pack,
    pack_dialogues,
    pack_for_reward,
)
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.losses import SteerLM2Loss, squared_error_sum
from steerlm2.models.decoders import end_at_hidden_states
from steerlm2.models.reward_head import add_reward_head, classification_config
from steerlm2.training.forward import (
    attribute_scores,
    response_logps,
    score_attributes,
    score_groups,
    target_logps,
)
from steerlm2.training.step_plan import Strategy, plan_step

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
    batch = pack(groups)
    assert batch.log_q_N is not None
    assert batch.w_N is not None
    return SteerLM2Loss()(
        logps_N, batch.log_q_N, batch.w_N, batch.sizes_G, batch.response_lengths_N
    )


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
    """One batch; groups in slices; every response alone. Largest groups are computed first."""
    scores = score_groups(packed_decoder, groups, CPU, max_tokens_per_microbatch=budget)
    assert [len(group) for group in scores] == [3, 2, 5]
    expected_N = response_logps(packed_decoder, pack(groups), CPU)
    flat_N = torch.tensor([score for group in scores for score in group], dtype=torch.float64)
    torch.testing.assert_close(flat_N, expected_N, rtol=1e-5, atol=1e-5)


def test_scoring_pads_as_the_device_needs(
    packed_decoder: TransformerDecoder, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scores stay; another test of padding looks at the log-probs themselves."""
    expected = score_groups(packed_decoder, groups, CPU, max_tokens_per_microbatch=80)
    monkeypatch.setattr(World, "padding_multiple", 128)
    lengths = []
    hook = packed_decoder.register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    padded = score_groups(packed_decoder, groups, CPU, max_tokens_per_microbatch=80)
    hook.remove()
    assert lengths
    assert all(length % 128 == 0 for length in lengths)
    for padded_N, expected_N in zip(padded, expected, strict=True):
        assert padded_N == pytest.approx(expected_N, rel=1e-6)


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


# Supervised fine-tuning


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    """Answers at the end, in several turns, everywhere; the shortest there can be."""
    generator = torch.Generator().manual_seed(2)
    shapes: list[tuple[int, list[int]]] = [
        (30, [*range(25, 30)]),
        (2, [1]),
        (64, [*range(5, 9), *range(20, 21), *range(60, 64)]),
        (40, [*range(1, 40)]),
    ]
    return [
        Dialogue(torch.randint(512, (length,), generator=generator).tolist(), places, index)
        for index, (length, places) in enumerate(shapes)
    ]


def targets_one_at_a_time(
    logits_of: Callable[[Tensor], Tensor], dialogues: list[Dialogue]
) -> Tensor:
    """[R] log-softmax of plain causal logits over each whole conversation, float64."""
    logps = []
    for dialogue in dialogues:
        tokens_T = torch.tensor(dialogue.tokens)
        logps_TV = logits_of(tokens_T[None])[0].double().log_softmax(dim=1)
        logps += [
            logps_TV[position - 1, tokens_T[position]] for position in dialogue.target_positions
        ]
    return torch.stack(logps)


@pytest.mark.parametrize("multiple_of", [1, 64])
@torch.no_grad()
def test_packed_targets_equal_one_conversation_at_a_time(
    decoder: TransformerDecoder,
    packed_decoder: TransformerDecoder,
    dialogues: list[Dialogue],
    multiple_of: int,
) -> None:
    """fp32, 1e-5 nats a token; with padding too."""
    batch = pack_dialogues(dialogues, multiple_of=multiple_of)
    logps_R = target_logps(packed_decoder, batch, CPU)
    expected_R = targets_one_at_a_time(decoder, dialogues)
    torch.testing.assert_close(logps_R.double(), expected_R, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_targets_are_transformers(
    decoder: TransformerDecoder,
    packed_decoder: TransformerDecoder,
    dialogues: list[Dialogue],
    tmp_path: Path,
) -> None:
    """The exported folder in transformers, one conversation at a time: 1e-4 nats a token, fp32."""
    checkpointer = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=0, output_dir=str(tmp_path))
    checkpointer.save_checkpoint({"model": decoder.state_dict()}, epoch=1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_1", dtype=torch.float32).eval()
    expected_R = targets_one_at_a_time(lambda tokens_1T: theirs(tokens_1T).logits, dialogues)
    logps_R = target_logps(packed_decoder, pack_dialogues(dialogues), CPU)
    torch.testing.assert_close(logps_R.double(), expected_R, rtol=0, atol=1e-4)


def test_gradients_of_targets_equal_one_conversation_at_a_time(
    decoder: TransformerDecoder, packed_decoder: TransformerDecoder, dialogues: list[Dialogue]
) -> None:
    """Of the mean over all targets; in two micro-batches, the mean is of both together."""
    count = sum(len(dialogue.target_positions) for dialogue in dialogues)
    (-targets_one_at_a_time(decoder, dialogues).mean()).backward()
    for part in (dialogues[:3], dialogues[3:]):
        (-target_logps(packed_decoder, pack_dialogues(part), CPU).sum() / count).backward()
    assert_same_gradients(gradients(packed_decoder), gradients(decoder))


def test_a_row_without_conversations_has_zero_gradients(
    packed_decoder: TransformerDecoder,
) -> None:
    logps_R = target_logps(packed_decoder, pack_dialogues([]), CPU)
    assert logps_R.shape == (0,)
    (-logps_R.double().sum() / 7).backward()
    assert all((gradient == 0).all() for gradient in gradients(packed_decoder).values())


# Attribute models


REWARD_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 16_384,
    "rope_base": 10_000,
    "intermediate_dim": 96,
}
BACKBONES = {"llama3": llama3, "llama3_1": llama3_1, "llama3_2": llama3_2}
NUM_ATTRIBUTES = 3


def attribute_decoder(builder: Callable[..., TransformerDecoder] = llama3) -> TransformerDecoder:
    """Weights so large that every part of it matters: norms aren't 1, attention isn't uniform."""
    torch.manual_seed(0)
    made = builder(**REWARD_SIZES).eval()
    add_reward_head(made, NUM_ATTRIBUTES)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return made


@pytest.fixture(scope="module")
def reward_groups() -> list[RewardGroup]:
    """3 groups of 3, 1 and 2 responses. A prompt of 700 tokens: so long that the scaling of RoPE
    in Llama 3.1, which turns the slow dimensions slower, is seen; and no prompt at all.
    """
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 512, (count,), generator=generator).tolist()

    shapes = ((700, (50, 1, 17)), (0, (9,)), (30, (40, 5)))
    return [
        RewardGroup(tokens(prompt), [tokens(length) for length in lengths], index)
        for index, (prompt, lengths) in enumerate(shapes)
    ]


def flat(scored: list[list[list[float]]]) -> Tensor:
    return torch.tensor([scores for group in scored for scores in group])


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_scores_are_transformers(
    name: str, reward_groups: list[RewardGroup], tmp_path: Path
) -> None:
    """LlamaForSequenceClassification of the exported folder, one whole text at a time, against
    packed ones with a shared prompt: fp32, scores of size 1, 1e-5. llama3_2's embeddings were tied.
    """
    made = attribute_decoder(BACKBONES[name])
    checkpointer = ScratchCheckpointer(made, tiny_tokenizer(), seed=0, output_dir=str(tmp_path))
    checkpointer.hf_config |= classification_config([f"a{i}" for i in range(NUM_ATTRIBUTES)])
    checkpointer.set_pad_token(0, TrainedText(tiny_tokenizer(), extra_id_template()))
    checkpointer.save_checkpoint({"model": made.state_dict()}, epoch=1)
    theirs, report = LlamaForSequenceClassification.from_pretrained(
        tmp_path / "epoch_1", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    expected_NA = torch.cat(
        [
            theirs.eval()(torch.tensor([[*group.prompt, *response]])).logits
            for group in reward_groups
            for response in group.responses
        ]
    )
    end_at_hidden_states(made)
    scores_NA = attribute_scores(made, pack_for_reward(reward_groups))
    torch.testing.assert_close(scores_NA, expected_NA, rtol=1e-5, atol=1e-5)
    assert expected_NA.std() > 0.3


@pytest.fixture(scope="module")
def attribute_model() -> TransformerDecoder:
    made = attribute_decoder()
    end_at_hidden_states(made)
    return made


@pytest.fixture(scope="module")
@torch.no_grad()
def unpacked_scores(
    attribute_model: TransformerDecoder, reward_groups: list[RewardGroup]
) -> Tensor:
    """[N, A] plain causal forwards, one text at a time: final hidden state times the head."""
    last_ND = [
        attribute_model(torch.tensor([[*group.prompt, *response]]))[0, -1]
        for group in reward_groups
        for response in group.responses
    ]
    return torch.stack(last_ND) @ attribute_model.output.weight.T


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@torch.no_grad()
def test_the_order_of_groups_in_a_row_changes_no_score(
    order: tuple[int, ...],
    attribute_model: TransformerDecoder,
    reward_groups: list[RewardGroup],
    unpacked_scores: Tensor,
) -> None:
    batch = pack_for_reward([reward_groups[g] for g in order], multiple_of=16)
    expected = [unpacked_scores.split([3, 1, 2])[g] for g in order]
    torch.testing.assert_close(
        attribute_scores(attribute_model, batch), torch.cat(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("budget", [10_000, 770, 720, 1])
def test_scores_stand_in_the_groups_order_under_any_token_budget(
    budget: int,
    attribute_model: TransformerDecoder,
    reward_groups: list[RewardGroup],
    unpacked_scores: Tensor,
) -> None:
    """One batch; one for the largest group (768 tokens); that group in slices; each text alone."""
    scored = score_attributes(attribute_model, reward_groups, CPU, max_tokens_per_microbatch=budget)
    assert [len(group) for group in scored] == [3, 1, 2]
    torch.testing.assert_close(flat(scored), unpacked_scores, rtol=1e-5, atol=1e-5)


def test_no_groups_have_no_attribute_scores(attribute_model: TransformerDecoder) -> None:
    assert score_attributes(attribute_model, [], CPU, max_tokens_per_microbatch=10) == []


def test_scoring_keeps_no_graph(
    attribute_model: TransformerDecoder, reward_groups: list[RewardGroup]
) -> None:
    """It would hold the activations of a whole validation set."""
    calls: list[bool] = []
    handle = attribute_model.norm.register_forward_hook(
        lambda module, inputs, output: calls.append(output.requires_grad)
    )
    score_attributes(attribute_model, reward_groups[1:], CPU, max_tokens_per_microbatch=1000)
    handle.remove()
    assert calls == [False]


def test_gradients_of_packed_scores_equal_one_text_at_a_time(
    attribute_model: TransformerDecoder, reward_groups: list[RewardGroup]
) -> None:
    """d sum_ij (score_ij - label_ij)^2 / d every parameter, head and backbone: by autograd over
    whole texts, each with its own copy of the prompt; and packed, in two micro-batches.
    """
    labels_NA = torch.arange(18.0).view(6, 3) % 5
    total = torch.zeros(())
    texts = [[*g.prompt, *r] for g in reward_groups for r in g.responses]
    for tokens, labels_A in zip(texts, labels_NA, strict=True):
        hidden_TD = attribute_model(torch.tensor([tokens]))[0]
        total = total + (attribute_model.output(hidden_TD[-1]) - labels_A).square().sum()
    total.backward()
    expected = gradients(attribute_model)
    for part, labels in ((slice(0, 1), labels_NA[:3]), (slice(1, 3), labels_NA[3:])):
        batch = pack_for_reward(reward_groups[part], multiple_of=4)
        squared_error_sum(attribute_scores(attribute_model, batch), labels).backward()
    assert_same_gradients(gradients(attribute_model), expected)


def test_an_empty_reward_row_has_no_scores_and_zero_gradients(
    attribute_model: TransformerDecoder,
) -> None:
    """A rank without groups takes part in a backward and adds nothing to any parameter."""
    batch = pack_for_reward([])
    scores_NA = attribute_scores(attribute_model, batch)
    assert scores_NA.shape == (0, NUM_ATTRIBUTES)
    assert batch.labels_NA is not None
    squared_error_sum(scores_NA, batch.labels_NA).backward()
    assert all((gradient == 0).all() for gradient in gradients(attribute_model).values())


@torch.no_grad()
def test_scores_of_a_bfloat16_model_are_float32(reward_groups: list[RewardGroup]) -> None:
    """The head's product isn't rounded to bfloat16's 8 bits: scores near 2 would step by 1/64."""
    made = attribute_decoder().bfloat16()
    end_at_hidden_states(made)
    scores_NA = attribute_scores(made, pack_for_reward(reward_groups))
    assert scores_NA.dtype == torch.float32
    assert (scores_NA != scores_NA.bfloat16().float()).any()
