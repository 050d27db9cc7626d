"""States saved on one layout of gloo ranks and resumed on others, for test_training_state.py.

    python states_on_ranks.py FOLDER

FOLDER/LAYOUT.pt holds what a layout found. The first one trains, saves in the midst of it, and goes
on; the others resume from its state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchtune.models.llama3 import llama3

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.training_state import StateWriter, resume_training
from steerlm2.checkpoints.weights import load_weights
from steerlm2.data.packing import Group, pack
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import clip_gradients, parallelize
from steerlm2.distributed.world import World
from steerlm2.training.forward import response_logps

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2_fsdp2": {"size": 4, "tensor_parallel_dim": 2},
    "tp2_fsdp2_again": {"size": 4, "tensor_parallel_dim": 2},
    "fsdp4": {"size": 4},
    "hsdp2x2": {"size": 4, "data_parallel_replicate_dim": 2},
    "fsdp2": {"size": 2},
    "tp2": {"size": 2, "tensor_parallel_dim": 2},
    "plain": {"size": 1},
}
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 46,
}
STEPS, SAVED = 5, 3
DATA = {"seed": 5}


def groups() -> list[Group]:
    """4 for a step, of fixed tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 512, (4, 40), generator=generator).tolist()
    return [Group(row[:8], [row[8 : 12 + i], row[20:]]) for i, row in enumerate(tokens)]


class Run:
    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        with torch.device("meta"):
            self.decoder = llama3(**SIZES)
        source = ScratchCheckpointer(self.decoder, tiny_tokenizer(), seed=0, output_dir="")
        parallelize(self.decoder, world, dtype=torch.float32)
        load_weights(self.decoder, source if world.is_main else None, world, seed=0)
        self.parameters = list(self.decoder.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2)
        self.schedule = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.states = StateWriter(folder / "checkpoints", world)

    def step(self) -> float:
        """Minus the sum of all log-probs, before the update."""
        mine = groups()[self.world.dp_rank :: self.world.dp_size]
        logps_N = response_logps(
            self.decoder, pack(mine, multiple_of=self.world.tp_size), self.world
        )
        (-logps_N.sum() * self.world.dp_size / 100).backward()
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return -self.world.sum(logps_N.detach().double().sum()).item()

    def weights(self) -> dict[str, Tensor]:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.decoder.named_parameters()
        }


def compute(world: World, folder: Path, layout: str) -> dict[str, Any]:
    run = Run(world, folder)
    losses: list[float] = []
    if layout == "tp2_fsdp2":
        for step in range(STEPS):
            losses.append(run.step())
            if step + 1 == SAVED:
                run.states.save_best(SAVED, run.decoder, {})  # its copy of the weights is shared
                run.states.save(SAVED, run.decoder, run.optimizer, {"data": DATA})
        run.states.wait()  # the last steps were made while it was written
    else:
        found = resume_training(
            folder / "checkpoints", run.decoder, run.optimizer, run.schedule, DATA, world
        )
        assert found is not None
        assert found[1] == SAVED
        losses = [run.step() for _ in range(SAVED, STEPS)]
    return {"losses": losses, "weights": run.weights(), "pause": run.states.take_pause()}


def main() -> None:
    folder = Path(sys.argv[1])
    for layout, options in LAYOUTS.items():

        def work(world: World, layout: str = layout) -> None:
            found = compute(world, folder, layout)
            if world.is_main:
                torch.save(found, folder / f"{layout}.pt")

        run_on_ranks(work, **options)


if __name__ == "__main__":
    main()
