"""`from_checkpoint` computes what transformers computes from the same folder, before and after an
export, in the spelling of config.json of transformers 4 and of 5.

Dimension letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.llama3 import lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.modules.tied_linear import TiedLinear
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from steerlm2.attributes import AttributeSchema
from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.checkpoints.decoder import build_decoder
from steerlm2.checkpoints.weights import (
    load_weights,
    open_checkpointer,
    open_reward_checkpointer,
    save_weights,
)
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.models import from_checkpoint, hf_builder
from steerlm2.models.nf4 import is_nf4

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"rope_theta": 10_000.0},
    "llama3": GROUPED | {"rope_theta": 500_000.0},
    "llama3_1": GROUPED | {"rope_theta": 500_000.0, "rope_scaling": SCALING},
    "llama3_2": GROUPED
    | {"rope_theta": 500_000.0, "tie_word_embeddings": True}
    | {"rope_scaling": SCALING | {"factor": 32.0}},
    "linear": {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "wide heads": GROUPED | {"rope_theta": 10_000.0, "head_dim": 32},
    "mistral": GROUPED | {"model_type": "mistral", "rope_theta": 10_000.0, "sliding_window": None},
    "mistral with a wide window": GROUPED
    | {"model_type": "mistral", "rope_theta": 1_000.0, "sliding_window": 256, "head_dim": 32},
    "qwen2": GROUPED
    | {"model_type": "qwen2", "rope_theta": 1_000_000.0, "sliding_window": 64}
    | {"use_sliding_window": False, "max_window_layers": 1},
    "qwen2 tied": GROUPED
    | {"model_type": "qwen2", "rope_theta": 10_000.0, "tie_word_embeddings": True},
    "qwen3": GROUPED | {"model_type": "qwen3", "rope_theta": 1_000_000.0, "head_dim": 32},
    "qwen3 tied, of an odd size": GROUPED
    | {"model_type": "qwen3", "rope_theta": 10_000.0, "head_dim": 32, "hidden_size": 66}
    | {"tie_word_embeddings": True},
    "other factors": GROUPED
    | {"rope_theta": 1_000.0}
    | {"rope_scaling": SCALING | {"low_freq_factor": 2.0, "high_freq_factor": 8.0}},
}
"""config.json, in transformers 4's spelling, with what tells one family from another."""
TOKENS_T = torch.randint(512, (200,), generator=torch.Generator().manual_seed(1))


def spelled(config: dict[str, Any], version: int) -> dict[str, Any]:
    """The values of transformers 4 as that version of transformers writes them."""
    if version == 4:
        return config
    rest = {key: value for key, value in config.items() if not key.startswith("rope_")}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    return rest | {"rope_parameters": scaling | {"rope_theta": config["rope_theta"]}}


def make_folder(folder: Path, family: str, version: int = 5) -> Path:
    """A folder that transformers wrote, with config.json in the spelling of a version."""
    values = {"model_type": "llama"} | TINY | FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(values))))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    (folder / "config.json").write_text(json.dumps(config | spelled(values, version)))
    return folder


@torch.no_grad()
def transformers_logps(folder: Path) -> Tensor:
    """[T, V] in the installed transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(TOKENS_T[None]).logits[0].log_softmax(dim=1)


def loaded(folder: Path, output_dir: Path, **lora: Any) -> tuple[TransformerDecoder, Any]:
    """The decoder of a folder with its weights, and its checkpointer."""
    component = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(folder),
    }
    model = {"_component_": "steerlm2.models.from_checkpoint", **lora}
    decoder = build_decoder(model, torch.float32, checkpointer=component)
    checkpointer = open_checkpointer(
        component, decoder, tiny_tokenizer(), seed=0, output_dir=str(output_dir)
    )
    load_weights(decoder, checkpointer, CPU, seed=0)
    return decoder.eval(), checkpointer


@torch.no_grad()
def logps(decoder: TransformerDecoder) -> Tensor:
    return decoder(TOKENS_T[None])[0].log_softmax(dim=1)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_of_config_json_computes_what_transformers_computes(
    family: str, version: int, tmp_path: Path
) -> None:
    """Log-probs of all tokens at 200 positions; then of other weights, through an export."""
    folder = make_folder(tmp_path / "base", family, version)
    decoder, checkpointer = loaded(folder, tmp_path)
    torch.testing.assert_close(logps(decoder), transformers_logps(folder), rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.25)
    options: dict[str, Any] = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    export = save_weights(decoder, checkpointer, CPU, **options)
    torch.testing.assert_close(logps(decoder), transformers_logps(export), rtol=0, atol=1e-4)
    for key in ("model_type", "architectures"):
        kept = [json.loads((each / "config.json").read_text())[key] for each in (folder, export)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fresh_weights_of_a_config_are_exported_as_what_they_are(
    family: str, tmp_path: Path
) -> None:
    """Biases start at 0 and norms at 1, as in transformers."""
    folder = make_folder(tmp_path / "base", family)
    decoder = from_checkpoint(str(folder))
    checkpointer = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=1, output_dir=str(tmp_path))
    state = checkpointer.load_checkpoint()
    small = {name: weight for name, weight in state["model"].items() if weight.dim() == 1}
    assert all((weight == float(name.endswith("scale"))).all() for name, weight in small.items())
    decoder.load_state_dict(state["model"])
    checkpointer.save_checkpoint(state, epoch=1)
    torch.testing.assert_close(
        logps(decoder.eval()), transformers_logps(tmp_path / "epoch_1"), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama3", "llama3_1", "llama3_2"])
def test_transformers_4_reads_the_same_rope_from_an_export(family: str, tmp_path: Path) -> None:
    """It ignores rope_parameters; the folder had nothing else."""
    folder = make_folder(tmp_path / "base", family, version=5)
    _, checkpointer = loaded(folder, tmp_path)
    config = checkpointer.hf_config
    assert config["rope_theta"] == 500_000.0
    assert config.get("rope_scaling") == FAMILIES[family].get("rope_scaling")
    assert config["rope_parameters"]["rope_theta"] == 500_000.0


def test_another_rope_would_show(tmp_path: Path) -> None:
    """The comparison with transformers can fail: 1% of theta moves log-probs by more than 1e-4."""
    folder = make_folder(tmp_path, "llama3", version=4)
    before = transformers_logps(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 505_000.0}))
    assert (transformers_logps(folder) - before).abs().max() > 1e-3


# Adapters

LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}


def test_adapters_are_those_of_torchtunes_builder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama3")
    with torch.device("meta"):
        ours = from_checkpoint(str(folder), **LORA)
        theirs = lora_llama3(
            **LORA,
            vocab_size=512,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=64,
            max_seq_len=256,
            intermediate_dim=96,
        )
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert get_adapter_params(ours).keys() == get_adapter_params(theirs).keys()
    adapted = ours.layers[0].attn.q_proj
    assert (adapted.rank, adapted.alpha) == (4, 8)


def test_an_adapted_model_starts_as_its_checkpoint(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "llama3_2")
    decoder, _ = loaded(folder, tmp_path, **LORA)
    assert isinstance(decoder.output, TiedLinear)
    torch.testing.assert_close(logps(decoder), transformers_logps(folder), rtol=0, atol=1e-4)


ALL_LORA = LORA | {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]}
NAMES_IN_PEFT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_adapters_of_every_family_are_merged_and_saved_for_peft(
    family: str, tmp_path: Path
) -> None:
    """transformers computes from the merged folder what the adapted decoder does; and PEFT's way,
    W + alpha / rank B A, makes that folder of the base and the adapter's files."""
    folder = make_folder(tmp_path / "base", family)
    decoder, checkpointer = loaded(folder, tmp_path, **ALL_LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in get_adapter_params(decoder).values():
            torch.nn.init.normal_(parameter, std=0.2)
    options: dict[str, Any] = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    export = save_weights(decoder, checkpointer, CPU, **options)
    torch.testing.assert_close(logps(decoder), transformers_logps(export), rtol=0, atol=1e-4)
    base, merged = (load_file(each / "model.safetensors") for each in (folder, export))
    adapter = load_file(export / "adapter" / "adapter_model.safetensors")
    for name in (name for name in base if name.split(".")[-2] in NAMES_IN_PEFT):
        if name.endswith(".bias"):
            assert merged[name].equal(base[name])
            continue
        of_peft = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = (adapter.pop(f"{of_peft}.lora_{which}.weight") for which in "BA")
        torch.testing.assert_close(merged[name], base[name] + 8 / 4 * b @ a, rtol=0, atol=1e-5)
    assert not adapter


@pytest.mark.parametrize("family", ["llama3_2", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_peft_computes_from_an_adapter_alone_what_its_decoder_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    # It refuses the torchao that torchtune needs, also where nothing is quantized.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    folder = make_folder(tmp_path / "base", family)
    decoder, checkpointer = loaded(folder, tmp_path, **ALL_LORA)
    start = logps(decoder)
    torch.manual_seed(0)
    for parameter in get_adapter_params(decoder).values():
        torch.nn.init.normal_(parameter, std=0.2)
    options: dict[str, Any] = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    export = save_weights(decoder, checkpointer, CPU, **options, adapter_only=True)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, export / "adapter").eval()
    theirs = adapted(TOKENS_T[None]).logits[0].log_softmax(dim=1)
    torch.testing.assert_close(logps(decoder), theirs, rtol=0, atol=1e-4)
    assert (theirs - start).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qlora_keeps_biases_and_norms_as_they_are(family: str) -> None:
    """In 4 bits are the matrices of the layers alone; the biases are frozen with them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    values = {"model_type": family} | TINY | FAMILIES[family] | sizes
    planned = hf_builder.decoder_config(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_builder, "_config", lambda *_: planned)
        decoder = from_checkpoint("", **LORA, quantize_base=True)
    set_trainable_params(decoder, get_adapter_params(decoder))
    layer = {n: p for n, p in decoder.layers[0].named_parameters() if "lora_" not in n}
    assert not any(p.requires_grad for p in layer.values())
    assert {n for n, p in layer.items() if not is_nf4(p)} == {
        n for n in layer if n.endswith((".bias", ".scale"))
    }
    assert decoder(TOKENS_T[None]).isfinite().all()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_an_attribute_model_of_every_family_is_transformers(family: str, tmp_path: Path) -> None:
    """The scores of the exported folder at the last token."""
    folder = make_folder(tmp_path / "base", family)
    component = {
        "_component_": "steerlm2.checkpoints.HFCheckpointer",
        "checkpoint_dir": str(folder),
    }
    model = {"_component_": "steerlm2.models.from_checkpoint"}
    schema = AttributeSchema(("wit", "kindness", "length"))
    decoder = build_decoder(
        model, torch.float32, checkpointer=component, num_attributes=len(schema.names)
    )
    checkpointer = open_reward_checkpointer(
        component,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        schema,
        seed=0,
        output_dir=str(tmp_path),
        load_head=False,
    )
    load_weights(decoder, checkpointer, CPU, seed=0, fresh_head=True)
    options: dict[str, Any] = {"epoch": 1, "dtype": torch.float32, "output_dir": tmp_path}
    export = save_weights(decoder, checkpointer, CPU, **options)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__.lower() == f"{family}forsequenceclassification"
    assert theirs.config.id2label == dict(enumerate(schema.names))
    text = TOKENS_T[theirs.config.pad_token_id != TOKENS_T][None]
    torch.testing.assert_close(
        decoder.eval()(text)[0, -1], theirs.eval()(text).logits[0], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_rank": 4}, "set lora_attn_modules"),
        ({"quantize_base": True}, "set lora_attn_modules"),
        ({"lora_attn_modules": ["q_proj", "w1"]}, "must be a list of .*; got w1"),
        ({"lora_attn_modules": "q_proj"}, "must be a list of .*; got q_proj"),
    ],
)
def test_lora_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        from_checkpoint(planned_as="torchtune.models.llama3.llama3_8b", **arguments)


def test_matrices_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    """64 x 64, 32 x 64 and 96 x 64 numbers; 4 bits take a multiple of 16,384."""
    folder = make_folder(tmp_path, "llama3")
    expected = r"quantize_base: q_proj \[64, 64\], k_proj \[32, 64\], mlp \[96, 64\] can't be"
    with pytest.raises(ValueError, match=expected):
        from_checkpoint(str(folder), **LORA, quantize_base=True)


# Which folder


def test_a_folder_of_its_own_comes_before_the_checkpointers(tmp_path: Path) -> None:
    make_folder(tmp_path / "own", "llama3")
    make_folder(tmp_path / "other", "llama2")
    component = {"checkpoint_dir": str(tmp_path / "other")}
    model = {"_component_": "steerlm2.models.from_checkpoint"}
    own = model | {"checkpoint_dir": str(tmp_path / "own")}
    kv_heads = [
        build_decoder(section, torch.float32, checkpointer=component).layers[0].attn.num_kv_heads
        for section in (model, own)
    ]
    assert kv_heads == [4, 2]


@pytest.mark.parametrize("checkpointer", [None, {}])
def test_without_a_checkpoint_it_says_what_to_set(checkpointer: dict[str, Any] | None) -> None:
    """What is planned doesn't stand in for one: that would be trained from nothing."""
    model = {
        "_component_": "steerlm2.models.from_checkpoint",
        "planned_as": "torchtune.models.llama3_1.llama3_1_8b",
    }
    with pytest.raises(ValueError, match=r"set checkpointer, or model\.checkpoint_dir"):
        build_decoder(model, torch.float32, checkpointer=checkpointer)


def test_a_folder_that_does_not_exist_can_be_planned_with(tmp_path: Path) -> None:
    """8.03e9 parameters of Llama 3.1 8B; without `planned_as` the folder is named."""
    model = {
        "_component_": "steerlm2.models.from_checkpoint",
        "checkpoint_dir": str(tmp_path / "missing"),
    }
    with pytest.raises(FileNotFoundError, match=r"missing has no config\.json"):
        build_decoder(model, torch.float32)
    model["planned_as"] = "torchtune.models.llama3_1.llama3_1_8b"
    decoder = build_decoder(model, torch.float32)
    assert sum(p.numel() for p in decoder.parameters()) == 8_030_261_248


def test_an_existing_folder_comes_before_what_is_planned(tmp_path: Path) -> None:
    make_folder(tmp_path, "llama2")
    decoder = from_checkpoint(str(tmp_path), planned_as="torchtune.models.llama3_1.llama3_1_8b")
    assert len(decoder.layers) == 2
