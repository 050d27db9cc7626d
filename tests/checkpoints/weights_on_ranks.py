"""Weights read into gloo ranks and written by them, for test_hf_weights.py.

    python weights_on_ranks.py small FOLDER
    python weights_on_ranks.py large FOLDER

small: FOLDER/MODEL is read on every layout, and written as FOLDER/LAYOUT/MODEL/epoch_1.
large: FOLDER/model is read on 4 ranks; FOLDER/large.pt holds what each rank measured.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from steerlm2.checkpoints import safetensors_io
from steerlm2.checkpoints.checkpointer import HFCheckpointer
from steerlm2.checkpoints.hf_names import to_hf
from steerlm2.checkpoints.weights import load_weights, save_weights
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.models.decoders import head_shape
from steerlm2.models.reward_head import add_reward_head

LAYOUTS: dict[str, dict[str, int]] = {
    "fsdp3": {"size": 3},
    "tp2": {"size": 2, "tensor_parallel_dim": 2},
    "tp2_fsdp2": {"size": 4, "tensor_parallel_dim": 2},
    "hsdp2x2": {"size": 4, "data_parallel_replicate_dim": 2},
}
SMALL: dict[str, Any] = {
    "vocab_size": 514,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 36,
    "max_seq_len": 64,
    "intermediate_dim": 46,
}
"""Rows that 3 ranks share unevenly: 12 of k_proj are 2 heads, 514 = 172 + 172 + 170."""
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
LARGE: dict[str, Any] = {
    "vocab_size": 32000,
    "num_layers": 4,
    "num_heads": 16,
    "num_kv_heads": 8,
    "embed_dim": 2048,
    "max_seq_len": 64,
    "intermediate_dim": 2816,
}
"""251M parameters, of which the two largest tensors have 66M each."""


def build(model: str) -> TransformerDecoder:
    """On the meta device."""
    with torch.device("meta"):
        if model == "tied":
            return llama3_2(**SMALL)
        if model == "lora":
            decoder = lora_llama3(**LORA, **SMALL)
            set_trainable_params(decoder, get_adapter_params(decoder))
            return decoder
        decoder = llama3(**(LARGE if model == "large" else SMALL))
        if model == "classifier":
            add_reward_head(decoder, 3)
        return decoder


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def small(world: World, folder: Path, layout: str) -> None:
    safetensors_io.MAX_SHARD_SIZE = "40KB"
    for model in ("language", "tied", "classifier", "lora"):
        source = folder / ("language" if model == "lora" else model)
        decoder = build(model)
        parallelize(decoder, world, dtype=torch.float32)
        output_dir = folder / layout / model
        checkpointer = HFCheckpointer(str(source), str(output_dir)) if world.is_main else None
        load_weights(decoder, checkpointer, world, seed=3)
        state = {name: whole(p) for name, p in decoder.named_parameters()}
        if model == "lora":
            with torch.no_grad():
                for name, parameter in decoder.named_parameters():
                    if "lora_b" in name:
                        parameter.fill_(0.25)
        save_weights(
            decoder, checkpointer, world, epoch=1, dtype=torch.float32, output_dir=output_dir
        )
        if world.is_main:
            torch.save(state, output_dir / "loaded.pt")
    fails_on_one_rank(world, folder)


def fails_on_one_rank(world: World, folder: Path) -> None:
    """A file is lost on rank 1 alone: all ranks say so."""
    source = folder / "language"
    checkpointer = HFCheckpointer(str(source)) if world.is_main else None
    if world.rank == 1:
        safetensors_io.safe_open = lost
    decoder = build("language")
    parallelize(decoder, world, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^on rank 1: {source}/.* can't be read: lost"):
        load_weights(decoder, checkpointer, world, seed=3)


def lost(*args: Any, **kwargs: Any) -> None:
    raise FileNotFoundError("lost")


def memory(kind: str) -> int:
    """Bytes of this process: RssAnon is what no file could give back."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_of(action: Callable[[], Any]) -> int:
    """Most of RssAnon while it runs."""
    done = threading.Event()
    seen = [memory("RssAnon")]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(memory("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    action()
    done.set()
    thread.join()
    return max(seen)


def large(world: World, folder: Path, layout: str) -> None:
    decoder = build("large").to(torch.bfloat16)
    checkpointer = HFCheckpointer(str(folder / "model")) if world.is_main else None
    parallelize(decoder, world, dtype=torch.bfloat16)
    before = memory("RssAnon")
    peak = peak_of(lambda: load_weights(decoder, checkpointer, world, seed=0))
    local = [p.to_local() for p in decoder.parameters() if isinstance(p, DTensor)]
    shards = sum(tensor.nbytes for tensor in local)
    measured = {"extra": peak - before - shards, "shards": shards, "read": memory("RssFile")}
    everyones: list[Any] = [None] * world.size
    dist.all_gather_object(everyones, measured)
    theirs: dict[str, Tensor] = {}
    if world.is_main:
        from transformers import AutoModelForCausalLM  # seconds, for one rank only

        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
        theirs = model.state_dict()
    heads = head_shape(decoder)
    different = []
    for name, parameter in decoder.named_parameters():
        hf_name, tensor = to_hf(name, whole(parameter), heads, is_classifier=False)
        if world.is_main and not torch.equal(tensor, theirs.pop(hf_name)):
            different.append(name)
    if world.is_main:
        out = {"ranks": everyones, "different": different, "left": list(theirs)}
        torch.save(out, folder / "large.pt")


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    find_out = {"small": small, "large": large}[what]
    for layout in LAYOUTS if what == "small" else ["tp2_fsdp2"]:

        def work(world: World, layout: str = layout) -> None:
            find_out(world, folder, layout)

        run_on_ranks(work, **LAYOUTS[layout])


if __name__ == "__main__":
    main()
