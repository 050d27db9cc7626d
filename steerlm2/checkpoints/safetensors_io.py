"""Reading and writing the safetensors of a Hugging Face folder for a decoder that is sharded.

No process ever holds the full model.

Reading: every rank maps the files into memory and copies its own shard of one tensor after another.
It reads nothing else, and the ranks of a node share the page cache, so a node reads each byte once.
Beside its shards a rank holds at most one shard more, to convert its row order or data type. To
quantize a shard, a rank reads the full tensor once.

Writing: tensors are gathered one at a time, file by file. One rank keeps the tensors of a file and
writes and hashes it in the background; the ranks take turns.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerlm2.checkpoint_dirs import (
    INDEX_FILE,
    file_digest,
    missing_weights,
    read_json,
    weight_files,
    weights_digest,
)
from steerlm2.checkpoints.hf_names import decoder_name, row_order, to_hf
from steerlm2.distributed.parallelize import local_part
from steerlm2.distributed.world import World
from steerlm2.files import sha256, sync
from steerlm2.models.decoders import HeadShape
from steerlm2.models.nf4 import fill_nf4, is_nf4, mean_scale
from steerlm2.models.reward_head import HF_HEAD

MAX_SHARD_SIZE = "5GB"

_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
"""Keys of config.json that say who wrote it, and in which type."""
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's location in a Hugging Face folder, with its shape and dtype."""

    file: Path
    hf_name: str
    shape: torch.Size
    dtype: torch.dtype


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder, by the decoder's names. Only the files' headers are read.

    A tensor that no supported family has keeps its own name.

    Raises:
        ValueError: for damaged files, a damaged index, and a tensor that is in two files.
        FileNotFoundError: naming the files that are missing.
    """
    if missing := missing_weights(folder):
        others = sorted(
            {file.name for file in folder.glob("*.safetensors")} - {*weight_files(folder)}
        )
        raise FileNotFoundError(
            f"{folder.absolute()} lacks {', '.join(missing)}: download it again"
            + (f" (other files aren't read: {', '.join(others)})" if others else "")
        )
    found: dict[str, StoredTensor] = {}
    damaged = []
    for name in weight_files(folder):
        file = folder / name
        try:
            with safe_open(file, framework="pt") as tensors:
                for hf_name in tensors.offset_keys():
                    if hf_name in found:
                        first = found[hf_name].file.name
                        damaged.append(
                            f"{folder.absolute()}: {hf_name} is in {first} and in {name}"
                        )
                    view = tensors.get_tensor(hf_name)  # mapped, not read
                    found[hf_name] = StoredTensor(file, hf_name, view.shape, view.dtype)
        except (SafetensorError, OSError) as error:
            damaged.append(f"{file.absolute()} is damaged or cut off: {error}")
    if damaged:
        raise ValueError("\n".join(damaged))
    if HF_HEAD in found:
        found.pop("lm_head.weight", None)
    return {
        decoder_name(hf_name) or hf_name: tensor
        for hf_name, tensor in found.items()
        if not hf_name.endswith("rotary_emb.inv_freq")
    }


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's config.json and weights, wherever it lies and whenever written.

    Of large files the headers count, both ends of every tensor, and pieces (`file_digest`): a few
    MB of a model of 140 GB.
    """
    config = read_json(folder / "config.json")
    facts = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    names = weight_files(folder)
    if not names or missing_weights(folder):  # other formats, which torchtune's checkpointers read
        digest.update(weights_digest(folder).encode())
    for name in names:
        digest.update(file_digest(folder / name).encode())
        digest.update(_ends_of_tensors(folder / name))
    return digest.hexdigest()


def _ends_of_tensors(file: Path) -> bytes:
    """SHA-256 of the header of a safetensors file, and of the first and last KiB of each tensor."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size)
        digest = hashlib.sha256(header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in tensor["data_offsets"])
                for start in (begin, max(begin, end - 1024)):
                    opened.seek(start)
                    digest.update(opened.read(min(1024, end - start)))
    return digest.digest()


def read_weights(
    parameters: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], heads: HeadShape
) -> None:
    """Fill parameters, or this rank's shards of them, from the files.

    Args:
        parameters: by name; `stored` has each of them, with its shape.
        heads: of the whole model, from `head_shape`.

    Raises:
        ValueError: where a file can't be read here.
    """
    files: dict[Path, list[str]] = {}
    for name in parameters:
        files.setdefault(stored[name].file, []).append(name)
    for file, names in files.items():
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    view = tensors.get_slice(stored[name].hf_name)
                    copy_part(parameters[name], view, row_order(name, heads))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.absolute()} can't be read: {error}") from error


@torch.no_grad()
def copy_part(parameter: Tensor, whole: Any, order: Tensor | None = None) -> None:
    """Fill a parameter, or this rank's shard of it, from the full tensor.

    Args:
        whole: a tensor, or something that can be sliced like one.
        order: [rows] index of each row of the parameter in `whole`; None: the same order.
    """
    local, offsets = local_part(parameter)
    if local.numel() == 0:
        return
    fill: Callable[[Tensor], Any] = local.copy_
    if is_nf4(local):
        fill = functools.partial(fill_nf4, local, mean=mean_scale(whole))
    region = [slice(start, start + n) for start, n in zip(offsets, local.shape, strict=True)]
    if order is None:
        fill(whole[tuple(region)])
        return
    rows = order[region[0]]
    first = int(rows.min())
    covering = whole[(slice(first, int(rows.max()) + 1), *region[1:])]
    fill(covering[rows - first])


def write_weights(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    whole: Callable[[str], Tensor],
    world: World,
    *,
    dtype: torch.dtype,
    heads: HeadShape,
    is_classifier: bool,
) -> dict[str, str]:
    """Write the safetensors of a folder, and an index if there are several files.

    Args:
        shapes: of all tensors, by the decoder's names.
        whole: returns a full tensor by its name; called by all ranks in the same order.
        dtype: of the files.
        heads: of the whole model, from `head_shape`.
        is_classifier: whether the decoder's output layer is a reward head.

    Returns:
        The SHA-256 of each file of weights, on every rank.

    Raises:
        ValueError: on every rank, where a rank couldn't write.
        OSError: instead of ValueError, in a run of a single process.
    """
    names: dict[str, str] = {}
    sizes: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        hf_name, size = to_hf(
            name, torch.empty(shape, dtype=dtype, device="meta"), heads, is_classifier=is_classifier
        )
        names[hf_name], sizes[hf_name] = name, size
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD_SIZE)
    if world.is_main:
        for file in folder.iterdir():
            if _WEIGHT_FILE.fullmatch(file.name):
                file.unlink()
    world.barrier()

    writing: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as background:
        for i, (file_name, hf_names) in enumerate(split.filename_to_tensors.items()):
            kept: dict[str, Tensor] = {}
            for hf_name in hf_names:
                tensor = whole(names[hf_name])
                if world.rank == _writer(i, world.size):
                    _, value = to_hf(names[hf_name], tensor, heads, is_classifier=is_classifier)
                    kept[hf_name] = _to_write(value, dtype)
            if kept:
                futures.wait(writing.values())  # no more than two files in memory
                writing[file_name] = background.submit(write_safetensors, kept, folder / file_name)

    own = world.on_all(lambda: {name: written.result() for name, written in writing.items()})
    if world.is_main and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return {name: digest for sums in world.gather(own) for name, digest in sums.items()}


def _writer(number: int, world_size: int) -> int:
    """The rank that writes the file `number`: nodes take turns, and so do the ranks of a node."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = max(world_size // per_node, 1)
    turn, node = divmod(number, nodes)
    return (node * per_node + turn % per_node) % world_size


def _to_write(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the host with its own storage; a tensor gathered from uneven shards is a view."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_safetensors(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Write one safetensors file, with the permissions of any new file (the umask), and wait until
    it is on the disk; returns its SHA-256, which is computed while the system writes.

    safetensors makes files that only their owner can read, but a server often runs as another user.

    Raises:
        OSError: where the file can't be written.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file.absolute()} can't be written: {error}") from error
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    digest = sha256(file)  # from the page cache
    sync(file)
    return digest
