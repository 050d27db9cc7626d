"""A matrix quantized in parts is the matrix that torchao quantizes whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.models.llama3 import lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.weights import load_weights
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.models.nf4 import UNIT, fill_nf4, is_nf4, mean_scale, nf4_problems

CPU = World(torch.device("cpu"))
QLORA: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 512,
    "max_seq_len": 64,
    "lora_attn_modules": ["q_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
    "quantize_base": True,
}


def meta_decoder() -> TransformerDecoder:
    with torch.device("meta"):
        decoder = lora_llama3(**QLORA).to(torch.float32)
    set_trainable_params(decoder, get_adapter_params(decoder))
    return decoder


def matrix(rows: int = 256, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def quantized(part: Tensor, mean: Tensor) -> NF4Tensor:
    target = to_nf4(torch.ones_like(part))
    fill_nf4(target, part, mean)
    return target


def test_a_whole_matrix_is_quantized_as_by_torchao() -> None:
    """The codes bit for bit; scales to a step of their 8 bits, the mean being summed otherwise."""
    whole = matrix()
    got, expected = quantized(whole, mean_scale(whole)), to_nf4(whole)
    assert torch.equal(got.quantized_data, expected.quantized_data)
    steps = got.quantized_scalers.int() - expected.quantized_scalers.int()
    assert steps.abs().max() <= 1
    torch.testing.assert_close(
        got.get_original_weight(), expected.get_original_weight(), rtol=0, atol=0.02
    )


def test_halves_are_those_of_the_whole() -> None:
    """Bit for bit, with the mean of the whole."""
    whole = matrix()
    mean = mean_scale(whole)
    halves = [quantized(half, mean).get_original_weight() for half in whole.chunk(2)]
    assert torch.equal(torch.cat(halves), quantized(whole, mean).get_original_weight())


def test_equal_scales_have_no_division_by_zero() -> None:
    """All differences from their mean are 0; the largest code is 1."""
    constant = torch.full((UNIT // 64, 64), 0.5)
    assert torch.equal(quantized(constant, mean_scale(constant)).get_original_weight(), constant)


def test_frozen_layers_are_nf4_and_hold_the_checkpoint(tmp_path: Path) -> None:
    """Loaded from a Hugging Face folder, whose q and k have another order of rows. NF4's largest
    gap between codes is 0.3 of a block's largest number, so half of it is the largest error; 1% is
    what the scales' own quantization adds here."""
    decoder = meta_decoder()
    scratch = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=0, output_dir=str(tmp_path))
    base = {name: w for name, w in scratch.weights.items() if "lora" not in name}
    scratch.save_checkpoint({"model": base}, epoch=0)
    parallelize(decoder, CPU, dtype=torch.float32)
    load_weights(decoder, HFCheckpointer(str(tmp_path / "epoch_0")), CPU, seed=0)
    matrices = {n: p for n, p in decoder.named_parameters() if is_nf4(p)}
    assert len(matrices) == 7
    assert not any(p.requires_grad for p in matrices.values())
    for name, parameter in matrices.items():
        blocks = base[name].reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        error = (parameter.get_original_weight().reshape(-1, 64) - blocks).abs() / largest
        assert error.max() < 0.152 + 0.01


@pytest.mark.parametrize(
    ("shards", "tp_size", "cpu_offload", "says"),
    [
        (1, 2, False, "tensor_parallel_dim=1"),
        (8, 1, False, "data_parallel_shard_dim"),
        (1, 1, True, "fsdp_cpu_offload=false"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(
    shards: int, tp_size: int, cpu_offload: bool, says: str
) -> None:
    """k_proj [128, 256] in 8 parts: 4096 numbers each, a quarter of a block of scales."""
    (problem,) = nf4_problems(meta_decoder(), shards, tp_size, cpu_offload=cpu_offload)
    assert says in problem


def test_matrices_of_70b_can_be_split_over_a_node() -> None:
    """k_proj [1024, 8192] / 8 = 2**20 = 64 x UNIT."""
    assert 1024 * 8192 // 8 % UNIT == 0
