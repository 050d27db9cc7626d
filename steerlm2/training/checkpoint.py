"""Weights in and out, and the state a stopped run continues from.

Two kinds of files:
- weights: Hugging Face safetensors, read and written by a checkpointer: ours or torchtune's. Where
  a run has none, its weights start from a seed and are written in the same format.
- training state: a torch.distributed.checkpoint directory `checkpoints/step_000100`, each rank
  writing its own shards. It is written under another name and renamed when complete, so that a
  directory of the right name is always whole.
"""

from __future__ import annotations

import contextlib
import json
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
from torch.optim.lr_scheduler import LambdaLR
from torchtune.models.convert_weights import (
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, get_merged_lora_ckpt

from steerlm2.attributes import AttributeSchema
from steerlm2.data.records import first_of
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import Tokenizer, spare_token_id
from steerlm2.models.folders import resolve_checkpoint_dir
from steerlm2.models.llama import context_length, head_shape
from steerlm2.models.reward_head import (
    HF_HEAD,
    RewardHead,
    attribute_names,
    classification_config,
)
from steerlm2.training.config import instantiate
from steerlm2.training.distributed import World
from steerlm2.training.hf_checkpoint import (
    HEAD,
    HFCheckpointer,
    ScratchCheckpointer,
    fresh_weights,
    make_readable,
    plain_name,
    update_json,
)

STATE_FILE = "state.json"
BEST = "best"


class Checkpointer(Protocol):
    """The part of torchtune's checkpointers that the recipes use."""

    def load_checkpoint(self) -> dict[str, Any]: ...

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None: ...


def open_checkpointer(
    component: Mapping[str, Any] | None,
    decoder: TransformerDecoder,
    tokenizer: Tokenizer,
    *,
    seed: int,
    output_dir: str,
) -> Checkpointer:
    """The configured checkpointer, or `ScratchCheckpointer` where there is none.

    Args:
        output_dir: where it writes, unless the component says so itself; "" only reads.

    Raises:
        ValueError: where the folder isn't a checkpoint that the checkpointer can read.
        FileNotFoundError: where it, or a file of it, doesn't exist.
    """
    if component is None:
        return ScratchCheckpointer(decoder, tokenizer, seed=seed, output_dir=output_dir)
    if not component.get("checkpoint_dir"):
        raise ValueError("'checkpointer.checkpoint_dir' is missing: the folder of the checkpoint")
    folder = resolve_checkpoint_dir(component["checkpoint_dir"], "checkpointer.checkpoint_dir")
    arguments = {"output_dir": output_dir} if output_dir else {}
    return instantiate(arguments | dict(component) | {"checkpoint_dir": str(folder)})


def open_reward_checkpointer(
    component: Mapping[str, Any] | None,
    decoder: TransformerDecoder,
    tokenizer: Tokenizer,
    template: Template,
    schema: AttributeSchema,
    *,
    seed: int,
    output_dir: str,
    load_head: bool,
) -> Checkpointer:
    """A checkpointer that writes a LlamaForSequenceClassification with the schema's attributes.

    Args:
        load_head: the checkpoint must be such a model itself, with the same attributes.

    Raises:
        ValueError: as `open_checkpointer`; for torchtune's own, which can't write such a model;
            where `load_head` asks for a head that isn't there or has other attributes.
        FileNotFoundError: as `open_checkpointer`.
    """
    checkpointer = open_checkpointer(
        component, decoder, tokenizer, seed=seed, output_dir=output_dir
    )
    if not isinstance(checkpointer, HFCheckpointer | ScratchCheckpointer):
        raise ValueError(
            "torchtune's checkpointers can't write attribute models: set checkpointer to "
            "{_component_: steerlm2.training.hf_checkpoint.HFCheckpointer, checkpoint_dir: ..., "
            "output_dir: ...}"
        )
    if load_head:
        found = attribute_names(checkpointer.hf_config)
        if found is None:
            raise ValueError(
                "the checkpoint is a language model without a reward head: train one with "
                "reward_distributed, where load_reward_head=false starts with a fresh one"
            )
        if found and found != list(schema.names):
            raise ValueError(
                f"the checkpoint's reward head scores {', '.join(found)}; schema.names has "
                f"{', '.join(schema.names)}: they must be the same, in the same order"
            )
    used = [tokenizer.token_id(token) for token in template.control_tokens]
    checkpointer.set_pad_token(spare_token_id(tokenizer, used), tokenizer)
    checkpointer.hf_config |= classification_config(schema.names)
    return checkpointer


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
    fresh_head: bool = False,
    cpu_offload: bool = False,
) -> None:
    """Fill a laid-out decoder on the meta device with weights, and put it on its device.

    Rank 0 reads them and sends each tensor to the ranks that keep a part of it. Fresh LoRA
    adapters come from the seed.

    Args:
        checkpointer: on rank 0; None on the others.
        seed: of fresh weights.
        fresh_head: the output layer starts from the seed, whatever the checkpoint has.
        cpu_offload: the parameters live on the host (FSDP2's CPU offload).

    Raises:
        ValueError: on every rank, listing missing, unexpected and misshapen tensors.
    """

    def read() -> dict[str, Any]:
        assert checkpointer is not None
        read_weights = checkpointer.load_checkpoint()["model"]
        fresh = dict(get_adapter_params(decoder))
        if fresh_head:
            fresh[HEAD] = decoder.output.weight
        read_weights |= dict(fresh_weights(fresh.items(), seed))
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
    stop_id: int | None = None,
    adapter_only: bool = False,
) -> None:
    """Write the weights in `dtype` as `epoch_{epoch}`; the whole model passes through rank 0.

    LoRA adapters are merged into them, and written apart, in PEFT's format, as
    `output_dir/epoch_{epoch}/adapter`.

    Args:
        stop_id: of a language model, the token that it was trained to end a response with. Servers
            and transformers stop at it without being told.
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
        names = [plain_name(name) for name in get_adapter_params(decoder)]
        adapter = {name: weights[name].clone() for name in names}
        folder = output_dir / f"epoch_{epoch}" / "adapter"
        reward_head = weights[HEAD] if isinstance(decoder.output, RewardHead) else None
        _save_adapter(folder, adapter, lora, head_shape(decoder), reward_head)
        weights = get_merged_lora_ckpt(weights, rank=lora.rank, alpha=lora.alpha)
    if not (lora is not None and adapter_only):
        checkpointer.save_checkpoint({"model": weights}, epoch=epoch)
        if stop_id is not None:
            _stop_at(stop_id, output_dir / f"epoch_{epoch}")


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
    model_state, optimizer_state = get_state_dict(
        decoder, optimizer, options=StateDictOptions(ignore_frozen_params=True)
    )
    tensors = {"model": model_state, "optimizer": optimizer_state}
    _write(folder / f"step_{step:06d}", tensors, {"step": step, **state}, world, random=True)
    if world.is_main and keep_last_n is not None:
        for old in checkpoints(folder)[:-keep_last_n]:
            shutil.rmtree(old)
    world.barrier()


def save_best_weights(
    folder: Path, step: int, decoder: nn.Module, state: Mapping[str, Any], world: World
) -> None:
    """Write `folder/best`: the trained weights alone, and `state` (JSON values) with the step."""
    options = StateDictOptions(ignore_frozen_params=True)
    tensors = {"model": get_model_state_dict(decoder, options=options)}
    _write(folder / BEST, tensors, {"step": step, **state}, world)


def best_state(folder: Path) -> dict[str, Any] | None:
    """The `state` that was saved with the best weights, with its step; None where there are none.

    Raises:
        ValueError: where the file can't be read as JSON.
    """
    file = folder / BEST / STATE_FILE
    return json.loads(file.read_text()) if file.exists() else None


def load_best_weights(folder: Path, decoder: nn.Module, world: World) -> None:
    """Give the decoder the weights of `folder/best`."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    tensors = {"model": get_model_state_dict(decoder, options=options)}
    with _plain_messages():
        dcp.load(tensors, checkpoint_id=folder / BEST, no_dist=world.mesh is None)
    set_model_state_dict(decoder, tensors["model"], options=options)


def _write(
    final: Path,
    tensors: dict[str, Any],
    state: Mapping[str, Any],
    world: World,
    *,
    random: bool = False,
) -> None:
    """A directory that has its name only when it is complete; an earlier one stays until then."""
    partial = final.with_suffix(".partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    with _plain_messages():
        dcp.save(tensors, checkpoint_id=partial, no_dist=world.mesh is None)
    if random:
        torch.save(_random_state(world.device), partial / f"random_{world.rank}.pt")
    world.barrier()
    if world.is_main:
        (partial / STATE_FILE).write_text(json.dumps(state))
        earlier = final.with_suffix(".earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if final.exists():
            final.rename(earlier)
        partial.rename(final)
        shutil.rmtree(earlier, ignore_errors=True)
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


def resume_training(
    folder: Path,
    decoder: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LambdaLR,
    data_state: Mapping[str, Any],
    world: World,
) -> tuple[Path, int] | None:
    """Continue from the newest checkpoint of a folder.

    Weights, the optimizer's moments and the random states are the checkpoint's; the optimizer's
    settings and the learning rate schedule are the config's, at the checkpoint's step.

    Args:
        data_state: what the order of the batches depends on, as `save_training_state` got it.

    Returns:
        The checkpoint and its step; None where there is no checkpoint.

    Raises:
        ValueError: where the checkpoint is of another model or another order of the data.
    """
    newest = world.from_main(world.on_main(lambda: checkpoints(folder)[-1:]))
    if not newest:
        return None
    configured = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = load_training_state(newest[0], decoder, optimizer, world)
    if state["data"] != data_state:
        raise ValueError(
            f"{newest[0]} was written with {state['data']}, this run has {dict(data_state)}: "
            "resuming would go on with something else. Use the same data set, data.shuffle, "
            "global_batch_size, seed and whatever else differs, or start in another output_dir."
        )
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)
    lr_scheduler.last_epoch = state["step"]
    for group, base_lr, factor in zip(
        optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base_lr * factor(state["step"])
    return newest[0], state["step"]


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


def _stop_at(stop_id: int, folder: Path) -> None:
    """Make a token the first of those that end a generation."""
    file = folder / "generation_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    config = json.loads((folder / "config.json").read_text())
    ends = known.get("eos_token_id", config.get("eos_token_id"))
    others = ends if isinstance(ends, list) else [ends]
    ids = [stop_id, *(i for i in others if i not in (stop_id, None))]
    update_json(file, {"eos_token_id": ids})


def _save_adapter(
    folder: Path,
    adapter: Mapping[str, Tensor],
    lora: LoRALinear,
    heads: Mapping[str, int],
    reward_head: Tensor | None,
) -> None:
    """A PEFT adapter. In a folder of its own: transformers would add one that it finds beside the
    merged weights to them once more."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tune_to_peft_adapter_weights(adapter, **heads)
    modules = sorted({name.split(".")[-3] for name in adapter})
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": modules}
    config = {"peft_type": "LORA"} | tune_to_peft_adapter_config(config)
    if reward_head is not None:
        tensors[f"base_model.model.{HF_HEAD}"] = reward_head
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    _save_tensors(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    make_readable(file.parent)


def _check_shapes(decoder: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = {plain_name(name): p.shape for name, p in decoder.named_parameters()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"{name} is not in the model" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the model's is {list(expected[name])}"
        for name in sorted(expected.keys() & weights.keys())
        if expected[name] != weights[name].shape
    ]
    if problems:
        raise ValueError(
            "the checkpoint doesn't fit the model in the config; check `model` and "
            "`checkpointer.checkpoint_dir`:\n  - " + "\n  - ".join(first_of(problems))
        )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
