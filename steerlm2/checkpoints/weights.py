"""Loading a laid-out decoder's weights, and saving them, with a checkpointer.

The checkpointer is one of this package or of torchtune. A run without one starts with fresh weights
from a seed, and writes the same format.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune.models.convert_weights import tune_to_peft_adapter_config
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params
from torchtune.modules.tied_linear import TiedLinear

from steerlm2.attributes import AttributeSchema, check_same_attributes
from steerlm2.checkpoint_dirs import (
    WEIGHT_SUFFIXES,
    read_json,
    resolve_checkpoint_dir,
    weight_files,
)
from steerlm2.checkpoints.checkpointer import (
    FolderCheckpointer,
    HFCheckpointer,
    ScratchCheckpointer,
    fresh_weights,
    plain_name,
)
from steerlm2.checkpoints.hf_names import EMBEDDING, HEAD, peft_name, rows_to_hf
from steerlm2.checkpoints.model_card import checkpoint_name, write_card
from steerlm2.checkpoints.safetensors_io import (
    StoredTensor,
    checkpoint_digest,
    copy_part,
    read_weights,
    write_safetensors,
    write_weights,
)
from steerlm2.checkpoints.side_files import (
    GENERATION_CONFIG,
    MODEL_CARD,
    SIDE_FILES,
    TrainedText,
    check_side_files,
    config_of_run,
    generation_config,
    seal,
    tokenizer_of,
    write_generation_config,
    write_json,
    write_tokenizer,
)
from steerlm2.config.loader import instantiate
from steerlm2.data.jsonl import shortened
from steerlm2.data.templates import Template
from steerlm2.data.tokenizers import Tokenizer, spare_token_id
from steerlm2.distributed.world import World
from steerlm2.facts import FACTS_FILE, ModelFacts, write_facts
from steerlm2.files import SUMS_FILE, check_unchanged, read_sums, write_durably
from steerlm2.models.config_json import check_decoder, exported_config
from steerlm2.models.decoders import HeadShape, context_length, head_shape
from steerlm2.models.nf4 import dequantized, finish_empty, is_nf4
from steerlm2.models.reward_head import (
    HF_HEAD,
    RewardHead,
    attribute_names,
    classification_config,
)

ADAPTER = "adapter"
"""In an export: a folder with a LoRA adapter alone."""

_OF_AN_EXPORT = re.compile(
    r"(model(-\d+-of-\d+)?|pytorch_model|adapter_model)(\.(safetensors|bin|pt|pth))?(\.index\.json)?"
    r"|adapter_config\.json|config\.json|" + "|".join(map(re.escape, SIDE_FILES))
)
"""Files that torchtune's checkpointers write, and that are written again after them."""


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

    What it writes into config.json describes the decoder.

    Args:
        output_dir: where it writes, unless the component has its own output_dir; "" only reads.

    Raises:
        ValueError: where the folder isn't a checkpoint that the checkpointer can read, the decoder
            doesn't compute what its config.json describes, or has too few embeddings for the
            tokenizer.
        FileNotFoundError: where it, or a file of it, doesn't exist.
    """
    if component is None:
        check_vocabulary(decoder, tokenizer)
        return ScratchCheckpointer(decoder, tokenizer, seed=seed, output_dir=output_dir)
    if not component.get("checkpoint_dir"):
        raise ValueError("'checkpointer.checkpoint_dir' is missing: the folder of the checkpoint")
    folder = resolve_checkpoint_dir(component["checkpoint_dir"], "checkpointer.checkpoint_dir")
    values = read_json(folder / "config.json")
    check_decoder(decoder, values, folder)
    check_vocabulary(decoder, tokenizer)
    _check_row_order(decoder, component.get("model_type"))
    arguments = {"output_dir": output_dir} if output_dir else {}
    checkpointer = instantiate(arguments | dict(component) | {"checkpoint_dir": str(folder)})
    if isinstance(checkpointer, HFCheckpointer):
        checkpointer.hf_config = exported_config(decoder, values)
    else:  # ours checks what it loads
        check_unchanged(folder, [n for n in read_sums(folder) if Path(n).suffix in WEIGHT_SUFFIXES])
    return checkpointer


def _check_row_order(decoder: TransformerDecoder, model_type: Any) -> None:
    """Check that a torchtune checkpointer, if it is one, reads the rows in the decoder's order.

    Raises:
        ValueError: where its `model_type` is of another family, whose weights would load silently.
    """
    if model_type is None or ("QWEN" in str(model_type).upper()) == (
        head_shape(decoder).rotates_halves
    ):
        return
    raise ValueError(
        f"checkpointer.model_type {model_type} reads queries and keys in another order of rows "
        "than `model` has them: set it to the model's family, or `checkpointer` to "
        "steerlm2.checkpoints.HFCheckpointer, which knows it from config.json"
    )


def check_start(component: Mapping[str, Any] | None) -> None:
    """Check the small files of the checkpoint that a run starts from, before its data are read.

    Raises:
        ValueError: naming a damaged file.
    """
    if component is not None and component.get("checkpoint_dir"):
        folder = resolve_checkpoint_dir(component["checkpoint_dir"], missing_ok=True)
        check_side_files(folder)
        weight_files(folder)


def start_digest(component: Mapping[str, Any] | None) -> str:
    """A digest of the checkpoint that a run starts from; of no files where it starts afresh."""
    if component is None:
        return "fresh weights"
    return checkpoint_digest(resolve_checkpoint_dir(component["checkpoint_dir"]))


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
    """A checkpointer that writes a classifier of the model's family with the schema's attributes.

    Args:
        load_head: whether the checkpoint must be such a model, with the same attributes.

    Raises:
        ValueError: as `open_checkpointer`; for torchtune's checkpointers, which can't write such a
            model; with `load_head`, where the checkpoint has no reward head or other attributes.
        FileNotFoundError: as `open_checkpointer`.
    """
    checkpointer = open_checkpointer(
        component, decoder, tokenizer, seed=seed, output_dir=output_dir
    )
    if not isinstance(checkpointer, FolderCheckpointer):
        raise ValueError(
            "torchtune's checkpointers can't write attribute models: set checkpointer to "
            "{_component_: steerlm2.checkpoints.HFCheckpointer, checkpoint_dir: ..., "
            "output_dir: ...}"
        )
    if load_head:
        found = attribute_names(checkpointer.hf_config)
        if found is None:
            raise ValueError(
                "the checkpoint is a language model without a reward head: train one with "
                "reward_distributed, where load_reward_head=false starts with a fresh one"
            )
        if found:
            check_same_attributes(schema, found, "the checkpoint's reward head")
    used = [tokenizer.token_id(token) for token in template.control_tokens]
    checkpointer.set_pad_token(spare_token_id(tokenizer, used), TrainedText(tokenizer, template))
    checkpointer.hf_config |= classification_config(
        schema.names, checkpointer.hf_config["model_type"]
    )
    return checkpointer


def check_vocabulary(decoder: TransformerDecoder, tokenizer: Tokenizer) -> None:
    """Check that the model has an embedding for every token of the tokenizer.

    Raises:
        ValueError: where it doesn't.
    """
    if tokenizer.vocab_size > decoder.tok_embeddings.num_embeddings:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{decoder.tok_embeddings.num_embeddings} embeddings: `tokenizer` and `model` must be "
            "of one checkpoint; a model without a checkpoint takes "
            f"model.vocab_size={tokenizer.vocab_size}"
        )


def check_context(decoder: TransformerDecoder, longest: int) -> None:
    """Check that a prompt with its response fits into the model's context.

    Args:
        longest: tokens of the longest prompt with its response.

    Raises:
        ValueError: where it doesn't.
    """
    if longest > context_length(decoder):
        raise ValueError(
            f"a prompt with its response may have {longest} tokens, more than the model's context "
            f"of {context_length(decoder)}: set max_seq_len to that, or less"
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

    With an `HFCheckpointer` every rank reads its own shards from the files. Another checkpointer's
    full state dict is read by rank 0 and broadcast. Fresh LoRA adapters come from the seed.

    Args:
        checkpointer: on rank 0; None on the others.
        seed: of fresh weights.
        fresh_head: the output layer starts from the seed, also if the checkpoint has one.
        cpu_offload: the parameters are kept on the host (FSDP2's CPU offload).

    Raises:
        ValueError: on every rank, listing missing, unexpected and misshapen tensors, or the ranks
            that can't read a file.
    """
    heads = head_shape(decoder)
    expected = {plain_name(name): p.shape for name, p in decoder.named_parameters()}
    fresh = dict(get_adapter_params(decoder))
    if fresh_head:
        fresh[HEAD] = decoder.output.weight
    is_fresh = {plain_name(name) for name in fresh}

    def check_files() -> None:  # each rank some of them; what it reads stays in the page cache
        if folder is not None:
            check_unchanged(folder, weight_files(folder)[world.rank :: world.size])

    def find() -> dict[str, StoredTensor] | None:
        if not isinstance(checkpointer, HFCheckpointer):
            return None
        stored = checkpointer.stored_tensors()
        if isinstance(decoder.output, TiedLinear) and checkpointer.is_tied:
            _check_tied(stored.pop(HEAD, None), stored.get(EMBEDDING), heads)
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        _check_shapes(expected, shapes | {name: expected[name] for name in is_fresh})
        return stored

    def read_whole() -> dict[str, Any]:
        assert checkpointer is not None
        weights = checkpointer.load_checkpoint()["model"] | dict(fresh_weights(fresh.items(), seed))
        _check_shapes(expected, {name: tensor.shape for name, tensor in weights.items()})
        return weights

    ours = checkpointer.checkpoint_dir if isinstance(checkpointer, HFCheckpointer) else None
    folder = world.from_main(ours)
    stored = world.from_main(world.on_main(find))
    world.on_all(check_files)
    whole = world.on_main(read_whole) if stored is None else None
    device = torch.device("cpu") if cpu_offload else world.device
    decoder.to_empty(device=device)
    finish_empty(decoder, device)
    if stored is None:
        quantized = {
            plain_name(name): p for name, p in decoder.named_parameters() if is_nf4(_local(p))
        }
        for name, parameter in quantized.items():
            copy_part(
                parameter, _of_main(whole.pop(name) if whole else None, parameter.shape, world)
            )
        options = StateDictOptions(
            full_state_dict=True,
            broadcast_from_rank0=world.mesh is not None,
            strict=not quantized,
        )
        set_model_state_dict(decoder, whole or {}, options=options)
    else:
        parameters = {plain_name(name): p for name, p in decoder.named_parameters()}
        read = {name: p for name, p in parameters.items() if name not in is_fresh}
        world.on_all(lambda: read_weights(read, stored, heads))
        for name, value in fresh_weights(fresh.items(), seed):
            copy_part(parameters[name], value)
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
    text: TrainedText | None = None,
    facts: ModelFacts | None = None,
    adapter_only: bool = False,
) -> Path:
    """Write the weights in `dtype` as `epoch_{epoch}`, with LoRA adapters merged into them.

    The ranks take turns to write the files, and no rank ever has the full model, except rank 0 with
    a torchtune checkpointer. LoRA adapters are also written separately, in PEFT's format and with
    the files of the tokenizer, to `output_dir/epoch_{epoch}/adapter`.

    Args:
        checkpointer: on rank 0; None on the others.
        dtype: of the files.
        text: of a language model, what it was trained on: its tokenizer comes along, and the stop
            token is the end of a text in every file that says so.
        facts: what the export says of itself.
        adapter_only: write only the adapters, not the merged model.

    Returns:
        The folder.

    Raises:
        ValueError: on every rank, where a rank can't write.
        OSError: instead of ValueError, in a run of a single process.
    """
    for module in decoder.modules():
        # After a forward without a backward some layers are still unsharded, in the dtype of
        # computation, which is rounded from the trained parameters.
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = {plain_name(name): p for name, p in decoder.named_parameters()}
    adapters = [plain_name(name) for name in get_adapter_params(decoder)]
    lora = next((m for m in decoder.modules() if isinstance(m, LoRALinear)), None)
    folder = output_dir / f"epoch_{epoch}"

    def whole(name: str) -> Tensor:
        return _full_tensor(parameters[name], world)

    def merged(name: str) -> Tensor:
        layer = name.removesuffix("weight")
        if f"{layer}lora_a.weight" not in adapters:
            return whole(name)
        assert lora is not None
        b, a = (whole(f"{layer}lora_{which}.weight").float() for which in "ba")
        return whole(name).float() + (lora.alpha / lora.rank) * b @ a

    if isinstance(checkpointer, FolderCheckpointer):
        checkpointer.text, checkpointer.facts = text or checkpointer.text, facts

    if lora is not None:
        tensors = {name: whole(name).to("cpu", dtype) for name in adapters}
        is_reward_model = isinstance(decoder.output, RewardHead)
        head = whole(HEAD).to("cpu", dtype) if is_reward_model else None

        def save_adapter() -> None:
            alone = folder / ADAPTER
            base = checkpointer.checkpoint_dir if isinstance(checkpointer, HFCheckpointer) else None
            _save_adapter(alone, tensors, lora, head_shape(decoder), head, base)
            if isinstance(checkpointer, FolderCheckpointer):
                checkpointer.write_side_files(alone, is_adapter=True)
            elif text is not None:
                write_tokenizer(alone, text, text.tokenizer.pad_id, facts)
                if facts is not None:
                    write_facts(alone, facts)
                    write_card(alone, facts, is_adapter=True)
            seal(alone)

        world.on_main(save_adapter)
        if adapter_only:
            return folder
    shapes = {name: p.shape for name, p in parameters.items() if name not in adapters}
    if world.from_main(isinstance(checkpointer, FolderCheckpointer)):
        ours = cast(FolderCheckpointer, checkpointer)
        sums = write_weights(
            cast(Path, world.from_main(world.on_main(lambda: ours.begin(epoch)))),
            shapes,
            merged,
            world,
            dtype=dtype,
            heads=head_shape(decoder),
            is_classifier=isinstance(decoder.output, RewardHead),
        )
        world.on_main(lambda: ours.finish(epoch, dtype, sums))
    else:
        weights = {}
        for name in shapes:
            tensor = merged(name)
            if world.is_main:
                weights[name] = tensor.to("cpu", dtype)
        theirs = cast(Checkpointer, checkpointer)

        def save_theirs() -> None:
            theirs.save_checkpoint({"model": weights}, epoch=epoch)
            if type(theirs).__module__.startswith("torchtune."):
                _remove_copies(folder, has_adapter=lora is not None, has_card=facts is not None)
            if text is not None:
                _rewrite_side_files(folder, text, facts)

        world.on_main(save_theirs)
    return folder


def _remove_copies(folder: Path, *, has_adapter: bool, has_card: bool) -> None:
    """Remove what torchtune's checkpointers copy of a checkpoint: code, other formats, and what
    links lead to."""
    copies = [path for path in folder.iterdir() if not _OF_AN_EXPORT.fullmatch(path.name)]
    if has_adapter:
        alone = folder / ADAPTER
        own = {*read_sums(alone), SUMS_FILE, *([MODEL_CARD] if has_card else [])}
        copies.remove(alone)
        copies += [path for path in alone.iterdir() if path.name not in own]
    for path in copies:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _rewrite_side_files(folder: Path, text: TrainedText, facts: ModelFacts | None) -> None:
    """In an export of torchtune's, which has the side files of the checkpoint it started from."""
    config, generation = read_json(folder / "config.json"), folder / GENERATION_CONFIG
    known = read_json(generation) if generation.is_file() else {}
    pad_id, base = text.tokenizer.pad_id, tokenizer_of(folder)
    write_tokenizer(folder, text, pad_id, facts)
    if text.stop_id is not None:
        ends = config.get("eos_token_id")
        new = generation_config(known, ends, text, pad_id, base)
        write_generation_config(folder, new)
    write_json(folder / "config.json", config_of_run(config, text, pad_id, base))
    for name in (FACTS_FILE, MODEL_CARD):
        (folder / name).unlink(missing_ok=True)
    if facts is not None:
        write_facts(folder, facts)
        write_card(folder, facts)
    seal(folder)


def _save_adapter(
    folder: Path,
    adapter: Mapping[str, Tensor],
    lora: LoRALinear,
    heads: HeadShape,
    reward_head: Tensor | None,
    base: Path | None,
) -> None:
    """Write a PEFT adapter.

    It has its own folder, because transformers adds an adapter beside the merged weights to them.

    Args:
        base: the folder of the model that it is added to, which the adapter names, without the
            path; None: unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {peft_name(name): rows_to_hf(name, tensor, heads) for name, tensor in adapter.items()}
    modules = sorted({name.split(".")[-3] for name in adapter})
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": modules}
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    name = None if base is None else checkpoint_name(base.resolve())
    config = kind | tune_to_peft_adapter_config(config, name)
    if reward_head is not None:
        tensors[f"base_model.model.{HF_HEAD}"] = reward_head
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_safetensors(contiguous, folder / "adapter_model.safetensors")
    write_durably(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _full_tensor(parameter: Tensor, world: World) -> Tensor:
    """The full tensor of a parameter, on every rank."""
    local = _local(parameter.detach())
    if is_nf4(local):
        local = dequantized(local)
        if not isinstance(parameter, DTensor):
            return local
        parts = parameter.device_mesh, parameter.placements
        return DTensor.from_local(local, *parts, run_check=False).full_tensor()
    if isinstance(parameter, DTensor):
        placed = cast(
            DTensor, parameter.detach().to(world.device)
        )  # with CPU offload it is on the host
        return placed.full_tensor()
    return parameter.detach()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _of_main(tensor: Tensor | None, shape: torch.Size, world: World) -> Tensor:
    """Rank 0's tensor, on every rank."""
    if world.mesh is None:
        assert tensor is not None
        return tensor
    if tensor is None:
        tensor = torch.empty(shape)
    tensor = tensor.float().to(world.device)
    dist.broadcast(tensor, src=0)
    return tensor


def _check_tied(
    head: StoredTensor | None, embedding: StoredTensor | None, heads: HeadShape
) -> None:
    """Check that a tied model's file has no output layer of its own.

    transformers 4 leaves such a layer out, and 5 trains it.
    """
    if head is None or embedding is None:
        return
    stored = {"head": head, "embedding": embedding}
    values = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored.items()}
    read_weights(values, stored, heads)
    if not torch.equal(values["head"], values["embedding"]):
        raise ValueError(
            "config.json: tie_word_embeddings true, but the checkpoint's lm_head.weight differs "
            "from its embeddings: set it to false there to use lm_head.weight, and `model` to "
            "steerlm2.models.from_checkpoint; or remove lm_head.weight"
        )


def _check_shapes(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is not in the model" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(found[name])}, the model's is {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if problems:
        raise ValueError(
            "the checkpoint doesn't fit the model in the config; check `model` and "
            "`checkpointer.checkpoint_dir`:\n  - " + "\n  - ".join(shortened(problems))
        )
