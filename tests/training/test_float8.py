"""Float8 products, emulated on the CPU: what they replace, and how near they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.weights import load_weights
from steerlm2.config.keys import TrainingKeys
from steerlm2.config.loader import Component
from steerlm2.data.packing import Group, pack
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.models.reward_head import add_reward_head
from steerlm2.training.float8 import MULTIPLE_OF, check_float8_device, use_float8
from steerlm2.training.forward import response_logps

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 96,
}
GROUP = Group(range(10, 19), [range(30, 41), range(100, 107)])
"""27 tokens: no multiple of 16."""


def meta_decoder(**changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return llama3(**(TINY | changes))


def converted(decoder: TransformerDecoder) -> Iterator[str]:
    return (name for name, module in decoder.named_modules() if isinstance(module, Float8Linear))


def gradients(*, float8: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the responses, and the gradients of their sum."""
    decoder = meta_decoder()
    if float8:
        use_float8(decoder, CPU.device, emulate=True)
    parallelize(decoder, CPU, dtype=torch.float32, activation_checkpointing="selective")
    source = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=0, output_dir="")
    load_weights(decoder, source, CPU, seed=0)
    logps_N = response_logps(decoder, pack([GROUP], multiple_of=1), CPU)
    logps_N.sum().backward()
    return logps_N.detach(), {
        name: p.grad for name, p in decoder.layers.named_parameters() if p.grad is not None
    }


def test_matrices_of_the_layers_are_converted() -> None:
    """7 a layer; neither the output nor a reward head."""
    decoder = meta_decoder()
    add_reward_head(decoder, 3)
    use_float8(decoder, CPU.device, emulate=True)
    names = list(converted(decoder))
    assert len(names) == 2 * 7
    assert all(name.startswith("layers.") for name in names)


def test_matrices_that_the_gpu_cannot_multiply_stay() -> None:
    """MLP units that are no multiple of 16: the 4 matrices of attention are left."""
    decoder = meta_decoder(intermediate_dim=90)
    use_float8(decoder, CPU.device, emulate=True)
    assert len(list(converted(decoder))) == 2 * 4


def test_log_probs_and_gradients_are_near_the_plain_ones() -> None:
    """e4m3 rounds by up to 2**-4 = 6% at random: a matrix's gradient is off by a few percent of its
    norm, and not by nothing."""
    (logps_N, grads), (plain_N, plain) = gradients(float8=True), gradients(float8=False)
    torch.testing.assert_close(logps_N, plain_N, rtol=0.01, atol=0)
    errors = {name: (grads[name] - grad).norm() / grad.norm() for name, grad in plain.items()}
    assert grads.keys() == plain.keys()
    assert max(errors.values()) < 0.15
    assert min(errors.values()) > 1e-3


def test_packed_sequences_of_a_gpu_need_no_further_padding() -> None:
    assert World(torch.device("cuda")).padding_multiple % MULTIPLE_OF == 0


def test_adapters_are_refused() -> None:
    with torch.device("meta"):
        decoder = lora_llama3(**TINY, lora_attn_modules=["q_proj"], lora_rank=4, lora_alpha=8)
    with pytest.raises(ValueError, match="float8=false"):
        use_float8(decoder, CPU.device)


def test_a_device_without_float8_is_named() -> None:
    with pytest.raises(ValueError, match=r"compute capability 8\.9 .* this is a CPU"):
        check_float8_device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "cpu"}, "'device: cuda'"),
        ({"dtype": "fp32"}, "'dtype: bf16'"),
        ({"tensor_parallel_dim": 2}, "'tensor_parallel_dim: 1'"),
    ],
)
def test_configs_that_do_not_go_with_it(changes: dict[str, Any], says: str) -> None:
    unused = Component(_component_="builtins.dict")
    sections = dict.fromkeys(("tokenizer", "model", "dataset", "optimizer"), unused)
    good: dict[str, Any] = {"float8": True, "device": "cuda", "dtype": "bf16"}
    good |= {"tensor_parallel_dim": 1, "output_dir": "out", "max_steps": 1, "lr": 1e-3, **sections}
    assert TrainingKeys(**good).problems() == []
    (problem,) = TrainingKeys(**(good | changes)).problems()
    assert says in problem
    assert TrainingKeys(**(good | changes | {"float8": False})).problems() == []
