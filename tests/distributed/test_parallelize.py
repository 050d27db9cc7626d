"""A model laid out: activation checkpointing, FSDP2 and mixed precision change no number."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder
from transformers import AutoConfig

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.weights import load_weights
from steerlm2.data.packing import Group, pack
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import (
    PRODUCTS,
    ActivationCheckpointing,
    check_finite,
    parallelize,
)
from steerlm2.distributed.world import World, close_world, init_world
from steerlm2.models import from_checkpoint
from steerlm2.models.families import FAMILIES
from steerlm2.training.forward import response_logps

CPU = World(torch.device("cpu"))


Numbers = tuple[Tensor, list[Tensor]]
"""Log-probs and the gradients of all parameters."""


@pytest.fixture
def mesh_of_one() -> Iterator[World]:
    yield init_world("cpu", needs_mesh=True)
    close_world()


def built(
    world: World, *, dtype: torch.dtype = torch.float32, **options: Any
) -> TransformerDecoder:
    """A decoder as recipes build it: meta device, laid out, then filled."""
    with torch.device("meta"):
        decoder = llama3(
            vocab_size=512,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            embed_dim=32,
            max_seq_len=64,
            intermediate_dim=48,
        )
    checkpointer = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=0, output_dir="unused")
    checkpointer.weights = {name: 5 * value for name, value in checkpointer.weights.items()}
    parallelize(decoder, world, dtype=dtype, **options)
    load_weights(decoder, checkpointer, world, seed=0)
    return decoder


def log_probs_and_gradients(decoder: TransformerDecoder, world: World) -> Numbers:
    batch = pack([Group([1, 2, 3], [[4, 5, 6, 7], [8], [9, 10]]), Group([11], [[12], [13, 14]])])
    logps_N = response_logps(decoder, batch, world)
    logps_N.sum().backward()
    gradients = []
    for parameter in decoder.parameters():
        assert parameter.grad is not None
        full = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
        gradients.append(full())
    return logps_N.detach(), gradients


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_heads_too_small_for_a_gpu_are_refused_there(device: str) -> None:
    """32 numbers in 4 heads, which a CPU takes."""
    with torch.device("meta"):
        decoder = llama3(
            vocab_size=64, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64
        )
    refused = pytest.raises(ValueError, match=r"16 numbers or more, and the model's have 8: set")
    with refused if device == "cuda" else contextlib.nullcontext():
        parallelize(decoder, World(torch.device(device)), dtype=torch.float32)


@pytest.fixture(scope="module")
def plain() -> Numbers:
    return log_probs_and_gradients(built(CPU), CPU)


def assert_same(actual: Numbers, expected: Numbers) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_number(
    mode: ActivationCheckpointing, plain: Numbers
) -> None:
    decoder = built(CPU, activation_checkpointing=mode)
    assert_same(log_probs_and_gradients(decoder, CPU), plain)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_computes_the_layers_again(mode: ActivationCheckpointing) -> None:
    """2 layers: 2 forwards, and 2 again in the backward."""
    decoder = built(CPU, activation_checkpointing=mode)
    calls: list[int] = []
    for layer in decoder.layers:
        layer.attn.register_forward_hook(lambda *_: calls.append(1))
    log_probs_and_gradients(decoder, CPU)
    assert len(calls) == 4


PACKED = [  # of three lengths and numbers of blocks
    pack([Group([1, 2, 3], [[4, 5, 6, 7], [8], [9, 10]]), Group([11], [[12], [13, 14]])]),
    pack([Group([1] * 9, [[4, 5] * 7, [8, 9], [9, 8, 9], [8, 8]])]),
    pack([Group([7] * 30, [[4, 5, 6] * 9, [8] * 4, [9] * 3, [10]])]),
]


@pytest.mark.parametrize(
    ("model_type", "own"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_compiled_layers_of_other_families_compute_the_same(
    model_type: str, own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and gradients of three lengths, of which the third compiles nothing more. Traced
    with their backward, but not to C++. Llama and Mistral have neither biases nor norms of heads.
    """
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **own)
    config.architectures = [FAMILIES[model_type].language_model]
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = from_checkpoint(str(tmp_path))
    for parameter in plain.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    compiled = copy.deepcopy(plain)
    parallelize(plain, CPU, dtype=torch.float32)
    parallelize(compiled, CPU, dtype=torch.float32, compile=True)
    for i, batch in enumerate(PACKED):
        numbers = []
        for decoder in (plain, compiled):
            decoder.zero_grad()
            with torch.compiler.set_stance("fail_on_recompile" if i == 2 else "default"):
                logps_N = response_logps(decoder, batch, CPU)
                logps_N.sum().backward()
            grads = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
            numbers.append((logps_N.detach(), grads))
        assert len(numbers[0][1]) == len(list(plain.parameters()))
        torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-4, atol=1e-4)


class Products(TorchDispatchMode):
    """How many matrix products and attentions are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def num_products(**options: Any) -> int:
    decoder = built(CPU, **options)
    with Products() as products:
        log_probs_and_gradients(decoder, CPU)
    return products.count


def test_selective_checkpointing_computes_no_product_again() -> None:
    """As many as without checkpointing; all of it again is an attention and 6 products more in
    each of 2 layers: the last product's output is nobody's input.
    """
    plain = num_products()
    assert num_products(activation_checkpointing="selective") == plain
    assert num_products(activation_checkpointing="full") == plain + 2 * 7


@pytest.mark.parametrize(("step", "said"), [(7, "as before"), (9, "finite at step 6")])
def test_a_broken_norm_is_an_error(step: int, said: str) -> None:
    """Looked at after step 6: step 7's update is not made, those before 9 were."""
    check_finite(torch.tensor(1.0), step, 6)
    with pytest.raises(ValueError, match=said):
        check_finite(torch.tensor(torch.inf), step, 6)


def test_fsdp_over_one_process_changes_no_number(mesh_of_one: World, plain: Numbers) -> None:
    assert_same(log_probs_and_gradients(built(mesh_of_one), mesh_of_one), plain)


def test_bf16_computes_on_float32_master_weights(mesh_of_one: World, plain: Numbers) -> None:
    """Log-probs are near fp32's but not theirs; parameters and gradients are float32."""
    decoder = built(mesh_of_one, dtype=torch.bfloat16)
    logps_N, gradients = log_probs_and_gradients(decoder, mesh_of_one)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert 1e-4 < (logps_N - plain[0]).abs().max() < 0.5
