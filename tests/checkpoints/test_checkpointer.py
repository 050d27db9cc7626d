"""Hugging Face folders: what is written is read back bit for bit, here and in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoint_dirs import INDEX_FILE
from steerlm2.checkpoints import safetensors_io
from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.side_files import TrainedText
from steerlm2.checkpoints.weights import (
    load_weights,
    open_checkpointer,
    open_reward_checkpointer,
    save_weights,
)
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import hf_tokenizer, tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.files import SUMS_FILE, changed, read_sums, sha256
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
COMPONENT = "steerlm2.checkpoints.HFCheckpointer"
SCHEMA = AttributeSchema(("wit", "kindness", "length"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
BUILDERS = {"untied": llama3, "tied": llama3_2}

Builder = Callable[..., TransformerDecoder]


def meta_decoder(builder: Builder = llama3, *, head: bool = False) -> TransformerDecoder:
    with torch.device("meta"):
        decoder = builder(**TINY)
        if head:
            add_reward_head(decoder, len(SCHEMA.names))
    return decoder


def language_model(folder: Path, builder: Builder = llama3) -> tuple[Path, dict[str, Tensor]]:
    """Fresh weights, exported: the folder, and the weights by torchtune's names."""
    decoder = meta_decoder(builder)
    source = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=3, output_dir=str(folder))
    source.save_checkpoint({"model": source.weights}, epoch=1)
    return folder / "epoch_1", source.weights


def reward_checkpointer(
    decoder: TransformerDecoder,
    output_dir: Path,
    checkpoint_dir: Path | None = None,
    *,
    schema: AttributeSchema = SCHEMA,
    load_head: bool = False,
) -> Any:
    component = {"checkpoint_dir": str(checkpoint_dir), "output_dir": str(output_dir)}
    return open_reward_checkpointer(
        {"_component_": COMPONENT} | component if checkpoint_dir else None,
        decoder,
        hf_tokenizer(checkpoint_dir) if checkpoint_dir else tiny_tokenizer(),
        extra_id_template(),
        schema,
        seed=3,
        output_dir=str(output_dir),
        load_head=load_head,
    )


def attribute_model(folder: Path, builder: Builder = llama3) -> tuple[Path, dict[str, Tensor]]:
    """The same of an attribute model."""
    source = reward_checkpointer(meta_decoder(builder, head=True), folder)
    source.save_checkpoint({"model": source.weights}, epoch=1)
    return folder / "epoch_1", source.weights


def read(folder: Path) -> dict[str, Tensor]:
    return HFCheckpointer(str(folder)).load_checkpoint()["model"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


MODELS = {"language model": language_model, "attribute model": attribute_model}


# There and back


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("model", MODELS)
def test_an_export_is_read_back_bit_for_bit(model: str, builder: str, tmp_path: Path) -> None:
    folder, weights = MODELS[model](tmp_path, BUILDERS[builder])
    assert_same_bits(read(folder), weights)


@pytest.mark.parametrize("model", MODELS)
def test_reading_and_writing_again_changes_no_bit(model: str, tmp_path: Path) -> None:
    """A checkpointer that read a folder writes the same tensors and the same kind of model."""
    folder, weights = MODELS[model](tmp_path)
    again = HFCheckpointer(str(folder), str(tmp_path / "again"))
    again.save_checkpoint(again.load_checkpoint(), epoch=7)
    assert_same_bits(read(tmp_path / "again" / "epoch_7"), weights)
    assert config_of(tmp_path / "again" / "epoch_7") == config_of(folder)


def test_torchtunes_own_checkpointer_reads_the_same(tmp_path: Path) -> None:
    folder, _ = language_model(tmp_path)
    theirs = FullModelHFCheckpointer(
        str(folder), ["model.safetensors"], "LLAMA3", str(tmp_path / "unused")
    )
    assert_same_bits(read(folder), theirs.load_checkpoint()["model"])


def test_transformers_own_folder_is_read(tmp_path: Path) -> None:
    """Saved by transformers, config.json in its own words: the decoder's weights again."""
    folder, weights = language_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_bits(read(tmp_path / "theirs"), weights)


# Shards


@pytest.mark.parametrize("model", MODELS)
def test_shards_are_read_back_bit_for_bit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 x 64 floats are 128 kB: with 200 kB a file there are several."""
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "200KB")
    folder, weights = MODELS[model](tmp_path)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_same_bits(read(folder), weights)


def test_transformers_loads_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "200KB")
    folder, weights = attribute_model(tmp_path)
    model, report = LlamaForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.score.weight, weights["output.weight"])


@pytest.mark.parametrize("sizes", [("200KB", "5GB"), ("5GB", "200KB"), ("120KB", "300KB")])
def test_a_second_export_leaves_no_file_of_the_first(
    sizes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into one folder, in other shards: a reader would take an old file for a part of the model."""
    written = []
    for size, out in zip((*sizes, sizes[1]), ("one", "one", "two"), strict=True):
        monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", size)
        folder, weights = language_model(tmp_path / out)
        written.append({file.name for file in folder.iterdir()})
    assert written[1] == written[2] != written[0]
    assert_same_bits(read(tmp_path / "one" / "epoch_1"), weights)


def test_an_export_of_a_sharded_checkpoint_has_no_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's files are copied, the index of other weights isn't."""
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "200KB")
    folder, weights = language_model(tmp_path)
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "5GB")
    again = HFCheckpointer(str(folder), str(tmp_path / "again"))
    again.save_checkpoint(again.load_checkpoint(), epoch=1)
    assert not (tmp_path / "again" / "epoch_1" / INDEX_FILE).exists()
    assert_same_bits(read(tmp_path / "again" / "epoch_1"), weights)


def test_missing_shards_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that was broken off: 2 of several files, by their names in the index."""
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", "200KB")
    folder, _ = language_model(tmp_path)
    gone = sorted(folder.glob("model-*.safetensors"))[:2]
    for file in gone:
        file.unlink()
    with pytest.raises(FileNotFoundError) as error:
        read(folder)
    names = ", ".join(file.name for file in gone)
    assert str(error.value) == f"{folder} lacks {names}: download it again"


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder, _ = language_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors \(or "):
        read(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_damaged_file_is_named(keep: int, tmp_path: Path) -> None:
    """Empty, cut within its header, within its tensors, by the last byte."""
    folder, _ = language_model(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut off") as error:
        read(folder)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"], ids=["one file", "several"])
def test_an_export_has_digests_of_its_files(
    shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all but README.md, which people and evaluations change."""
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_SIZE", shard_size)
    folder, _ = language_model(tmp_path)
    (folder / "README.md").touch()
    names = {file.name for file in folder.iterdir()} - {SUMS_FILE, "README.md"}
    assert read_sums(folder) == {name: sha256(folder / name) for name in names}
    assert {"config.json", "tokenizer.json"} < names


def test_flipped_bits_of_weights_are_refused(tmp_path: Path) -> None:
    """One in the middle of a file of weights; read into a model, or whole."""
    folder, _ = language_model(tmp_path)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)
    damaged = r"epoch_1: model\.safetensors changed since SHA256SUMS was written"
    with pytest.raises(ValueError, match=damaged):
        read(folder)
    with pytest.raises(ValueError, match=damaged):
        load_weights(meta_decoder(), HFCheckpointer(str(folder)), CPU, seed=0)
    (folder / SUMS_FILE).unlink()  # of somebody else's folder nothing is known
    load_weights(meta_decoder(), HFCheckpointer(str(folder)), CPU, seed=0)


def test_another_architectures_tensor_is_named(tmp_path: Path) -> None:
    """A name that Llama doesn't have; torchtune raises a bare Exception for it."""
    folder, _ = language_model(tmp_path)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.moe.gate.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.moe\.gate\.weight") as error:
        read(folder)
    assert str(error.value).startswith(str(folder))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no config.json.*tune download"):
        HFCheckpointer(str(tmp_path))


# The folder of a run


def test_a_run_is_read_by_its_newest_export(tmp_path: Path) -> None:
    """Of epochs 2 and 10 the second, here and through a recipe's config; by its tokenizer too."""
    tensors = {}
    for epoch, seed in ((10, 3), (2, 4)):
        source = ScratchCheckpointer(
            meta_decoder(), tiny_tokenizer(), seed=seed, output_dir=str(tmp_path)
        )
        source.save_checkpoint(source.load_checkpoint(), epoch=epoch)
        tensors[epoch] = source.weights
    run = HFCheckpointer(str(tmp_path))
    assert run.checkpoint_dir == tmp_path / "epoch_10"
    assert_same_bits(run.load_checkpoint()["model"], tensors[10])
    opened = open_checkpointer(
        {"_component_": COMPONENT, "checkpoint_dir": str(tmp_path)},
        meta_decoder(),
        hf_tokenizer(tmp_path),
        seed=0,
        output_dir=str(tmp_path / "out"),
    )
    opened.save_checkpoint(opened.load_checkpoint(), epoch=1)
    assert_same_bits(read(tmp_path / "out"), tensors[10])


def test_an_export_that_is_cut_short_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is killed while it exports over an older export: neither is read from then on."""
    folder, _ = language_model(tmp_path / "start")
    again = HFCheckpointer(str(folder), str(tmp_path / "run"))
    again.save_checkpoint(again.load_checkpoint(), epoch=1)
    again.save_checkpoint(again.load_checkpoint(), epoch=2)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "save_file", killed)
    for epoch in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            again.save_checkpoint(again.load_checkpoint(), epoch=epoch)
    assert HFCheckpointer(str(tmp_path / "run")).checkpoint_dir == tmp_path / "run" / "epoch_1"


# Attribute models in the words of Hugging Face


def test_config_of_an_attribute_model(tmp_path: Path) -> None:
    config = config_of(attribute_model(tmp_path)[0])
    expected = {
        "architectures": ["LlamaForSequenceClassification"],
        "problem_type": "regression",
        "num_labels": 3,
        "id2label": {"0": "wit", "1": "kindness", "2": "length"},
        "label2id": {"wit": 0, "kindness": 1, "length": 2},
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": 512,
    }
    assert {key: config[key] for key in expected} == expected


def test_a_tied_backbone_is_exported_untied(tmp_path: Path) -> None:
    """A classifier has no output embedding to tie."""
    assert config_of(attribute_model(tmp_path, llama3_2)[0])["tie_word_embeddings"] is False


def test_transformers_sees_the_attributes_names(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(attribute_model(tmp_path)[0])
    assert isinstance(model, LlamaForSequenceClassification)
    assert model.config.id2label == {0: "wit", 1: "kindness", 2: "length"}
    assert model.score.weight.shape == (3, 64)


@torch.no_grad()
def test_a_padded_batch_in_transformers_is_read_at_the_texts_ends(tmp_path: Path) -> None:
    """Texts of 3 and 9 tokens, padded by the exported tokenizer: the scores of each text alone."""
    folder, _ = attribute_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [[7, 300, 4], [7, 20, 21, 22, 300, 301, 1, 30, 4]]
    batch = AutoTokenizer.from_pretrained(folder).pad({"input_ids": texts}, return_tensors="pt")
    alone = torch.cat([model(torch.tensor([text])).logits for text in texts])
    torch.testing.assert_close(model(**batch).logits, alone, rtol=1e-4, atol=1e-5)


def without_pad_token(folder: Path) -> Path:
    """As Llama 3's and many others: texts are padded with their end, in all files that say so."""
    folder, _ = language_model(folder)
    file = folder / "tokenizer_config.json"
    end = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    file.write_text(json.dumps(json.loads(file.read_text()) | end))
    (folder / "special_tokens_map.json").write_text(json.dumps(end))
    change_config(folder, pad_token_id=1, eos_token_id=1)
    return folder


def test_pad_differs_from_eos_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    """Model and tokenizer agree on a token that no text ends with. transformers prefers
    special_tokens_map.json to tokenizer_config.json, so both say it.
    """
    decoder = meta_decoder(head=True)
    source = reward_checkpointer(decoder, tmp_path / "out", without_pad_token(tmp_path))
    load_weights(decoder, source, CPU, seed=0, fresh_head=True)
    save_weights(decoder, source, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "epoch_1")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<|endoftext|>")
    assert config_of(tmp_path / "out" / "epoch_1")["pad_token_id"] == tokenizer.pad_token_id == 0


def test_the_dtype_of_an_export_is_that_of_its_weights(tmp_path: Path) -> None:
    """From a folder that transformers 5 wrote in bfloat16 ("dtype", no "torch_dtype"): weights in
    float32 would be rounded when they are loaded as what config.json says.
    """
    folder, _ = language_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save(tmp_path / "theirs")
    assert config_of(tmp_path / "theirs")["dtype"] == "bfloat16"
    decoder = meta_decoder(head=True)
    source = reward_checkpointer(decoder, tmp_path / "out", tmp_path / "theirs")
    load_weights(decoder, source, CPU, seed=0, fresh_head=True)
    save_weights(decoder, source, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "epoch_1")
    assert loaded.dtype == torch.float32


def test_the_tokenizers_files_come_along_and_no_others(tmp_path: Path) -> None:
    """No code, no weights of another format. A link of the folder is copied as the file that it
    leads to."""
    folder, _ = language_model(tmp_path)
    own = {file.name for file in folder.iterdir()}
    (folder / "blob").write_text("{}")
    (folder / "generation_config.json").symlink_to("blob")
    for name in ("chat_template.jinja", "LICENSE", "pytorch_model.bin", "x.py", "secrets.json"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    again = HFCheckpointer(str(folder), str(tmp_path / "again"))
    again.save_checkpoint(again.load_checkpoint(), epoch=1)
    copied = {file.name: file for file in (tmp_path / "again" / "epoch_1").iterdir()}
    assert copied.keys() == own | {"generation_config.json", "chat_template.jinja"}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert copied[name].read_bytes() == (folder / name).read_bytes()
        assert not copied[name].is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "chat_template.jinja"])
def test_a_link_publishes_nothing(name: str, tmp_path: Path) -> None:
    """A repository of somebody else may have links to files of whoever trains on it."""
    folder, _ = language_model(tmp_path)
    (tmp_path / "id_rsa").write_text("a private key")
    (folder / name).symlink_to(tmp_path / "id_rsa")
    again = HFCheckpointer(str(folder), str(tmp_path / "again"))
    with pytest.raises(ValueError, match=f"{name} is a link to .*id_rsa"):
        again.save_checkpoint(again.load_checkpoint(), epoch=1)
    with pytest.raises(ValueError, match=f"{name} is a link to .*id_rsa"):
        hf_tokenizer(folder)
    for file in (tmp_path / "again").rglob("*"):
        assert file.is_dir() or b"private key" not in file.read_bytes()


def test_a_folder_of_the_hubs_cache_is_a_checkpoint(tmp_path: Path) -> None:
    """snapshots/REVISION, whose files are links to blobs: it is loaded, checked, and exported as
    files."""
    folder, weights = language_model(tmp_path)
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / sha256(file)
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    assert hf_tokenizer(snapshot).digest == tiny_tokenizer().digest
    again = HFCheckpointer(str(snapshot), str(tmp_path / "again"))
    found = again.load_checkpoint()
    assert all(found["model"][name].equal(weights[name]) for name in weights)
    again.save_checkpoint(found, epoch=1)
    copies = list((tmp_path / "again" / "epoch_1").iterdir())
    assert {file.name for file in copies} == {file.name for file in snapshot.iterdir()}
    assert not any(file.is_symlink() for file in copies)
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"model\.safetensors changed since"):
        again.load_checkpoint()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_links_publish_nothing_by_torchtunes_checkpointer(lora: bool, tmp_path: Path) -> None:
    """It copies all of a folder's small files, by whatever name, and of sub-folders too."""
    folder, weights = language_model(tmp_path)
    (tmp_path / "id_rsa").write_text("a private key")
    for name in ("original", "adapter"):
        (folder / name).mkdir()
    names = ("notes.txt", "original/notes", "adapter/README.md", "model_notes", "params.json")
    for name in names:
        (folder / name).symlink_to(tmp_path / "id_rsa")
    component = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
    }
    adapted = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4}
    with torch.device("meta"):
        decoder = lora_llama3(**adapted, **TINY) if lora else llama3(**TINY)
    tokenizer = tiny_tokenizer()
    theirs = open_checkpointer(component, decoder, tokenizer, seed=0, output_dir=str(tmp_path))
    load_weights(decoder, theirs, CPU, seed=0)
    options = {"dtype": torch.float32, "output_dir": tmp_path, "epoch": 2}
    text = TrainedText(tokenizer, extra_id_template(), stop_id=3)
    exported = save_weights(decoder, theirs, CPU, text=text, **options)
    for file in exported.rglob("*"):
        assert file.is_dir() or b"private key" not in file.read_bytes()
    assert [path.name for path in exported.iterdir() if path.is_dir()] == ["adapter"] * lora
    for sealed in (exported, exported / "adapter") if lora else (exported,):
        files = {file.name for file in sealed.iterdir() if file.is_file()}
        assert read_sums(sealed).keys() == files - {SUMS_FILE, "README.md"}
        assert changed(sealed) == []
    found = HFCheckpointer(str(exported)).load_checkpoint()["model"]
    assert all(found[name].equal(weights[name]) for name in weights)  # adapters begin as nothing


def test_the_folder_that_was_read_stays_as_it_is(tmp_path: Path) -> None:
    folder = without_pad_token(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    decoder = meta_decoder(head=True)
    source = reward_checkpointer(decoder, tmp_path / "out", folder)
    load_weights(decoder, source, CPU, seed=0, fresh_head=True)
    save_weights(decoder, source, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# From a language model, or from an earlier stage


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_language_model_becomes_an_attribute_model_with_a_fresh_head(
    builder: str, tmp_path: Path
) -> None:
    """Its backbone bit for bit, and a head [3, 64] that depends on the seed alone."""
    folder, weights = language_model(tmp_path, BUILDERS[builder])
    heads = []
    for seed in (5, 5, 6):
        decoder = meta_decoder(BUILDERS[builder], head=True)
        source = reward_checkpointer(decoder, tmp_path / "out", folder)
        load_weights(decoder, source, CPU, seed=seed, fresh_head=True)
        state = dict(decoder.state_dict())
        heads.append(state.pop("output.weight"))
        assert_same_bits(state, {k: v for k, v in weights.items() if k != "output.weight"})
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert (heads[0] != 0).all()


def test_the_second_stage_goes_on_with_the_firsts_head(tmp_path: Path) -> None:
    folder, weights = attribute_model(tmp_path)
    decoder = meta_decoder(head=True)
    source = reward_checkpointer(decoder, tmp_path / "out", folder, load_head=True)
    load_weights(decoder, source, CPU, seed=9)
    assert_same_bits(dict(decoder.state_dict()), weights)


def test_the_second_stage_may_start_with_a_fresh_head_and_other_attributes(tmp_path: Path) -> None:
    """One attribute instead of three: nothing of the first stage's head is left."""
    folder, weights = attribute_model(tmp_path)
    with torch.device("meta"):
        decoder = llama3(**TINY)
        add_reward_head(decoder, 1)
    one = AttributeSchema(("helpfulness",))
    source = reward_checkpointer(decoder, tmp_path / "out", folder, schema=one)
    load_weights(decoder, source, CPU, seed=9, fresh_head=True)
    save_weights(decoder, source, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "epoch_1")
    assert model.config.id2label == {0: "helpfulness"}
    assert torch.equal(model.score.weight, decoder.output.weight)
    assert torch.equal(model.model.embed_tokens.weight, weights["tok_embeddings.weight"])


def test_a_language_model_has_no_head_to_load(tmp_path: Path) -> None:
    folder, _ = language_model(tmp_path)
    with pytest.raises(ValueError, match=r"language model without a reward head.*load_reward_head"):
        reward_checkpointer(meta_decoder(head=True), tmp_path, folder, load_head=True)


@pytest.mark.parametrize("names", [("wit", "length", "kindness"), ("wit", "kindness")])
def test_a_head_of_other_attributes_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    """Another order is another meaning of every score."""
    folder, _ = attribute_model(tmp_path)
    with pytest.raises(ValueError, match=r"scores wit, kindness, length; the schema has wit"):
        reward_checkpointer(
            meta_decoder(head=True),
            tmp_path,
            folder,
            schema=AttributeSchema(names),
            load_head=True,
        )


@pytest.mark.parametrize(("own", "used"), [({}, "run"), ({"output_dir": "own"}, "own")])
def test_without_a_folder_of_its_own_it_writes_into_the_runs(
    own: dict[str, str], used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not into the working directory."""
    folder, _ = language_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = open_checkpointer(
        {"_component_": COMPONENT, "checkpoint_dir": str(folder)} | own,
        meta_decoder(),
        tiny_tokenizer(),
        seed=0,
        output_dir="run",
    )
    source.save_checkpoint(source.load_checkpoint(), epoch=2)
    assert (tmp_path / used / "epoch_2" / "model.safetensors").is_file()
    assert not (tmp_path / "epoch_2").exists()


def test_torchtunes_checkpointer_cannot_write_an_attribute_model(tmp_path: Path) -> None:
    folder, _ = language_model(tmp_path)
    component = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(ValueError, match=f"torchtune's checkpointers can't write .*{COMPONENT}"):
        open_reward_checkpointer(
            component,
            meta_decoder(head=True),
            tiny_tokenizer(),
            extra_id_template(),
            SCHEMA,
            seed=0,
            output_dir=str(tmp_path),
            load_head=False,
        )


def test_an_attribute_model_is_no_language_model(tmp_path: Path) -> None:
    """Its head where the vocabulary should be: the shapes are in the message."""
    folder, _ = attribute_model(tmp_path)
    with pytest.raises(ValueError, match=r"output\.weight has shape \[3, 64\], .* is \[512, 64\]"):
        load_weights(meta_decoder(), HFCheckpointer(str(folder)), CPU, seed=0)


def test_a_head_with_generic_labels_is_loaded(tmp_path: Path) -> None:
    """A published model whose labels are LABEL_0, ...: the order of the schema is the caller's
    word."""
    folder, _ = attribute_model(tmp_path)
    change_config(folder, id2label={str(i): f"LABEL_{i}" for i in range(len(SCHEMA.names))})
    decoder = meta_decoder(head=True)
    checkpointer = reward_checkpointer(decoder, tmp_path / "out", folder, load_head=True)
    load_weights(decoder, checkpointer, CPU, seed=0)
    assert decoder.output.weight.equal(read(folder)["output.weight"])
    assert list(checkpointer.hf_config["id2label"].values()) == list(SCHEMA.names)


def test_an_export_can_be_read_by_others(tmp_path: Path) -> None:
    """Weights have the permissions of any other new file."""
    folder, _ = attribute_model(tmp_path)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
