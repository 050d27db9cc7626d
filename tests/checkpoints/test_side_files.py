"""Every file beside an export's weights is of the run's tokenizer, template and stop token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.side_files import TrainedText, check_side_files, write_tokenizer
from steerlm2.checkpoints.weights import load_weights, open_reward_checkpointer, save_weights
from steerlm2.data.templates import ExtraIdTemplate, extra_id_template
from steerlm2.data.tokenizers import HFTokenizer, hf_tokenizer, tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.facts import ModelFacts
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
GENERATION = {"eos_token_id": [1], "top_p": 0.9, "_from_model_config": True}


def meta_decoder(head: bool = False, **lora: Any) -> Any:
    with torch.device("meta"):
        decoder = (lora_llama3 if lora else llama3)(
            vocab_size=520, num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=16,
            max_seq_len=32, intermediate_dim=8, **lora,
        )  # fmt: skip
        if head:
            add_reward_head(decoder, 2)
    return decoder


def base_folder(tmp_path: Path, *, generation: dict[str, Any] | None = None) -> Path:
    """A checkpoint with the tiny tokenizer, whose own end of text is 1 and <pad> 0."""
    source = ScratchCheckpointer(
        meta_decoder(), tiny_tokenizer(), seed=0, output_dir=str(tmp_path / "base")
    )
    source.save_checkpoint({"model": source.weights}, epoch=1)
    folder = tmp_path / "base" / "epoch_1"
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def other_tokenizer(tmp_path: Path, **config: Any) -> HFTokenizer:
    """The tiny tokenizer with one token more, and with the ids of two tokens exchanged."""
    folder = tmp_path / "tokenizer"
    tiny_tokenizer().save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    extra = spec["added_tokens"][-1] | {"id": 512, "content": "<more>"}
    spec["added_tokens"].append(extra)
    for token in spec["added_tokens"]:
        token["id"] = {0: 1, 1: 0}.get(token["id"], token["id"])
    vocab = spec["model"]["vocab"]
    vocab["<pad>"], vocab["<|endoftext|>"] = 1, 0
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return hf_tokenizer(folder)


def export(tmp_path: Path, folder: Path, text: TrainedText, checkpointer: Any = None) -> Path:
    decoder = meta_decoder()
    checkpointer = checkpointer or HFCheckpointer(str(folder), str(tmp_path))
    load_weights(decoder, checkpointer, CPU, seed=0)
    out = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    return save_weights(decoder, checkpointer, CPU, text=text, **out)


def text_of(tokenizer: HFTokenizer) -> TrainedText:
    return TrainedText(tokenizer, extra_id_template(), tokenizer.token_id("<extra_id_1>"))


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "torchtune's"])
def test_the_tokenizer_of_an_export_is_the_runs(tmp_path: Path, theirs: bool) -> None:
    """The checkpoint's has other ids and a token less; all files agree on the special tokens. Its
    other end, 1, is <pad> now, so it ends nothing; the run's own end of text does."""
    folder = base_folder(tmp_path, generation=GENERATION)
    tokenizer = other_tokenizer(tmp_path)
    stop = tokenizer.token_id("<extra_id_1>")
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder), checkpoint_files=["model.safetensors"],
        model_type="LLAMA3", output_dir=str(tmp_path),
    ) if theirs else None  # fmt: skip
    exported = export(tmp_path, folder, text_of(tokenizer), checkpointer)
    loaded = AutoTokenizer.from_pretrained(exported)
    assert (len(loaded), loaded.convert_tokens_to_ids("<more>")) == (513, 512)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (stop, 1)
    config = read(exported, "config.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == (stop, 1)
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.eos_token_id, generation.pad_token_id) == ([stop, 0], 1)
    assert generation.top_p == 0.9
    assert "_from_model_config" not in read(exported, "generation_config.json")


@pytest.mark.parametrize(
    ("known", "expected"),
    [(None, [3, 1]), ({"eos_token_id": 5}, [3, 5, 1]), ({"eos_token_id": [1, 3]}, [3, 1])],
    ids=["of config.json", "another", "an earlier export's"],
)
def test_other_ends_of_the_same_tokenizer_stay(
    tmp_path: Path, known: dict[str, Any] | None, expected: list[int]
) -> None:
    """<extra_id_1> is 3. The stop token is the first, as vLLM and transformers take them all."""
    folder = base_folder(tmp_path, generation=known)
    exported = export(tmp_path, folder, text_of(tiny_tokenizer()))
    assert read(exported, "generation_config.json")["eos_token_id"] == expected


OF_ONE_TOKENIZER = {
    "bos_token_id": 7,
    "sep_token_id": 8,
    "decoder_start_token_id": 9,
    "forced_bos_token_id": 10,
    "begin_suppress_tokens": [11],
    "suppress_tokens": [12],
    "bad_words_ids": [[13, 14]],
    "sequence_bias": [[[15], -1.5]],
    "image_token_index": 16,
}
CONTRADICTING = {  # <extra_id_1>, the stop token, is 3
    "forced_eos_token_id": 1,
    "forced_bos_token_id": 3,
    "suppress_tokens": [2, 3],
    "begin_suppress_tokens": [3],
    "bad_words_ids": [[4], [5, 3]],
    "sequence_bias": [[[3], -10.0]],
    "stop_strings": ["\n"],
    "stop_words_ids": [[4]],
    "unk_token_id": 128000,
}
KEPT = {"top_p": 0.9, "max_new_tokens": 3, "token_healing": True, "no_repeat_ngram_size": 3}
NAMES = ("config.json", "generation_config.json")


def export_of(
    tmp_path: Path, base: dict[str, Any], tokenizer: HFTokenizer, theirs: bool = False
) -> list[dict[str, Any]]:
    """[file of NAMES] of an export whose base has the keys in both files."""
    folder = base_folder(tmp_path, generation=base)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | base))
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder), checkpoint_files=["model.safetensors"],
        model_type="LLAMA3", output_dir=str(tmp_path),
    ) if theirs else None  # fmt: skip
    exported = export(tmp_path, folder, text_of(tokenizer), checkpointer)
    return [read(exported, name) for name in NAMES]


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "torchtune's"])
def test_ids_of_another_tokenizer_do_not_come_along(tmp_path: Path, theirs: bool) -> None:
    """Nor its texts. The run's tokenizer puts no token first, which transformers' Llama must read:
    without the key it takes 1."""
    base = KEPT | OF_ONE_TOKENIZER | CONTRADICTING | {"tokenizer_class": "LlamaTokenizer"}
    for values in export_of(tmp_path, base, other_tokenizer(tmp_path), theirs):
        assert KEPT.items() <= values.items()
        left = {key for key in values if key in base and key not in KEPT}
        assert left <= {"bos_token_id"}
        assert values.get("bos_token_id") is None
    assert AutoConfig.from_pretrained(tmp_path / "epoch_1").bos_token_id is None


def test_the_first_token_of_a_text_is_the_runs(tmp_path: Path) -> None:
    tokenizer = other_tokenizer(tmp_path, bos_token="<more>", add_bos_token=True)
    for values in export_of(tmp_path, {"bos_token_id": 128000}, tokenizer):
        assert values["bos_token_id"] == 512


def test_ids_of_the_same_tokenizer_stay(tmp_path: Path) -> None:
    base = KEPT | OF_ONE_TOKENIZER
    for values in export_of(tmp_path, base, tiny_tokenizer()):
        assert base.items() <= values.items()


def test_what_contradicts_the_stop_token_goes(tmp_path: Path) -> None:
    """It would suppress it, force another one, or end a response elsewhere; nor do ids stay that
    the tokenizer lacks."""
    for values in export_of(tmp_path, KEPT | CONTRADICTING, tiny_tokenizer()):
        assert KEPT.items() <= values.items()
        assert not CONTRADICTING.keys() & values.keys()


def test_an_export_with_fresh_weights_says_where_its_responses_end(tmp_path: Path) -> None:
    source = ScratchCheckpointer(meta_decoder(), tiny_tokenizer(), seed=0, output_dir=str(tmp_path))
    exported = export(tmp_path, tmp_path, text_of(tiny_tokenizer()), source)
    assert read(exported, "generation_config.json") == {"eos_token_id": [3, 1], "pad_token_id": 0}
    config = read(exported, "config.json")
    assert (config["eos_token_id"], config["bos_token_id"]) == (3, None)


def test_the_special_tokens_map_agrees(tmp_path: Path) -> None:
    """Where the tokenizer has one."""
    tokenizer = other_tokenizer(tmp_path)
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(
        '{"eos_token": "<|endoftext|>"}'
    )
    tokenizer = hf_tokenizer(tmp_path / "tokenizer")
    exported = export(tmp_path, base_folder(tmp_path), text_of(tokenizer))
    expected = {"eos_token": "<extra_id_1>", "pad_token": "<pad>"}
    assert read(exported, "special_tokens_map.json") == expected


def test_a_stop_token_that_stands_for_a_byte_is_named_by_its_own_name(tmp_path: Path) -> None:
    """Llama 2: <0x02>, not the character U+0002, which would be a new token."""

    class ByteTokens(HFTokenizer):
        def token_id(self, token: str) -> int | None:
            return 9 if token == "<0x02>" else super().token_id(token)

        def decode(self, ids: Any) -> str:
            return "\2" if list(ids) == [9] else super().decode(ids)

    template = extra_id_template({"<extra_id_1>": "<0x02>"})
    tiny = tiny_tokenizer()
    text = TrainedText(ByteTokens(tiny._saved_json, tiny._side_files), template, 9)
    assert text.spelled(9) == "<0x02>"
    assert text.spelled(0) == "<pad>"


FACTS = ModelFacts(
    kind="language model",
    template={"_component_": "steerlm2.data.extra_id_template"},
    schema=AttributeSchema(("humor",)),
    default_label="humor:1",
)


@pytest.mark.parametrize("where", ["file", "config"])
def test_the_chat_template_is_that_of_the_run_and_not_of_the_base(
    tmp_path: Path, where: str
) -> None:
    chat = "{{ messages[0].content }}"
    tokenizer = other_tokenizer(tmp_path, **({"chat_template": chat} if where == "config" else {}))
    if where == "file":
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text(chat)
        tokenizer = hf_tokenizer(tmp_path / "tokenizer")
    write_tokenizer(tmp_path / "exported", text_of(tokenizer), 0, FACTS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported").apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert theirs == (
        "<extra_id_0>System\n\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n<extra_id_2>humor:1\n"
    )


def test_a_template_that_no_chat_template_is_known_for_leaves_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the base's."""

    class Backwards(ExtraIdTemplate):
        def prompt(self, system: str, turns: Any, label: str | None) -> Any:
            return super().prompt(system, turns[::-1], label)

    tokenizer = other_tokenizer(tmp_path, chat_template="{{ messages[0].content }}")
    write_tokenizer(tmp_path / "exported", TrainedText(tokenizer, Backwards(), 3), 0, FACTS)
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template is None
    assert "the export has no chat template" in capsys.readouterr().out


def test_code_does_not_come_along(tmp_path: Path) -> None:
    """Nor what would load it."""
    tokenizer = other_tokenizer(tmp_path, auto_map={"AutoTokenizer": ["x.Tokenizer", None]})
    folder = base_folder(tmp_path)
    config = read(folder, "config.json") | {"auto_map": {"AutoConfig": "x.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "x.py").write_text("raise SystemExit")
    exported = export(tmp_path, folder, text_of(tokenizer))
    assert "auto_map" not in read(exported, "config.json") | read(exported, "tokenizer_config.json")
    assert not list(exported.glob("*.py"))


def test_links_of_an_earlier_export_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "epoch_1").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "epoch_1" / "tokenizer.json").symlink_to(tmp_path / "mine")
    export(tmp_path, base_folder(tmp_path), text_of(tiny_tokenizer()))
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_attribute_model_has_the_runs_tokenizer_too(tmp_path: Path) -> None:
    folder, tokenizer = base_folder(tmp_path), other_tokenizer(tmp_path)
    decoder = meta_decoder(head=True)
    component = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(folder),
    }
    checkpointer = open_reward_checkpointer(
        component, decoder, tokenizer, extra_id_template(), AttributeSchema(("a", "b")),
        seed=0, output_dir=str(tmp_path), load_head=False,
    )  # fmt: skip
    load_weights(decoder, checkpointer, CPU, seed=0, fresh_head=True)
    out = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    exported = save_weights(decoder, checkpointer, CPU, **out)
    loaded = AutoTokenizer.from_pretrained(exported)
    assert (len(loaded), loaded.pad_token_id, loaded.eos_token_id) == (513, 1, 0)
    config = read(exported, "config.json")
    assert (config["pad_token_id"], config["eos_token_id"], config["bos_token_id"]) == (1, 0, None)
    assert "sep_token_id" not in config


@pytest.mark.parametrize("head", [False, True], ids=["language model", "attribute model"])
def test_an_adapter_alone_has_the_runs_files(tmp_path: Path, head: bool) -> None:
    """The tokenizer with its special tokens and chat template, and the ends; nothing else is
    exported, so it can't be taken for a model."""
    folder = base_folder(tmp_path, generation=GENERATION)
    tokenizer = other_tokenizer(tmp_path, chat_template="{{ messages }}")
    decoder = meta_decoder(head, lora_attn_modules=["q_proj"], lora_rank=2, lora_alpha=4)
    component = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(folder),
    }
    if head:
        checkpointer = open_reward_checkpointer(
            component, decoder, tokenizer, extra_id_template(), AttributeSchema(("a", "b")),
            seed=0, output_dir=str(tmp_path), load_head=False,
        )  # fmt: skip
    else:
        checkpointer = HFCheckpointer(str(folder), str(tmp_path))
    load_weights(decoder, checkpointer, CPU, seed=0, fresh_head=head)
    exported = save_weights(
        decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path,
        text=None if head else text_of(tokenizer), adapter_only=True,
    )  # fmt: skip
    assert [path.name for path in exported.iterdir()] == ["adapter"]
    adapter = exported / "adapter"
    config = read(adapter, "adapter_config.json")
    assert config["base_model_name_or_path"] == "base/epoch_1"
    loaded = AutoTokenizer.from_pretrained(adapter)
    ends = 0 if head else tokenizer.token_id("<extra_id_1>")
    assert (len(loaded), loaded.pad_token_id, loaded.eos_token_id) == (513, 1, ends)
    assert loaded.chat_template is None
    assert (adapter / "generation_config.json").exists() is not head
    if not head:
        assert read(adapter, "generation_config.json")["eos_token_id"] == [ends, 0]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"a": "cut', b"\xff\xfe", b"[1]"])
def test_a_damaged_side_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} .*: download it again"):
        check_side_files(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    tiny_tokenizer().save(tmp_path)
    (tmp_path / name).write_text('{"eos_token": ')
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} is damaged or cut off"):
        hf_tokenizer(tmp_path)


def test_a_tokenizers_other_forms_are_kept(tmp_path: Path) -> None:
    """tokenizer.model, which converters to other formats need, is no text."""
    tiny_tokenizer().save(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"\xff\0")
    hf_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"\xff\0"
