"""Log-probs in chunks and on vocabulary shards equal log_softmax, and full logits never exist.

Dimension letters: R response tokens, D hidden, V vocabulary.

Run as a script it is one of the two ranks of the vocabulary-parallel test.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steerlm2.models.logprobs import sum_by_response, token_logps

if TYPE_CHECKING:
    from fork_server import ForkServer  # a rank, which this file is too, doesn't have it

R, D, V = 11, 6, 20


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [R, D], weight [V, D], targets [R], and what is multiplied with the log-probs [R]."""
    generator = torch.Generator().manual_seed(seed)
    hidden_RD = torch.randn(R, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator)
    targets_R = torch.randint(V, (R,), generator=generator)
    targets_R[:4] = torch.tensor([0, V // 2 - 1, V // 2, V - 1])  # the edges of two shards
    return hidden_RD, weight_VD, targets_R, torch.randn(R, generator=generator)


def reference(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """log softmax(hidden @ weight^T)[target] in float64."""
    logits_RV = hidden_RD.double() @ weight_VD.double().t()
    return logits_RV.log_softmax(dim=1).gather(1, targets_R[:, None]).squeeze(1)


def gradients(logps_R: Tensor, factor_R: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((logps_R * factor_R.to(logps_R.dtype)).sum(), inputs)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def test_no_value_of_a_gpu_is_read() -> None:
    """Reading one would wait for it. Tensors on the meta device have none, so that it fails."""
    hidden_RD, weight_VD, targets_R, factor_R = (each.to("meta") for each in example())
    inputs = hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    logps_R = token_logps(*inputs, targets_R, chunk_size=3)
    sums_N = sum_by_response(logps_R, torch.zeros_like(targets_R), 2)
    grads = gradients(logps_R, factor_R, *inputs)
    assert [grad.shape for grad in grads] == [(R, D), (V, D)]
    assert sums_N.shape == (2,)


@pytest.mark.parametrize("chunk_size", [1, 3, R, R + 5])
def test_equals_log_softmax(chunk_size: int) -> None:
    """Chunks of 1, 3 (the last chunk is shorter), exactly R, and more than R."""
    hidden_RD, weight_VD, targets_R, _ = example()
    logps_R = token_logps(hidden_RD, weight_VD, targets_R, chunk_size=chunk_size)
    assert_close(logps_R, reference(hidden_RD, weight_VD, targets_R))


@pytest.mark.parametrize("chunk_size", [1, 3, R + 5])
def test_gradients_equal_those_of_log_softmax(chunk_size: int) -> None:
    """Of hidden states and weight, for a different factor on every token."""
    hidden_RD, weight_VD, targets_R, factor_R = example()
    inputs = hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    logps_R = token_logps(*inputs, targets_R, chunk_size=chunk_size)
    expected = gradients(reference(*inputs, targets_R), factor_R, *inputs)
    for actual, wanted in zip(gradients(logps_R, factor_R, *inputs), expected, strict=True):
        assert_close(actual, wanted)


def test_large_logits_neither_overflow_nor_lose_the_target() -> None:
    """Logits (200, 0), target 1: log(e^0 / (e^200 + e^0)) = -200; e^200 is no float32."""
    logps_R = token_logps(torch.tensor([[200.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([1]))
    assert logps_R.tolist() == [-200]


def test_bf16_gives_float32_log_probs() -> None:
    """Logits of up to 8 in bf16 (8 bits) are off by up to 2^-6 each, so a log-prob by 2^-5."""
    hidden_RD, weight_VD, targets_R, _ = example()
    hidden_RD, weight_VD = hidden_RD.bfloat16(), weight_VD.bfloat16()
    assert (hidden_RD.float() @ weight_VD.float().t()).abs().max() < 8
    logps_R = token_logps(hidden_RD, weight_VD, targets_R)
    assert logps_R.dtype == torch.float32
    assert_close(logps_R, reference(hidden_RD, weight_VD, targets_R), 2**-5)


def test_bf16_weight_gradient_adds_up_in_float32() -> None:
    """512 equal tokens in chunks of one, logits (0, 0): each adds 1/2 to the target's row.

    The sum is 256. Adding 1/2 in bf16 would stop at 128, where its steps are 1.
    """
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden_RD = torch.ones(512, 1, dtype=torch.bfloat16)
    logps_R = token_logps(hidden_RD, weight_VD, torch.zeros(512, dtype=torch.long), chunk_size=1)
    (gradient,) = torch.autograd.grad(logps_R.sum(), weight_VD)
    assert gradient.tolist() == [[256], [-256]]


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    hidden_RD, weight_VD, targets_R, factor_R = example()
    inputs = hidden_RD.bfloat16().requires_grad_(), weight_VD.bfloat16().requires_grad_()
    got = gradients(token_logps(*inputs, targets_R), factor_R, *inputs)
    assert [gradient.dtype for gradient in got] == [torch.bfloat16] * 2


def test_a_frozen_weight_gets_no_gradient_but_the_hidden_states_do() -> None:
    hidden_RD, weight_VD, targets_R, factor_R = example()
    hidden_RD.requires_grad_()
    expected = gradients(reference(hidden_RD, weight_VD, targets_R), factor_R, hidden_RD)
    got = gradients(token_logps(hidden_RD, weight_VD, targets_R), factor_R, hidden_RD)
    assert_close(got[0], expected[0])


def test_no_tokens_give_no_log_probs_and_zero_gradients() -> None:
    """An empty micro-batch takes part in the backward."""
    inputs = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    logps_R = token_logps(*inputs, torch.zeros(0, dtype=torch.long))
    (hidden_grad, weight_grad) = torch.autograd.grad(logps_R.sum(), inputs)
    assert (logps_R.shape, hidden_grad.shape) == ((0,), (0, D))
    assert torch.equal(weight_grad, torch.zeros(V, D))


class LargestTensor(TorchDispatchMode):
    """Notes the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


def test_full_logits_never_exist() -> None:
    """R 60, V 300, D 5, chunks of 4: logits would be 18,000 numbers. The largest tensor there is
    is the weight's gradient, V D = 1500; a chunk's logits are 4 V = 1200.
    """
    hidden_RD, weight_VD = torch.randn(60, 5), torch.randn(300, 5)
    inputs = hidden_RD.requires_grad_(), weight_VD.requires_grad_()
    targets_R = torch.randint(300, (60,))
    with LargestTensor() as forward:
        logps_R = token_logps(*inputs, targets_R, chunk_size=4)
    with LargestTensor() as backward:
        logps_R.sum().backward()
    assert (4, 300) in forward.shapes & backward.shapes, "the chunks were not seen"
    assert max(forward.largest(), backward.largest()) == 1500


def test_sum_by_response_adds_the_tokens_of_each() -> None:
    """Tokens of responses 0, 0, 2, 0, 2; response 1 has none."""
    sums_N = sum_by_response(
        torch.tensor([1.0, 2, 4, 8, 16]), torch.tensor([0, 0, 2, 0, 2]), num_responses=3
    )
    assert sums_N.tolist() == [11, 0, 20]


def run_rank(rank: int, folder: Path) -> None:
    """One of two vocabulary-parallel ranks: saves log-probs and both gradients."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    hidden_RD, weight_VD, targets_R, factor_R = example()
    inputs = hidden_RD.requires_grad_(), weight_VD.chunk(2)[rank].requires_grad_()
    logps_R = token_logps(*inputs, targets_R, chunk_size=3, tp_group=dist.group.WORLD)
    unequal_VD = weight_VD.detach()[: V // 3] if rank == 0 else weight_VD.detach()[V // 3 :]
    with pytest.raises(RuntimeError, match="equal vocabulary shards") as refused:
        token_logps(hidden_RD, unequal_VD, targets_R, tp_group=dist.group.WORLD)
    results = [logps_R.detach(), *gradients(logps_R, factor_R, *inputs), str(refused.value)]
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def vocabulary_parallel(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> list[list[Any]]:
    """[log-probs, gradient of hidden, gradient of the weight's shard, and the message that refuses
    unequal shards] of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        fork_server.start([__file__, str(rank), folder], cwd=folder, env=os.environ)
        for rank in range(2)
    ]
    for rank in ranks:
        _, stderr = rank.communicate()
        assert rank.returncode == 0, stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_vocabulary_shards_give_the_log_probs_of_the_whole(
    vocabulary_parallel: list[list[Tensor]],
) -> None:
    """On both ranks, with targets at the first and last token of each shard."""
    expected_R = reference(*example()[:3])
    for logps_R, *_ in vocabulary_parallel:
        assert_close(logps_R, expected_R)


def test_hidden_gradients_of_vocabulary_shards_are_summands(
    vocabulary_parallel: list[list[Tensor]],
) -> None:
    hidden_RD, weight_VD, targets_R, factor_R = example()
    hidden_RD.requires_grad_()
    expected = gradients(reference(hidden_RD, weight_VD, targets_R), factor_R, hidden_RD)
    assert_close(vocabulary_parallel[0][1] + vocabulary_parallel[1][1], expected[0])


def test_weight_gradients_of_vocabulary_shards_are_the_wholes_rows(
    vocabulary_parallel: list[list[Tensor]],
) -> None:
    hidden_RD, weight_VD, targets_R, factor_R = example()
    weight_VD.requires_grad_()
    expected = gradients(reference(hidden_RD, weight_VD, targets_R), factor_R, weight_VD)
    assert_close(torch.cat([rank[2] for rank in vocabulary_parallel]), expected[0])


def test_unequal_vocabulary_shards_are_refused_on_every_rank(
    vocabulary_parallel: list[list[Any]],
) -> None:
    for *_, message in vocabulary_parallel:
        assert "unequal numbers of rows of the output matrix" in message


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
