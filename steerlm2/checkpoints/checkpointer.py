"""Folders of Hugging Face weights, read and written: a language model or an attribute model.

A checkpointer has `load_checkpoint` and `save_checkpoint` like torchtune's, and `hf_config`, the
config.json that it writes. In memory the names and the order of rotary dimensions are torchtune's,
in the folder Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from steerlm2.checkpoint_dirs import (
    read_json,
    read_own,
    resolve_checkpoint_dir,
    weight_files,
)
from steerlm2.checkpoints.hf_names import decoder_name
from steerlm2.checkpoints.model_card import write_card
from steerlm2.checkpoints.safetensors_io import (
    StoredTensor,
    read_weights,
    stored_tensors,
    write_weights,
)
from steerlm2.checkpoints.side_files import (
    GENERATION_CONFIG,
    MODEL_CARD,
    SIDE_FILES,
    TrainedText,
    config_of_run,
    generation_config,
    json_text,
    remove_side_files,
    seal,
    tokenizer_of,
    without_code,
    without_paths,
    write_generation_config,
    write_tokenizer,
)
from steerlm2.data.jsonl import shortened
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.distributed.world import World
from steerlm2.facts import FACTS_FILE, ModelFacts, write_facts
from steerlm2.files import check_unchanged, sha256, sync, write_durably
from steerlm2.models.config_json import decoder_config, hf_config
from steerlm2.models.decoders import HeadShape, head_shape
from steerlm2.models.reward_head import attribute_names

INIT_STD = 0.02
"""Standard deviation of fresh weight matrices (GPT-2's)."""


class FolderCheckpointer:
    """Base of the checkpointers, which write a folder of Hugging Face weights for each epoch.

    A recipe calls `begin`, writes the weights (`checkpoints.safetensors_io`), and calls `finish`;
    `save_checkpoint` does all three with a state dict of full tensors.
    """

    hf_config: dict[str, Any]
    heads: HeadShape
    output_dir: Path
    text: TrainedText | None = None
    """What the model is trained on; None: the tokenizer's files are those of its folder."""
    facts: ModelFacts | None = None
    """What the export says of itself."""
    _pad_id: int | None = None

    def load_checkpoint(self) -> dict[str, Any]:
        raise NotImplementedError

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None:
        weights = state_dict["model"]
        dtype = next(iter(weights.values())).dtype
        sums = write_weights(
            self.begin(epoch),
            {name: tensor.shape for name, tensor in weights.items()},
            weights.__getitem__,
            World(torch.device("cpu")),
            dtype=dtype,
            heads=self.heads,
            is_classifier=attribute_names(self.hf_config) is not None,
        )
        self.finish(epoch, dtype, sums)

    def set_pad_token(self, token_id: int, text: TrainedText) -> None:
        """Set the token that the texts are padded with.

        transformers and vLLM read a classifier's scores at the last token that isn't this one.
        """
        self.text, self._pad_id = text, token_id

    def begin(self, epoch: int) -> Path:
        """Make the folder of an epoch, with the files that go beside the weights."""
        folder = self.output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        self.write_side_files(folder)
        return folder

    def write_side_files(self, folder: Path, *, is_adapter: bool = False) -> None:
        """Write what the export says of itself, the tokenizer's files, and of a language model what
        ends a text.

        Args:
            is_adapter: the weights are a LoRA adapter in PEFT's format.
        """
        for name in (FACTS_FILE, MODEL_CARD):
            (folder / name).unlink(missing_ok=True)
        if self.text is None:
            remove_side_files(folder)
            self._copy_tokenizer(folder)
        else:
            write_tokenizer(folder, self.text, self._pad(self.text), self.facts)
            if self.text.stop_id is not None:
                write_generation_config(folder, self._generation_config(self.text))
        if self.facts is not None:
            write_facts(folder, self.facts)
            write_card(folder, self.facts, is_adapter=is_adapter)

    def finish(self, epoch: int, dtype: torch.dtype, sums: Mapping[str, str]) -> None:
        """Write the last file: an export with a config.json is complete (`is_complete`).

        Args:
            sums: SHA-256 of the files of weights.
        """
        name = str(dtype).removeprefix("torch.")
        names = dict.fromkeys(("torch_dtype", "dtype"), name)  # transformers prefers the second
        config = without_code(without_paths(self.hf_config))
        if self.text is not None:
            config = config_of_run(config, self.text, self._pad(self.text), self._base_tokenizer())
        text, folder = json_text(config | names), self.output_dir / f"epoch_{epoch}"
        seal(folder, {**sums, "config.json": sha256(text.encode())})
        write_durably(folder / "config.json", text)
        sync(self.output_dir)

    def _pad(self, text: TrainedText) -> int:
        return self._pad_id if self._pad_id is not None else text.tokenizer.pad_id

    def _generation_config(self, text: TrainedText) -> dict[str, Any]:
        return generation_config({}, None, text, self._pad(text), None)

    def _base_tokenizer(self) -> Tokenizer | None:
        """That of the checkpoint that the run started from."""
        return None

    def _copy_tokenizer(self, folder: Path) -> None:
        raise NotImplementedError


class HFCheckpointer(FolderCheckpointer):
    """A downloaded or exported Hugging Face model, usable as `_component_`.

    Args:
        checkpoint_dir: its folder: config.json, *.safetensors, the tokenizer's files; or the
            output_dir of a run, for its newest complete `epoch_{n}` folder. The attribute
            `checkpoint_dir` is the folder with the weights.
        output_dir: where `epoch_{n}` folders go, with the same tokenizer's files; not needed for
            reading.

    Raises:
        FileNotFoundError: where there is no checkpoint.
        ValueError: where config.json describes a model that can't be computed here
            (`models.families`, `models.config_json`).
    """

    def __init__(self, checkpoint_dir: str, output_dir: str = "") -> None:
        self.checkpoint_dir = resolve_checkpoint_dir(checkpoint_dir)
        self.output_dir = Path(output_dir)
        self.hf_config: dict[str, Any] = read_json(self.checkpoint_dir / "config.json")
        generation = self.checkpoint_dir / GENERATION_CONFIG
        self._generation = read_json(generation) if generation.is_file() else {}
        file = str((self.checkpoint_dir / "config.json").absolute())
        self.config = decoder_config(self.hf_config, file)
        self.heads = HeadShape(
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
            rotates_halves=self.config.family.rotates_halves,
        )

    @property
    def is_tied(self) -> bool:
        """Whether config.json ties the output layer to the embedding."""
        return self.config.tie_word_embeddings

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Its tensors' locations in its files (`safetensors_io.stored_tensors`)."""
        return stored_tensors(self.checkpoint_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """A state dict of full tensors, on the host.

        Raises:
            ValueError: for a damaged file and for tensors that no supported family has.
            FileNotFoundError: naming the files that are missing.
        """
        stored = self.stored_tensors()
        names = [tensor.hf_name for tensor in stored.values()]
        if unknown := [name for name in names if decoder_name(name) is None]:
            raise ValueError(
                f"{self.checkpoint_dir.absolute()} has tensors that no supported family has: "
                + ", ".join(shortened(unknown))
            )
        check_unchanged(self.checkpoint_dir, weight_files(self.checkpoint_dir))
        weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored.items()}
        read_weights(weights, stored, self.heads)
        return {"model": weights}

    def _copy_tokenizer(self, folder: Path) -> None:
        for file in map(self.checkpoint_dir.joinpath, SIDE_FILES):
            if file.is_file():
                (folder / file.name).write_bytes(read_own(file))

    def _generation_config(self, text: TrainedText) -> dict[str, Any]:
        ends, pad_id = self.hf_config.get("eos_token_id"), self._pad(text)
        return generation_config(self._generation, ends, text, pad_id, self._base_tokenizer())

    def _base_tokenizer(self) -> Tokenizer | None:
        return tokenizer_of(self.checkpoint_dir)


class ScratchCheckpointer(FolderCheckpointer):
    """A checkpointer for a decoder with fresh weights from a seed; it writes a complete folder.

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

    def _copy_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(str(folder))


def fresh_weights(
    parameters: Iterable[tuple[str, Tensor]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Initial values by name and shape: norms 1, biases 0, LoRA as in its paper, matrices normal.

    They depend on the seed and on the parameter's index among `parameters`.
    """
    for i, (name, parameter) in enumerate(parameters):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        weight = torch.empty(parameter.shape)
        if name.endswith("lora_b.weight"):
            nn.init.zeros_(weight)
        elif name.endswith("lora_a.weight"):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=INIT_STD, generator=generator)
        yield plain_name(name), weight


def plain_name(name: str) -> str:
    """A parameter's name without the prefix of activation checkpointing."""
    return name.replace("_checkpoint_wrapped_module.", "")
