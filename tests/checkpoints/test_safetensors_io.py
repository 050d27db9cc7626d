"""Safetensors to shards and back: every layout has the file's bits, and no rank the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoint_dirs import INDEX_FILE
from steerlm2.checkpoints import safetensors_io
from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.safetensors_io import stored_tensors, write_weights
from steerlm2.checkpoints.weights import load_weights, open_reward_checkpointer
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.files import SUMS_FILE
from steerlm2.models.config_json import hf_config
from steerlm2.models.decoders import head_shape
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
SCRIPT = Path(__file__).with_name("weights_on_ranks.py")
LAYOUTS = ("fsdp3", "tp2", "tp2_fsdp2", "hsdp2x2")
MODELS = ("language", "tied", "classifier", "lora")
SMALL: dict[str, Any] = {
    "vocab_size": 514,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 36,
    "max_seq_len": 64,
    "intermediate_dim": 46,
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


def meta_decoder(builder: Any = llama3, **changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return builder(**(SMALL | changes))


def language_model(folder: Path, builder: Any = llama3) -> Path:
    source = ScratchCheckpointer(
        meta_decoder(builder), tiny_tokenizer(), seed=3, output_dir=str(folder)
    )
    source.save_checkpoint(source.load_checkpoint(), epoch=1)
    return folder / "epoch_1"


def classifier(folder: Path) -> Path:
    decoder = meta_decoder()
    add_reward_head(decoder, 3)
    source: Any = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("wit", "kindness", "length")),
        seed=3,
        output_dir=str(folder),
        load_head=False,
    )
    source.save_checkpoint(source.load_checkpoint(), epoch=1)
    return folder / "epoch_1"


def read(folder: Path) -> dict[str, Tensor]:
    return HFCheckpointer(str(folder)).load_checkpoint()["model"]


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., None]) -> Path:
    """Models in several files, read and written by ranks."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "MAX_SHARD_SIZE", "40KB")
        language_model(folder / "a").rename(folder / "language")
        language_model(folder / "b", llama3_2).rename(folder / "tied")
        classifier(folder / "c").rename(folder / "classifier")
    run_script(SCRIPT, "small", folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_parts_of_the_files_tensors(layout: str, model: str, small: Path) -> None:
    """Bit for bit, put together again; the rows of q and k in torchtune's order. Base weights of a
    LoRA model too, beside adapters from the seed."""
    loaded = torch.load(small / layout / model / "loaded.pt")
    expected = read(small / ("language" if model == "lora" else model))
    adapters = {name for name in loaded if ".lora_" in name}
    assert len(adapters) == (2 * 2 * 5 if model == "lora" else 0)
    assert differing({k: v for k, v in loaded.items() if k not in adapters}, expected) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_adapters_are_those_of_one_process(layout: str, small: Path) -> None:
    first, loaded = (
        torch.load(small / name / "lora" / "loaded.pt") for name in (LAYOUTS[0], layout)
    )
    assert differing(loaded, first) == []


@pytest.mark.parametrize("model", MODELS[:3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_ranks_write_is_what_was_read(layout: str, model: str, small: Path) -> None:
    """The same tensors in the same files, byte for byte, by whichever rank."""
    written, source = small / layout / model / "epoch_1", small / model
    names = {file.name for file in source.iterdir()}
    assert len(list(source.glob("*.safetensors"))) > 2
    assert {file.name for file in written.iterdir()} == names
    for name in names:
        assert (written / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_merge_the_adapters(layout: str, small: Path) -> None:
    """W + (alpha / rank) B A = W + 2 B A, B being 0.25 everywhere."""
    loaded = torch.load(small / layout / "lora" / "loaded.pt")
    written = read(small / layout / "lora" / "epoch_1")
    for name, tensor in written.items():
        layer = name.removesuffix("weight")
        if f"{layer}lora_a.weight" in loaded:
            a, b = (loaded[f"{layer}lora_{which}.weight"] for which in "ab")
            tensor = tensor - 2 * torch.full_like(b, 0.25) @ a
            torch.testing.assert_close(tensor, loaded[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, loaded[name])


@pytest.mark.slow
def test_no_rank_has_more_than_two_tensors_above_its_shards(
    tmp_path: Path, record_property: Any, run_script: Callable[..., None]
) -> None:
    """0.5 GB in several files, read by 4 ranks (TP2 x FSDP2): memory that isn't mapped from the
    files grows by less than twice the largest tensor (131 MB) beyond the shards. The weights are
    transformers' own."""
    folder = tmp_path / "model"
    folder.mkdir()
    decoder = meta_decoder(**LARGE)
    noise = torch.randn(32000 * 2048 + 1000, dtype=torch.bfloat16)
    names = [name for name, _ in decoder.named_parameters()]

    def tensor(name: str) -> torch.Tensor:
        """Its own for each name; drawing them all would take longer than the rest."""
        shape = decoder.get_parameter(name).shape
        return noise[names.index(name) :][: shape.numel()].view(shape)

    write_weights(
        folder,
        {name: p.shape for name, p in decoder.named_parameters()},
        tensor,
        CPU,
        dtype=torch.bfloat16,
        heads=head_shape(decoder),
        is_classifier=False,
    )
    (folder / "config.json").write_text(json.dumps(hf_config(decoder, "bfloat16")))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    largest = 32000 * 2048 * 2
    assert 0.75 * total > 2 * largest, "a whole model would not be found"
    run_script(SCRIPT, "large", tmp_path)
    found = torch.load(tmp_path / "large.pt")
    assert found["different"] == found["left"] == []
    for rank in found["ranks"]:
        record_property("rank", rank)
        assert rank["extra"] < 2 * largest
        assert rank["shards"] == pytest.approx(total / 4, rel=0.01)


# What is wrong with a folder


def test_all_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    """One missing, one unknown, and the 6 MLP matrices of another shape."""
    folder = language_model(tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.moe.weight"] = stored.pop("model.norm.weight")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the checkpoint doesn't fit the model") as error:
        load_weights(meta_decoder(intermediate_dim=44), HFCheckpointer(str(folder)), CPU, seed=0)
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "  - norm.scale is missing"
    assert lines[1] == "  - model.layers.0.moe.weight is not in the model"
    assert lines[2:] == [
        f"  - layers.{i}.mlp.w{j}.weight has shape {shape}, the model's is {ours}"
        for i in range(2)
        for j, shape, ours in (
            (1, [46, 36], [44, 36]),
            (2, [36, 46], [36, 44]),
            (3, [46, 36], [44, 36]),
        )
    ]


def test_all_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "40KB")
    folder = language_model(tmp_path)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    for file in (first, second):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{first} is damaged.*\n{second} is damaged"):
        stored_tensors(folder)


# Which files are the weights: as transformers chooses


def add_to(file: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file)


NORM = "model.norm.weight"


def files_read(folder: Path) -> set[str]:
    return {stored.file.name for stored in stored_tensors(folder).values()}


def test_other_files_of_safetensors_are_not_read(tmp_path: Path) -> None:
    """`*_old.safetensors` comes after the others by its name, and would win."""
    folder = language_model(tmp_path)
    save_file({NORM: torch.zeros(36), "more": torch.zeros(1)}, folder / "model_old.safetensors")
    assert files_read(folder) == {"model.safetensors"}
    assert "more" not in stored_tensors(folder)


def test_the_single_file_comes_before_an_index(tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    save_file({NORM: torch.zeros(36)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {NORM: "model-00001-of-00001.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert files_read(folder) == {"model.safetensors"}


def test_without_single_file_and_index_nothing_is_guessed(tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors .*weights\.safetensors"):
        stored_tensors(folder)


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "40KB")
    folder = language_model(tmp_path)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    (name, *_) = load_file(first)
    add_to(last, name, torch.zeros(1))
    with pytest.raises(ValueError, match=f"{name} is in {first.name} and in {last.name}"):
        stored_tensors(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a/b", "..", 3])
def test_an_index_names_files_of_its_folder(tmp_path: Path, file: object) -> None:
    folder = language_model(tmp_path / "run")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {NORM: file}}))
    with pytest.raises(ValueError, match="weight_map must name files of that folder, got"):
        stored_tensors(folder)


@pytest.mark.parametrize("text", ["", '{"weight_map": {"a": ', "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    folder = language_model(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{folder / INDEX_FILE} is damaged or cut off"):
        stored_tensors(folder)


def test_a_tied_checkpoint_may_hold_its_output_matrix_twice(tmp_path: Path) -> None:
    """As some published files do; config.json says that the two are one."""
    folder = language_model(tmp_path, llama3_2)
    embedding = read(folder)["tok_embeddings.weight"]
    add_to(folder / "model.safetensors", "lm_head.weight", embedding)
    (folder / SUMS_FILE).unlink()
    decoder = meta_decoder(llama3_2)
    load_weights(decoder, HFCheckpointer(str(folder)), CPU, seed=0)
    expected = {name: t for name, t in read(folder).items() if name != "output.weight"}
    assert differing(dict(decoder.state_dict()), expected) == []


def test_a_tied_checkpoint_with_another_output_matrix_is_refused(tmp_path: Path) -> None:
    """transformers 4 leaves it out, transformers 5 computes with it."""
    folder = language_model(tmp_path, llama3_2)
    add_to(folder / "model.safetensors", "lm_head.weight", torch.zeros(514, 36))
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings true, but .*lm_head\.weight differs"
    ):
        load_weights(meta_decoder(llama3_2), HFCheckpointer(str(folder)), CPU, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_the_decoders_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = language_model(tmp_path)
    decoder = meta_decoder().to(dtype)
    load_weights(decoder, HFCheckpointer(str(folder)), CPU, seed=0)
    expected = {name: tensor.to(dtype) for name, tensor in read(folder).items()}
    assert differing(dict(decoder.state_dict()), expected) == []


def test_a_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of several files: the folder has no config.json, so nobody reads it."""
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "40KB")
    write = safetensors_io.save_file

    def full_disk(tensors: Any, file: Path, **options: Any) -> None:
        if "-00002-of" in file.name:
            raise OSError(28, "No space left on device")
        write(tensors, file, **options)

    monkeypatch.setattr(safetensors_io, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        language_model(tmp_path)
    assert not (tmp_path / "epoch_1" / "config.json").exists()
    assert not (tmp_path / "epoch_1" / INDEX_FILE).exists()
