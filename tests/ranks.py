"""Starts gloo ranks, for the scripts of tests that find out what ranks do (`run_script`)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from steerlm2.distributed.world import World, close_world, init_world


def run_on_ranks(work: Callable[[World], None], *, size: int, **layout: int) -> None:
    """Run `work` in `size` processes that `init_world` lays out; one alone has no process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_run_rank, (work, size, layout, port), nprocs=size, start_method="fork")


def _run_rank(
    rank: int, work: Callable[[World], None], size: int, layout: dict[str, int], port: int
) -> None:
    torch.set_num_threads(1)
    if size > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.update({name: str(value) for name, value in places.items()})
    work(init_world("cpu", **layout))
    close_world()
