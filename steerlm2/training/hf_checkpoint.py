"""Folders of Hugging Face weights, read and written: a language model or an attribute model.

A checkpointer has `load_checkpoint` and `save_checkpoint` as torchtune's have, and `hf_config`, the
config.json of what it writes. Names and the order of rotary dimensions are torchtune's inside, and
Hugging Face's in the folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.modules import TransformerDecoder

from steerlm2.data.tokenizers import Tokenizer
from steerlm2.models.folders import missing_weights, resolve_checkpoint_dir, weight_files
from steerlm2.models.llama import head_shape, hf_config
from steerlm2.models.reward_head import HF_HEAD, attribute_names

INIT_STD = 0.02
"""Standard deviation of fresh weight matrices (GPT-2's)."""

HEAD = "output.weight"

MAX_SHARD_SIZE = "5GB"


class _FolderWriter:
    """What the checkpointers share: the files of a folder beside its weights."""

    hf_config: dict[str, Any]
    _pad_token: str | None = None

    def set_pad_token(self, token_id: int, tokenizer: Tokenizer) -> None:
        """What texts are padded with. transformers and vLLM read a classifier's scores at the last
        token that isn't this one."""
        self.hf_config["pad_token_id"] = token_id
        self._pad_token = tokenizer.decode([token_id])

    def _write(self, folder: Path, weights: dict[str, Tensor], heads: Mapping[str, int]) -> None:
        (folder / "config.json").unlink(missing_ok=True)
        weights = dict(weights)
        is_classifier = attribute_names(self.hf_config) is not None
        head = weights.pop(HEAD, None) if is_classifier else None
        tensors = tune_to_hf(weights, **heads)
        if head is not None:
            tensors[HF_HEAD] = head
        tensors = {name: _owning_its_storage(tensor) for name, tensor in tensors.items()}
        save_torch_state_dict(tensors, folder, max_shard_size=MAX_SHARD_SIZE)
        make_readable(folder)
        if self._pad_token is not None:
            update_json(folder / "tokenizer_config.json", {"pad_token": self._pad_token})
            if (folder / "special_tokens_map.json").exists():  # transformers prefers it
                update_json(folder / "special_tokens_map.json", {"pad_token": self._pad_token})
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        names = dict.fromkeys(("torch_dtype", "dtype"), dtype)  # transformers prefers the second
        # The last file: an export with a config.json is complete (`is_complete`).
        update_json(folder / "config.json", self.hf_config | names)


class HFCheckpointer(_FolderWriter):
    """A downloaded or exported Hugging Face Llama, usable as `_component_`.

    Args:
        checkpoint_dir: its folder: config.json, *.safetensors, the tokenizer's files; or the
            output_dir of a run, whose newest complete `epoch_{n}` folder is meant. The attribute
            `checkpoint_dir` is that folder.
        output_dir: where `epoch_{n}` folders go, with the same tokenizer's files; a recipe that
            only reads needs none.

    Raises:
        FileNotFoundError: where there is no checkpoint.
    """

    def __init__(self, checkpoint_dir: str, output_dir: str = "") -> None:
        self.checkpoint_dir = resolve_checkpoint_dir(checkpoint_dir)
        self.output_dir = Path(output_dir)
        config = (self.checkpoint_dir / "config.json").read_text()
        self.hf_config: dict[str, Any] = json.loads(config)

    def load_checkpoint(self) -> dict[str, Any]:
        """Raises:
        ValueError: for a damaged file and for tensors that a Llama doesn't have.
        FileNotFoundError: naming the files that are missing.
        """
        tensors: dict[str, Tensor] = {}
        for file in self._files():
            try:
                tensors |= load_file(file)
            except SafetensorError as error:
                raise ValueError(f"{file.absolute()} is damaged or cut off: {error}") from error
        head = tensors.pop(HF_HEAD, None)
        try:
            weights = hf_to_tune(tensors, **_heads_of(self.hf_config))
        except Exception as error:  # torchtune raises bare Exception for an unknown name
            raise ValueError(f"{self.checkpoint_dir.absolute()}: {error}") from error
        if head is not None:
            weights[HEAD] = head
        return {"model": weights}

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None:
        folder = self.output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.checkpoint_dir.iterdir():
            weights = file.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf")
            theirs = weights or file.name.endswith(".index.json") or file.name == "config.json"
            if file.is_file() and not theirs:
                shutil.copyfile(file, folder / file.name)
        self._write(folder, state_dict["model"], _heads_of(self.hf_config))

    def _files(self) -> list[Path]:
        if missing := missing_weights(self.checkpoint_dir):
            raise FileNotFoundError(
                f"{self.checkpoint_dir.absolute()} lacks {', '.join(missing)}: download it again"
            )
        return [self.checkpoint_dir / name for name in weight_files(self.checkpoint_dir)]


class ScratchCheckpointer(_FolderWriter):
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
        self.hf_config = hf_config(decoder) | {"eos_token_id": tokenizer.eos_id}
        self.heads = head_shape(decoder)
        self.weights = dict(fresh_weights(decoder.named_parameters(), seed))
        self.tokenizer = tokenizer
        self.output_dir = Path(output_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        return {"model": self.weights}

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None:
        folder = self.output_dir / f"epoch_{epoch}"
        self.tokenizer.save(str(folder))
        self._write(folder, state_dict["model"], self.heads)


def fresh_weights(
    parameters: Iterable[tuple[str, Tensor]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Initial values by name and shape: norms 1, LoRA as in its paper, other matrices normal.

    They follow from the seed and the parameter's place.
    """
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
        yield plain_name(name), weight


def make_readable(folder: Path) -> None:
    """Give weight files the permissions that any new file has: safetensors leaves them to their
    owner alone, and a server often runs as somebody else."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def plain_name(name: str) -> str:
    """A parameter's name without what activation checkpointing puts in."""
    return name.replace("_checkpoint_wrapped_module.", "")


def _owning_its_storage(tensor: Tensor) -> Tensor:
    """A tensor gathered from uneven shards is a view of a padded one, which can't be saved."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def update_json(file: Path, values: Mapping[str, Any]) -> None:
    """Set keys of a JSON object in a file; the others stay."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}, indent=2) + "\n")


def _heads_of(config: Mapping[str, Any]) -> dict[str, int]:
    """What torchtune's weight conversion needs to know."""
    num_heads, dim = config["num_attention_heads"], config["hidden_size"]
    return {
        "num_heads": num_heads,
        "num_kv_heads": config.get("num_key_value_heads", num_heads),
        "dim": dim,
        "head_dim": config.get("head_dim") or dim // num_heads,
    }
