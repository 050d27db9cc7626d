"""One process, with and without a mesh of one; what more processes compute, recipe tests say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerDecoder

from steerlm2.data.packing import Group, pack
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.training.checkpoint import load_weights
from steerlm2.training.distributed import (
    PRODUCTS,
    ActivationCheckpointing,
    World,
    check_finite,
    close_world,
    init_world,
    parallelize,
)
from steerlm2.training.forward import response_logps
from steerlm2.training.hf_checkpoint import ScratchCheckpointer

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
    row = pack([Group([1, 2, 3], [[4, 5, 6, 7], [8], [9, 10]]), Group([11], [[12], [13, 14]])])
    logps_N = response_logps(decoder, row, world)
    logps_N.sum().backward()
    gradients = []
    for parameter in decoder.parameters():
        assert parameter.grad is not None
        full = getattr(parameter.grad, "full_tensor", lambda grad=parameter.grad: grad)
        gradients.append(full())
    return logps_N.detach(), gradients


@pytest.fixture(scope="module")
def plain() -> Numbers:
    return log_probs_and_gradients(built(CPU), CPU)


def assert_same(actual: Numbers, expected: Numbers) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_single_process_needs_no_process_group() -> None:
    world = init_world("cpu")
    assert world.mesh is None
    assert not dist.is_initialized()


def test_a_single_process_is_all_there_is() -> None:
    assert (CPU.size, CPU.rank, CPU.is_main, CPU.dp_size, CPU.dp_rank) == (1, 0, True, 1, 0)
    assert (CPU.tp_size, CPU.tp_group) == (1, None)


def test_reductions_over_one_process_are_the_value() -> None:
    value = torch.tensor([1.0, -2.0])
    assert CPU.sum(value).tolist() == CPU.max(value).tolist() == [1, -2]
    assert CPU.from_main({"a": 1}) == {"a": 1}
    assert CPU.on_main(lambda: "x") == "x"


def test_a_mesh_of_one_reduces_to_the_value_too(mesh_of_one: World) -> None:
    assert mesh_of_one.mesh is not None
    value = torch.tensor([1.0, -2.0])
    assert mesh_of_one.sum(value).tolist() == mesh_of_one.max(value).tolist() == [1, -2]
    assert mesh_of_one.from_main([3]) == [3]
    assert mesh_of_one.on_main(lambda: "x") == "x"


def test_reductions_leave_their_input_as_it_is(mesh_of_one: World) -> None:
    value = torch.tensor([1.0])
    assert mesh_of_one.sum(value) is not value
    assert mesh_of_one.max(value) is not value


def test_closing_ends_the_process_group() -> None:
    init_world("cpu", needs_mesh=True)
    close_world()
    assert not dist.is_initialized()
    close_world()  # and again: a recipe that failed early has none


@pytest.mark.parametrize("status", [0, 3])
def test_a_rank_ends_where_it_says(status: int) -> None:
    """With what it printed and `atexit` had to do, and without a finalization of Python."""
    script = f"""
import atexit
from steerlm2.training.distributed import end_rank, init_world

class Finalized:
    def __del__(self):
        print("finalized")

kept = Finalized()
atexit.register(print, "at exit")
end_rank(7)
print("no world")
init_world("cpu", needs_mesh=True)
end_rank({status})
print("after the end")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (status, "no world\nat exit\n"), ended.stderr


def test_every_group_has_the_runs_timeout() -> None:
    """torch gives the groups of a mesh its own, 10 minutes with NCCL."""
    world = init_world("cpu", needs_mesh=True, timeout_seconds=7)
    try:
        assert world.mesh is not None
        groups = [dist.group.WORLD, *world.mesh.get_all_groups()]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        assert [b.options._timeout.total_seconds() for b in backends] == [7] * 4
    finally:
        close_world()


def test_the_flight_recorder_writes_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it says so with a variable's older name."""
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
    for name in (*names, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # to be put back afterwards
        monkeypatch.delenv(name)
    for older in ({}, {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine/trace_"}):
        os.environ.update(older)
        init_world("cpu", needs_mesh=True, flight_records=tmp_path)
        close_world()
        set_by_us = {name: os.environ.pop(name) for name in names if name in os.environ}
        expected = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
        if not older:
            expected["TORCH_FR_DUMP_TEMP_FILE"] = f"{tmp_path}/nccl_trace_rank_"
        assert set_by_us == expected


@pytest.mark.parametrize(
    ("size", "dims"),
    [
        (1, {"tensor_parallel_dim": 2}),
        (4, {"tensor_parallel_dim": 3}),
        (4, {"data_parallel_shard_dim": 3}),
        (4, {"data_parallel_replicate_dim": 8}),
        (8, {"tensor_parallel_dim": 2, "data_parallel_shard_dim": 2}),
    ],
)
def test_processes_that_do_not_divide_are_refused(
    size: int, dims: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them waits for the others."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=rf"^{size} process\(es\) can't form .* --nproc_per_node"):
        init_world("cpu", **dims)


@pytest.mark.parametrize(
    "dims",
    [
        {"tensor_parallel_dim": 0},
        {"data_parallel_replicate_dim": -1},
        {"data_parallel_shard_dim": 0},
        {"data_parallel_shard_dim": -2},
    ],
)
def test_dimensions_below_one_are_refused(dims: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        init_world("cpu", **dims)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_names_the_fix() -> None:
    with pytest.raises(ValueError, match="PyTorch sees no GPU here; set device=cpu"):
        init_world("cuda")


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
