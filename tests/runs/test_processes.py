"""One process; several are in the tests of the recipes that don't train."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlm2.config.keys import DistributedKeys
from steerlm2.config.loader import Component
from steerlm2.runs.processes import (
    join_processes,
    process_beside_server,
    use_cores_in_other_threads,
    use_cores_in_this_thread,
)


def keys(**more: Any) -> DistributedKeys:
    return DistributedKeys(tokenizer=Component(), model=Component(), **more)


def test_one_process_has_no_log(tmp_path: Path) -> None:
    """What it has to say is on the terminal."""
    world = join_processes(keys(device="cpu"), tmp_path)
    assert (world.size, world.device) == (1, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_device_other_than_the_configs(tmp_path: Path) -> None:
    world = join_processes(keys(device="cuda"), tmp_path, device="cpu")
    assert world.device == torch.device("cpu")


def test_processes_fit_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_dim=2"):
        join_processes(keys(device="cpu", tensor_parallel_dim=2), tmp_path)


def test_beside_a_server_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_beside_server().size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without --nproc_per_node"):
        process_beside_server()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_beside_training_compute_alone() -> None:
    """Those that begin later, and those that haven't used PyTorch yet: gloo's, after the call."""
    with ThreadPoolExecutor(1) as used, ThreadPoolExecutor(1) as unused:
        assert used.submit(torch.get_num_threads).result() == 2
        unused.submit(int).result()
        use_cores_in_this_thread()
        assert torch.get_num_threads() == 2
        assert unused.submit(torch.get_num_threads).result() == 1
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 1


@pytest.mark.usefixtures("two_threads")
def test_the_thread_that_serves_computes_alone() -> None:
    """An engine's thread begins later."""
    use_cores_in_other_threads()
    assert torch.get_num_threads() == 1
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
