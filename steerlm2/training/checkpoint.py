"""Weights in and out, and the state a stopped run continues from.

Two kinds of files:
- weights: Hugging Face safetensors, read and written by a torchtune checkpointer. Where a run has
  none, its weights start from a seed (`ScratchCheckpointer`) and are written in the same format.
- training state: a torch.distributed.checkpoint directory `checkpoints/step_000100`, each rank
  writing its own shards. It is written under another name and renamed when complete, so that a
  directory of the right name is always whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torchtune.models.convert_weights import (
    tune_to_hf,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, get_merged_lora_ckpt

from steerlm2.data.tokenizers import Tokenizer
from steerlm2.models.llama import context_length, head_shape, hf_config
from steerlm2.training.config import instantiate
from steerlm2.training.distributed import World

INIT_STD = 0.02
"""Standard deviation of fresh weight matrices (GPT-2's)."""

STATE_FILE = "state.json"


class Checkpointer(Protocol):
    """The part of torchtune's checkpointers that the recipes use."""

    def load_checkpoint(self) -> dict[str, Any]: ...

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None: ...


class ScratchCheckpointer:
    """A checkpointer for a decoder that starts from a seed: fresh weights in, a full folder out.

    Args:
        decoder: gives names and shapes; may be on the meta device.
        tokenizer: saved beside the weights.
        seed: two decoders of one shape and seed start with the same weights.
        output_dir: where `epoch_{n}` folders go.
    """

    def __init__(
        self, decoder: TransformerDecoder, tokenizer: Tokenizer, *, seed: int, output_dir: str
    ) -> None:
        self.hf_config = hf_config(decoder)
        self.heads = head_shape(decoder)
        self.weights = dict(_fresh_weights(decoder.named_parameters(), seed))
        self.tokenizer = tokenizer
        self.output_dir = Path(output_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        return {"model": self.weights}

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None:
        folder = self.output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        weights = tune_to_hf(state_dict["model"], **self.heads)
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        config = self.hf_config | {"torch_dtype": dtype, "eos_token_id": self.tokenizer.eos_id}
        _save_tensors(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save(str(folder))


def open_checkpointer(
    component: Mapping[str, Any] | None,
    decoder: TransformerDecoder,
    tokenizer: Tokenizer,
    *,
    seed: int,
    output_dir: str,
) -> Checkpointer:
    """The configured torchtune checkpointer, or `ScratchCheckpointer` where there is none.

    Raises:
        ValueError: where the folder isn't a checkpoint that the checkpointer can read.
        FileNotFoundError: where it, or a file of it, doesn't exist.
    """
    if component is None:
        return ScratchCheckpointer(decoder, tokenizer, seed=seed, output_dir=output_dir)
    folder = Path(str(component.get("checkpoint_dir")))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder.absolute()} has no config.json: checkpointer.checkpoint_dir must be a "
            "downloaded Hugging Face checkpoint (`tune download NAME --output-dir DIR`)"
        )
    return instantiate(component)


def check_vocabulary(decoder: TransformerDecoder, tokenizer: Tokenizer) -> None:
    """Raises:
    ValueError: where the tokenizer has ids that the model has no embedding for.
    """
    if tokenizer.vocab_size > decoder.tok_embeddings.num_embeddings:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{decoder.tok_embeddings.num_embeddings} embeddings: `tokenizer` and `model` must be "
            "of one checkpoint"
        )


def check_context(decoder: TransformerDecoder, longest: int) -> None:
    """Raises:
    ValueError: where a prompt with its response is longer than the model's context.
    """
    if longest > context_length(decoder):
        raise ValueError(
            f"a prompt with its response has {longest} tokens, more than the model's context of "
            f"{context_length(decoder)}: set a smaller max_seq_len"
        )


def load_weights(
    decoder: TransformerDecoder,
    checkpointer: Checkpointer | None,
    world: World,
    *,
    seed: int,
    cpu_offload: bool = False,
) -> None:
    """Fill a laid-out decoder on the meta device with weights, and put it on its device.

    Rank 0 reads them and sends each tensor to the ranks that keep a part of it. Fresh LoRA
    adapters come from the seed.

    Args:
        checkpointer: on rank 0; None on the others.
        seed: of the fresh adapters.
        cpu_offload: the parameters live on the host (FSDP2's CPU offload).

    Raises:
        ValueError: on every rank, listing missing, unexpected and misshapen tensors.
    """

    def read() -> dict[str, Any]:
        assert checkpointer is not None
        read_weights = checkpointer.load_checkpoint()["model"]
        read_weights |= dict(_fresh_weights(get_adapter_params(decoder).items(), seed))
        _check_shapes(decoder, read_weights)
        return read_weights

    weights = world.on_main(read) or {}
    decoder.to_empty(device="cpu" if cpu_offload else world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.mesh is not None)
    set_model_state_dict(decoder, weights, options=options)
    with world.device:
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()


def save_weights(
    decoder: TransformerDecoder,
    checkpointer: Checkpointer | None,
    world: World,
    *,
    epoch: int,
    dtype: torch.dtype,
    output_dir: Path,
    adapter_only: bool = False,
) -> None:
    """Write the weights in `dtype` as `epoch_{epoch}`; the whole model passes through rank 0.

    LoRA adapters are merged into them, and written apart, in PEFT's format, as
    `output_dir/epoch_{epoch}/adapter`.

    Args:
        adapter_only: write the adapters alone, not the merged model.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(decoder, options=options)
    if not world.is_main:
        return
    assert checkpointer is not None
    lora = next((m for m in decoder.modules() if isinstance(m, LoRALinear)), None)
    # merging changes tensors in place, and on a CPU they may be the model's own
    weights = {
        name: cast(Tensor, full.pop(name)).to(dtype, copy=lora is not None) for name in list(full)
    }
    if lora is not None:
        names = [_plain_name(name) for name in get_adapter_params(decoder)]
        adapter = {name: weights[name].clone() for name in names}
        folder = output_dir / f"epoch_{epoch}" / "adapter"
        _save_adapter(folder, adapter, lora, head_shape(decoder))
        weights = get_merged_lora_ckpt(weights, rank=lora.rank, alpha=lora.alpha)
    if not (lora is not None and adapter_only):
        checkpointer.save_checkpoint({"model": weights}, epoch=epoch)


def save_training_state(
    folder: Path,
    step: int,
    decoder: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    world: World,
    *,
    keep_last_n: int | None = None,
) -> None:
    """Write `folder/step_{step}`: weights, optimizer, random states and `state` (JSON values)."""
    final = folder / f"step_{step:06d}"
    partial = final.with_suffix(".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    model_state, optimizer_state = get_state_dict(
        decoder, optimizer, options=StateDictOptions(ignore_frozen_params=True)
    )
    tensors = {"model": model_state, "optimizer": optimizer_state}
    with _plain_messages():
        dcp.save(tensors, checkpoint_id=partial, no_dist=world.mesh is None)
    torch.save(_random_state(world.device), partial / f"random_{world.rank}.pt")
    world.barrier()
    if world.is_main:
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}))
        partial.rename(final)
        if keep_last_n is not None:
            for old in checkpoints(folder)[:-keep_last_n]:
                shutil.rmtree(old)
    world.barrier()


@contextlib.contextmanager
def _plain_messages() -> Iterator[None]:
    """The first rank's own error, not a BaseException around it; no note on a single process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete training states in a folder, oldest first."""
    found = (path.parent for path in folder.glob(f"step_*[0-9]/{STATE_FILE}"))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def load_training_state(
    checkpoint: Path, decoder: nn.Module, optimizer: Optimizer, world: World
) -> dict[str, Any]:
    """Restore weights, optimizer and random states; returns the JSON `state` with its `step`.

    Raises:
        ValueError: where the checkpoint is of another model.
    """
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    model_state, optimizer_state = get_state_dict(decoder, optimizer, options=options)
    tensors: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        with _plain_messages():
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=world.mesh is None)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} can't be resumed with this config's `model` ({error}): use the model it "
            "was written with, or another output_dir"
        ) from error
    set_state_dict(
        decoder,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=options,
    )
    random_file = checkpoint / f"random_{world.rank}.pt"
    if random_file.exists():  # none for a rank that the saving run didn't have
        random_state = torch.load(random_file)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and world.device.type == "cuda":
            torch.cuda.set_rng_state(random_state["cuda"], world.device)
    return json.loads((checkpoint / STATE_FILE).read_text())


def _save_adapter(
    folder: Path, adapter: Mapping[str, Tensor], lora: LoRALinear, heads: Mapping[str, int]
) -> None:
    """A PEFT adapter. In a folder of its own: transformers would add one that it finds beside the
    merged weights to them once more."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tune_to_peft_adapter_weights(adapter, **heads)
    _save_tensors(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in adapter})
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": modules}
    config = {"peft_type": "LORA"} | tune_to_peft_adapter_config(config)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})


def _fresh_weights(
    parameters: Iterator[tuple[str, Tensor]] | Any, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Initial values by name and shape: norms 1, LoRA as in its paper, other matrices normal."""
    for i, (name, parameter) in enumerate(parameters):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        weight = torch.empty(parameter.shape)
        if name.endswith("lora_b.weight"):
            nn.init.zeros_(weight)
        elif name.endswith("lora_a.weight"):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        elif weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=INIT_STD, generator=generator)
        yield _plain_name(name), weight


def _plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing puts in."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _check_shapes(decoder: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = {_plain_name(name): p.shape for name, p in decoder.named_parameters()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the model's is {list(expected[name])}"
        for name in sorted(expected.keys() & weights.keys())
        if expected[name] != weights[name].shape
    ]
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ValueError(
            "the checkpoint doesn't fit the model in the config; check `model` and "
            "`checkpointer.checkpoint_dir`:\n  - " + "\n  - ".join(problems[:10] + more)
        )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
