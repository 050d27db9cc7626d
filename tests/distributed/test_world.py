"""One process, with and without a mesh of one; what more processes compute, recipe tests say."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtune.models.llama3 import llama3

from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World, check_gpu, close_world, init_world

CPU = World(torch.device("cpu"))


@pytest.fixture
def mesh_of_one() -> Iterator[World]:
    yield init_world("cpu", needs_mesh=True)
    close_world()


def test_a_single_process_needs_no_process_group() -> None:
    world = init_world("cpu")
    assert world.mesh is None
    assert not dist.is_initialized()


def test_a_single_process_is_all_there_is() -> None:
    assert (CPU.size, CPU.rank, CPU.is_main, CPU.dp_size, CPU.dp_rank) == (1, 0, True, 1, 0)
    assert (CPU.tp_size, CPU.tp_group) == (1, None)


@pytest.mark.parametrize(
    ("device", "tp_size", "expected"),
    [("cpu", 1, 1), ("cpu", 6, 192), ("cuda", 1, 128), ("cuda", 8, 128), ("cuda", 6, 384)],
)
def test_lengths_are_multiples_of_the_ranks_and_of_a_gpus_blocks(
    monkeypatch: pytest.MonkeyPatch, device: str, tp_size: int, expected: int
) -> None:
    monkeypatch.setattr(World, "tp_size", tp_size)
    assert World(torch.device(device)).padding_multiple == expected


@pytest.mark.parametrize(
    ("local_rank", "capability", "triton", "expected"),
    [
        (0, (8, 0), True, None),
        (1, (9, 0), True, None),
        (2, (9, 0), True, r"LOCAL_RANK is 2, but PyTorch sees 2 GPU\(s\) here"),
        (0, (7, 5), True, r"\(Tesla T4\) has compute capability 7.5; .* need 8.0"),
        (0, (8, 0), False, "Triton, which is not installed"),
    ],
)
def test_a_rank_without_a_gpu_that_can_train_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    local_rank: int,
    capability: tuple[int, int],
    triton: bool,
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    with pytest.raises(ValueError, match=expected) if expected else contextlib.nullcontext():
        check_gpu(local_rank)


@dataclass
class Machine:
    """One whose PyTorch sees two GPUs, and whose process groups are fake: `events` is what was
    asked of both, in their order."""

    monkeypatch: pytest.MonkeyPatch
    events: list[tuple[str, Any]] = field(default_factory=list)

    def become_rank(self, rank: int, *, local_rank: int, size: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size}
        for name, value in places.items():
            self.monkeypatch.setenv(name, str(value))

    def set_device(self, device: torch.device) -> None:
        self.events.append(("device", device))
        self.monkeypatch.setattr(torch.cuda, "current_device", lambda: device.index)

    def init_process_group(self, backend: str, **options: Any) -> None:
        self.events.append(("group", backend))
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        INIT_PROCESS_GROUP("fake", store=FakeStore(), rank=rank, world_size=size)


INIT_PROCESS_GROUP = dist.init_process_group


class MetaForCuda(TorchFunctionMode):
    """What is made on a GPU has no values instead."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if "cuda" in str(options.get("device")):
            options["device"] = "meta"
        return function(*args, **options)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(monkeypatch)
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device: (9, 0),
        "set_device": machine.set_device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(dist, "init_process_group", machine.init_process_group)
    yield machine
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")  # not with fake groups
@pytest.mark.parametrize(
    ("layout", "mesh_shape", "rows"),
    [
        ({}, (1, 4, 1), 24),
        ({"data_parallel_replicate_dim": 2}, (2, 2, 1), 48),
        ({"tensor_parallel_dim": 2}, (1, 2, 2), 24),
    ],
    ids=["FSDP2", "HSDP", "tensor parallel"],
)
def test_a_rank_takes_the_gpu_of_its_local_rank_and_its_part_of_a_model(
    two_gpus: Machine, layout: dict[str, int], mesh_shape: tuple[int, ...], rows: int
) -> None:
    """The last of four ranks on two nodes: its GPU before NCCL, which takes the current one; then
    the 96 rows of a matrix that the MLP's first products are split by, over those that share it."""
    two_gpus.become_rank(3, local_rank=1, size=4)
    world = init_world("cuda", **layout)
    gpu = torch.device("cuda", 1)
    assert two_gpus.events[:2] == [("device", gpu), ("group", "cpu:gloo,cuda:nccl")]
    assert (world.device, world.rank, world.size) == (gpu, 3, 4)
    assert world.mesh is not None
    assert (world.mesh.device_type, tuple(world.mesh.shape)) == ("cuda", mesh_shape)
    assert world.padding_multiple == 128
    with torch.device("meta"):
        decoder = llama3(
            vocab_size=64, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=64,
            max_seq_len=64, intermediate_dim=96,
        )  # fmt: skip
    with MetaForCuda():
        parallelize(decoder, world, dtype=torch.bfloat16)
    weight = decoder.layers[0].mlp.w1.weight
    assert isinstance(weight, DTensor)
    assert weight.device_mesh.device_type == "cuda"
    assert (tuple(weight.shape), tuple(weight.to_local().shape)) == ((96, 64), (rows, 64))


def test_a_rank_more_than_gpus_is_refused_before_others_wait_for_it(two_gpus: Machine) -> None:
    two_gpus.become_rank(2, local_rank=2, size=3)
    with pytest.raises(ValueError, match=r"^LOCAL_RANK is 2, .* at most 2 process\(es\)"):
        init_world("cuda")
    assert two_gpus.events == []


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


def test_a_rank_ends_where_it_says() -> None:
    """With its status, what it printed and `atexit` had to do, and without a finalization of Python
    (of forks of an interpreter that has imported torch)."""
    script = """
import atexit, os
from steerlm2.distributed.world import end_rank, init_world

class Finalized:
    def __del__(self):
        print("finalized")

kept = Finalized()
atexit.register(print, "at exit")
end_rank(7)
print("no world", flush=True)
for status in (0, 3):
    if (pid := os.fork()) == 0:
        init_world("cpu", needs_mesh=True)
        end_rank(status)
        print("after the end")
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "no world\nat exit\n0\nat exit\n3\n", ended.stderr


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
    with pytest.raises(ValueError, match=r"no GPU here; set device=cpu dtype=fp32 .*compile=false"):
        init_world("cuda")
