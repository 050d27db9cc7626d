"""The processes of a run: joined as its config says, each with a log of its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from steerlm2.config.keys import DistributedKeys
from steerlm2.distributed.world import World, init_world
from steerlm2.runs.logs import LOG_FOLDER, open_rank_log
from steerlm2.runs.output import make_output_dir


def world_of(
    cfg: DistributedKeys, folder: Path, *, device: str | None = None, needs_mesh: bool = False
) -> World:
    """Join the processes that torchrun started, or be the only one, in the config's layout.

    Args:
        folder: of the run; NCCL's flight records go to its logs.
        device: instead of `cfg.device`.
        needs_mesh: as of `init_world`; CPU offload needs one in any case.

    Raises:
        ValueError: where the number of processes doesn't fit the layout, or there is no such
            device.
    """
    return init_world(
        device or cfg.device,
        tensor_parallel_dim=cfg.tensor_parallel_dim,
        data_parallel_replicate_dim=cfg.data_parallel_replicate_dim,
        data_parallel_shard_dim=cfg.data_parallel_shard_dim,
        needs_mesh=needs_mesh or cfg.fsdp_cpu_offload,
        timeout_seconds=cfg.collective_timeout_seconds,
        flight_records=folder / LOG_FOLDER,
    )


def join_processes(cfg: DistributedKeys, folder: Path, *, device: str | None = None) -> World:
    """The processes of a run that isn't training.

    Where there are several, each one's log is FOLDER/logs/rank_NNN.log; on nodes that don't share
    the folder, in a folder of the node's own.

    Args:
        cfg: layout, timeout and device.
        folder: of the run's output.
        device: instead of `cfg.device`.

    Raises:
        ValueError: where the number of processes doesn't fit the layout, there is no such device,
            or nothing can be written into `folder`.
    """
    world = world_of(cfg, folder, device=device)
    if world.size > 1:
        world.on_all(lambda: make_output_dir(folder, "the folder of output"))
        open_rank_log(folder, world)
    return world


def process_beside_server() -> World:
    """The only process of a run for which a server computes: it needs no GPU.

    Raises:
        ValueError: where torchrun started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "with 'server' one process asks for everything: run it without --nproc_per_node and "
            "--nnodes, and set server.concurrency"
        )
    return World(torch.device("cpu"))


def use_cores_in_this_thread() -> None:
    """From now on a thread that begins to use PyTorch computes alone; the calling one doesn't.

    For training on CPUs, where threads beside it prepare batches, write states and run gloo's
    collectives. OpenMP gives each thread that runs a parallel operation a team of its own, which
    stays as long as that thread. While there are more threads in teams than cores, GNU's OpenMP
    lets none of them wait actively for the next operation: those of training sleep and are woken
    at each of theirs, and a small operation takes ten times as long.
    """
    torch.get_num_threads()  # the calling thread takes its number over
    _set_threads_of_others(1)


def use_cores_in_other_threads() -> None:
    """From now on the calling thread computes alone; those that begin to use PyTorch later don't.

    For serving on CPUs, where an engine's thread computes: see `use_cores_in_this_thread`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _set_threads_of_others(threads)


def _set_threads_of_others(threads: int) -> None:
    """It is a setting of the thread that calls, and of all that begin after the call."""
    other = threading.Thread(target=torch.set_num_threads, args=(threads,))
    other.start()
    other.join()
