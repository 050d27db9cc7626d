"""QLoRA's frozen weights: torchao's NF4 tensors, quantized shard by shard.

Dimension letters: O outputs, I inputs of a matrix; B its blocks of 64 numbers that share a scale,
N numbers of a block.

The scales are themselves quantized, as differences from their mean over the whole matrix.
Everything else of a block depends on its own numbers only, so a rank needs that mean and its own
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules import TransformerDecoder
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import LoRALinear

BLOCK = 64
"""Numbers that share a scale (QLoRA paper, arXiv 2305.14314, and torchao's default)."""
SCALE_BLOCK = 256
"""Scales that share a second scale (QLoRA paper and torchao's default)."""
UNIT = BLOCK * SCALE_BLOCK
"""Numbers of a rank's shard of a matrix must be a multiple of this."""

SMALLEST = 1e-12
"""Lower bound of the largest scale difference of a group, against a division by 0."""

CHUNK = 1 << 24
"""Numbers that `mean_scale` reads at once. A choice: 64 MiB in float32."""


def quantize_frozen(decoder: TransformerDecoder, dtype: torch.dtype) -> None:
    """Make a decoder's frozen base matrices NF4 again after a cast; on the meta device.

    A cast (`decoder.to(dtype)`) turns the NF4 tensors that torchtune built into ordinary ones.

    Args:
        dtype: that they are dequantized to for the computation.
    """

    @functools.cache  # torchao takes a tenth of a second for a large matrix, meta or not
    def empty(shape: torch.Size) -> Tensor:
        return to_nf4(torch.empty(shape, dtype=dtype, device="meta"), BLOCK, SCALE_BLOCK)

    for _, module in _quantized(decoder):
        module.weight = nn.Parameter(empty(module.weight.shape).detach(), requires_grad=False)
    if has_quantized(decoder):
        # torchtune's hook would dequantize them to full tensors on the host in every state_dict.
        decoder._state_dict_hooks.clear()


def has_quantized(decoder: TransformerDecoder) -> bool:
    return next(_quantized(decoder), None) is not None


def nf4_problems(
    decoder: TransformerDecoder, num_shards: int, tp_size: int, *, cpu_offload: bool = False
) -> Iterator[str]:
    """Problems of laying NF4 matrices out over so many ranks."""
    if has_quantized(decoder) and tp_size > 1:
        yield (
            "a model with quantize_base can't be split by tensor parallel: set "
            "tensor_parallel_dim=1 (FSDP2 shards it)"
        )
    if has_quantized(decoder) and cpu_offload:
        yield "a model with quantize_base stays on the GPUs: set fsdp_cpu_offload=false"
    for name, module in _quantized(decoder):
        rows, columns = module.weight.shape
        if columns % BLOCK or rows % num_shards or rows * columns // num_shards % UNIT:
            yield (
                f"{name} [{rows}, {columns}] can't be quantized in {num_shards} part(s): each must "
                f"hold whole rows and a multiple of {UNIT} numbers, and a row a multiple of "
                f"{BLOCK}; choose a smaller data_parallel_shard_dim, or quantize_base=false"
            )
            return


def finish_empty(decoder: TransformerDecoder, device: torch.device) -> None:
    """Allocate the tensors of NF4 matrices that `to_empty` leaves on the meta device."""
    for _, module in _quantized(decoder):
        weight = module.weight
        # to_local() returns a new object, and setting its attributes wouldn't change the weight.
        local: Any = weight._local_tensor if isinstance(weight, DTensor) else weight
        local.nf4 = torch.empty_like(local.nf4, device=device)
        local.scaler_mean = torch.empty_like(local.scaler_mean, device=device)


def is_nf4(tensor: Tensor) -> bool:
    return isinstance(tensor, NF4Tensor)


def mean_scale(whole_OI: Any) -> Tensor:
    """[] the mean over all blocks of the largest magnitude, float64; reads a few rows at a time.

    Args:
        whole_OI: [O, I] a matrix, or something that can be sliced like one; rows in any order.
    """
    rows, columns = whole_OI.shape if isinstance(whole_OI, Tensor) else whole_OI.get_shape()
    total = torch.zeros((), dtype=torch.float64)
    step = max(CHUNK // columns, 1)
    for first in range(0, rows, step):
        some_BN = whole_OI[first : first + step].reshape(-1, BLOCK)
        total += some_BN.abs().amax(dim=1).double().sum().cpu()
    return total / (rows * columns // BLOCK)


@torch.no_grad()
def fill_nf4(target: Tensor, part_OI: Tensor, mean: Tensor) -> None:
    """Quantize a rank's rows into its NF4 tensor, as `NF4Tensor.from_tensor` does a whole matrix.

    Args:
        target: the NF4 tensor to fill, after `finish_empty`.
        part_OI: [rows of this rank, I].
        mean: [] of the whole matrix, from `mean_scale`.
    """
    assert isinstance(target, NF4Tensor)
    device, dtype = target.quantized_data.device, target.dtype
    part_OI = part_OI.to(device, dtype)
    target.nf4.copy_(to_nf4(torch.zeros(1, UNIT, dtype=dtype, device=device)).nf4)
    target.scaler_mean.copy_(mean)
    scales_B = part_OI.reshape(-1, BLOCK).abs().amax(dim=1) - target.scaler_mean
    groups = scales_B.view(-1, SCALE_BLOCK)
    factors = 128 / groups.abs().amax(dim=1).clamp(min=SMALLEST)
    codes_B = (groups * factors[:, None]).round().clamp(-128, 127)
    target.quantization_factor.copy_(factors)
    target.quantized_scalers.copy_(codes_B.flatten())
    target.quantized_data.copy_(
        NF4Tensor.convert_to_norm_float_weight(part_OI, part_OI.numel() // BLOCK, BLOCK, target.nf4)
    )


def dequantized(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, NF4Tensor)
    return tensor.get_original_weight()


def _quantized(decoder: TransformerDecoder) -> Iterator[tuple[str, Any]]:
    for name, module in decoder.named_modules():
        if isinstance(module, FrozenNF4Linear) or (
            isinstance(module, LoRALinear) and module._quantize_base
        ):
            yield f"{name}.weight", module
