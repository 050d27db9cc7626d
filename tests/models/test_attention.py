"""Attention by blocks and FlexAttention equal attention under the dense mask, gradients too.

Dimension letters: B sequences, H heads, T tokens of a packed sequence, E size of a head.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)
from torch.profiler import ProfilerActivity, profile
from torchtune.models.llama3 import llama3

from steerlm2.data.packing import (
    Dialogue,
    Group,
    PackedSequence,
    RewardGroup,
    pack,
    pack_dialogues,
    pack_for_reward,
)
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.models import attention
from steerlm2.models.attention import attend, flex_mask
from steerlm2.training.forward import hidden_states

H, E = 3, 8


def tokens(count: int) -> list[int]:
    return list(range(1, count + 1))


def group(prompt: int, *lengths: int) -> Group:
    """Lengths of the inputs: the stop token is a target, but no input."""
    return Group(tokens(prompt), [tokens(length + 1) for length in lengths])


BATCHES: dict[str, PackedSequence] = {
    "one group": pack([group(40, 13, 1, 70)]),
    "groups, a response of the stop token alone, padding": pack(
        [group(5, 0, 30), group(1, 4, 0), group(600, 20, 9)], multiple_of=64
    ),
    "only stop tokens": pack([group(7, 0, 0)]),
    "empty": pack([], multiple_of=2),
    "conversations": pack_dialogues([Dialogue(tokens(n), [1]) for n in (30, 2, 65)]),
    "attribute model, without a prompt": pack_for_reward(
        [RewardGroup([], [tokens(9), tokens(4)]), RewardGroup(tokens(3), [tokens(50)])]
    ),
}


def inputs(batch: PackedSequence, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [B, H, T, E] as torchtune has them, [B, T, H, E] in memory, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, len(batch.tokens_T), H, E)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    return [each.transpose(1, 2) for each in made]


def attended(
    batch: PackedSequence, mask: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of q, k and v."""
    *qkv, grad_BHTE = inputs(batch, dtype)
    leaves = [each.requires_grad_() for each in qkv]
    out_BHTE = attend(*leaves, mask, 0.0, False)
    return out_BHTE.detach(), torch.autograd.grad(out_BHTE, leaves, grad_BHTE)


@pytest.mark.parametrize("name", BATCHES)
def test_blocks_equal_the_dense_mask(name: str) -> None:
    """float32, values of size 1: 1e-5."""
    batch = BATCHES[name]
    actual, grads = attended(batch, batch.blocks_X5)
    dense, dense_grads = attended(batch, batch.attention_mask_TT()[None])
    torch.testing.assert_close(actual, dense, rtol=0, atol=1e-5)
    for grad, dense_grad in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(grad, dense_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_flex_attention_equals_the_dense_mask(name: str) -> None:
    """Its forward, which a CPU has too: float32, values of size 1: 1e-5."""
    batch = BATCHES[name]
    qkv = inputs(batch)[:3]
    actual = attend(*qkv, flex_mask(batch.group_T, batch.segment_T), 0.0, False)
    dense = attend(*qkv, batch.attention_mask_TT()[None], 0.0, False)
    torch.testing.assert_close(actual, dense, rtol=0, atol=1e-5)


@torch.no_grad()
def test_flex_attention_reads_repeated_keys_once() -> None:
    """4 heads of queries, 2 of keys and values, which torchtune repeats: as with the dense mask."""
    batch = BATCHES["one group"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, len(batch.tokens_T), 16, generator=generator) for n in (4, 2, 2))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    mask = flex_mask(batch.group_T, batch.segment_T)
    actual = attend(q, k, v, mask, 0.0, False, queries_per_key=2)
    dense = attend(q, k, v, batch.attention_mask_TT()[None], 0.0, False)
    torch.testing.assert_close(actual, dense, rtol=0, atol=1e-5)


def test_compiled_flex_attention_has_the_gradients_of_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's path up to its kernels: mask and attention are traced once, for all lengths. 4 heads
    of queries, 2 of keys; float32, values of size 1: 1e-5.
    """
    for function in (create_block_mask, flex_attention):
        compiled = torch.compile(function, dynamic=True, backend="aot_eager")
        monkeypatch.setattr(attention, function.__name__, compiled)
    # torch refuses gradients on a CPU, for whose kernel it has no backward.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    generator = torch.Generator().manual_seed(0)

    def check(batch: PackedSequence) -> None:
        shapes = [(1, heads, len(batch.tokens_T), 16) for heads in (4, 2, 2)]
        leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        grad_BHTE = torch.randn(shapes[0], generator=generator)

        def results(mask: Tensor | BlockMask, queries_per_key: int) -> tuple[Tensor, ...]:
            """The output, and the gradients of q, k and v."""
            q, k, v = leaves
            k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
            out_BHTE = attend(q, k, v, mask, 0.0, False, queries_per_key=queries_per_key)
            return out_BHTE.detach(), *torch.autograd.grad(out_BHTE, leaves, grad_BHTE)

        flex = results(flex_mask(batch.group_T, batch.segment_T), 2)
        dense = results(batch.attention_mask_TT()[None], 1)
        torch.testing.assert_close(flex, dense, rtol=0, atol=1e-5)

    check(pack([group(200, 20, 9), group(5, 0, 30)]))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(pack([group(40, 90, 1, 170), group(1, 300)]))


@pytest.mark.parametrize("name", BATCHES)
def test_the_flex_mask_is_the_dense_mask(name: str) -> None:
    """Pair by pair, over several of its 128 x 128 blocks."""
    batch = BATCHES[name]
    length = len(batch.tokens_T)
    mask = flex_mask(batch.group_T, batch.segment_T)
    pairs_TT = create_mask(mask.mask_mod, None, None, length, length, device="cpu")[0, 0]
    assert torch.equal(pairs_TT, batch.attention_mask_TT())


@pytest.mark.parametrize("name", BATCHES)
def test_blocks_are_the_dense_mask(name: str) -> None:
    """Every pair that a token sees is in exactly one block, and no other pair is in any."""
    batch = BATCHES[name]
    count_TT = torch.zeros(len(batch.tokens_T), len(batch.tokens_T), dtype=torch.long)
    for start, stop, first, end, is_causal in batch.blocks_X5.tolist():
        pairs_QT = torch.ones(stop - start, end - first, dtype=torch.long)
        count_TT[start:stop, first:end] += pairs_QT.tril() if is_causal else pairs_QT
    assert torch.equal(count_TT, batch.attention_mask_TT().long())


def test_bfloat16() -> None:
    """Values of size 1 with 8 bits, rounded at most four times (the dense mask's too): 3e-2."""
    batch = BATCHES["one group"]
    actual, grads = attended(batch, batch.blocks_X5, torch.bfloat16)
    dense, dense_grads = attended(batch, batch.attention_mask_TT()[None])
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), dense, rtol=0, atol=3e-2)
    for grad, dense_grad in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(grad.float(), dense_grad, rtol=3e-2, atol=3e-2)


def test_gradients_of_bfloat16_are_rounded_once() -> None:
    """A prompt's gradient is a sum over its responses, which isn't rounded on the way."""
    batch = pack([group(5, *[3] * 40)])
    *qkv, grad_BHTE = inputs(batch, torch.bfloat16)
    saved = [*qkv, *torch.ops.steerlm2.attend_blocks(*qkv, batch.blocks_X5)]
    backward = torch.ops.steerlm2.attend_blocks_backward
    rounded = backward(grad_BHTE, *saved, batch.blocks_X5)
    exact = backward(grad_BHTE.float(), *(each.float() for each in saved), batch.blocks_X5)
    for grad, exact_grad in zip(rounded, exact, strict=True):
        assert torch.equal(grad, exact_grad.to(torch.bfloat16))


def test_nothing_has_the_size_of_the_dense_mask() -> None:
    """16 responses of 255 tokens to a prompt of 16: 4,096 tokens, whose pairs are 16.8 million. The
    largest are q, k and v and what is like them: 4,096 x 24 numbers of 4 bytes.
    """
    batch = pack([group(16, *[255] * 16)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attended(batch, batch.blocks_X5)
    assert max(event.self_cpu_memory_usage for event in profiler.events()) == 4 * 4096 * H * E


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "full"},
        {"compile": True, "activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_blocks_pass_through_compiled_and_checkpointed_layers(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients as the plain layers', for several lengths and block counts."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "vocab_size": 700}
    plain = llama3(**sizes, max_seq_len=700, intermediate_dim=48)
    other = copy.deepcopy(plain)
    world = World(torch.device("cpu"))
    parallelize(plain, world, dtype=torch.float32)
    parallelize(other, world, dtype=torch.float32, **options)  # type: ignore[arg-type]
    for name in ("one group", "only stop tokens", "conversations"):
        for decoder in (plain, other):
            decoder.zero_grad()
            hidden_states(decoder, BATCHES[name]).square().sum().backward()
        for p, q in zip(plain.parameters(), other.parameters(), strict=True):
            if p.grad is None:
                assert q.grad is None
                continue
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
