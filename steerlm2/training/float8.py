"""Matrix products of the decoder layers in float8, through torchao.

Parameters, gradients and the optimizer's state keep their dtypes: the operands of a product
(inputs, weights, output gradients) are scaled by their largest magnitude and rounded to 8 bits just
before it.
"""

from __future__ import annotations

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

CAPABILITY = (8, 9)
"""The first GPUs with float8 products: Ada (L4, L40S); H100 has 9.0."""
MULTIPLE_OF = 16
"""The rows and columns of a matrix must be multiples of this, for the GPU's float8 products."""


def check_float8_device(device: torch.device) -> None:
    """Check that the device can multiply float8 matrices.

    Raises:
        ValueError: where it can't.
    """
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if found < CAPABILITY:
        wanted = ".".join(map(str, CAPABILITY))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"float8 needs a GPU of compute capability {wanted} or more (L40S, H100, ...); this is "
            f"{name}: set float8=false"
        )


def use_float8(decoder: TransformerDecoder, device: torch.device, *, emulate: bool = False) -> None:
    """Exchange the linear layers in the decoder's layers, before it is laid out over processes.

    The output matrix, which the log-prob layer applies in chunks, and a reward head are unchanged.

    Args:
        device: that it will run on.
        emulate: round to float8 but multiply in float32; runs anywhere.

    Raises:
        ValueError: where the GPU has no float8 products; for a decoder with LoRA adapters, whose
            matrices would stay as they are.
    """
    if get_adapter_params(decoder):
        raise ValueError(
            "float8 doesn't go with LoRA adapters: set float8=false, or a `model` without"
        )
    if not emulate:
        check_float8_device(device)
    # Gradients of weights are products over the tokens. Where `World.padding_multiple` was kept to,
    # their number is a multiple of 16 on a GPU; of others this makes one.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for layer in decoder.layers:
        convert_to_float8_training(layer, module_filter_fn=_is_suitable, config=config)


def _is_suitable(module: nn.Module, name: str) -> bool:
    assert isinstance(module, nn.Linear)
    return module.in_features % MULTIPLE_OF == 0 and module.out_features % MULTIPLE_OF == 0
