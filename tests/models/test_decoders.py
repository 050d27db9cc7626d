"""A decoder and the files written from it are the model that transformers computes.

Also: the tensor-parallel plan names every parameter, and says where a model can't be split.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.data.packing import Group, pack
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.models.config_json import hf_config
from steerlm2.models.decoders import (
    PACKED_LENGTH_LIMIT,
    EmbeddingParallel,
    LoRAParallel,
    divide_heads,
    end_at_hidden_states,
    output_weight,
    pair_cost,
    tensor_parallel_plan,
    tensor_parallel_problems,
    unsupported_parts,
)
from steerlm2.training.forward import response_logps

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "max_seq_len": 16_384,
    "rope_base": 10_000,
    "intermediate_dim": 384,
}
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
# Llama 3: plain RoPE. 3.1: scaled RoPE. 3.2: scaled by 32, and tied embeddings. Qwen2: biases.
BUILDERS = {"llama3": llama3, "llama3_1": llama3_1, "llama3_2": llama3_2, "qwen2": qwen2}

PROMPT_LENGTH, RESPONSE_LENGTHS = 700, (100, 1, 37)
"""So long that the scaling of RoPE, which turns the slow dimensions slower, is seen."""


def test_a_pair_costs_its_share_of_a_token() -> None:
    """One layer of 8 dimensions, 2 heads of 4, 1 key/value head, an MLP of 5 units: a pair takes
    2 x 8 multiply-adds, a token 8 x 8 + 2 x 8 x 4 + 8 x 8 + 3 x 8 x 5 weights, norms 2 x 8.
    """
    decoder = llama3(
        vocab_size=9,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=8,
        intermediate_dim=5,
        max_seq_len=16,
    )
    assert pair_cost(decoder) == 16 / (64 + 64 + 64 + 120 + 16)


def trained_like(builder: Callable[..., TransformerDecoder], **changes: Any) -> TransformerDecoder:
    """A decoder with weights large enough that every part of it matters: norms aren't 1, and
    attention is far from uniform.
    """
    torch.manual_seed(0)
    decoder = builder(**(TINY | changes)).eval()
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return decoder


def export(decoder: TransformerDecoder, folder: Path) -> Path:
    checkpointer = ScratchCheckpointer(decoder, tiny_tokenizer(), seed=0, output_dir=str(folder))
    checkpointer.save_checkpoint({"model": decoder.state_dict()}, epoch=1)
    return folder / "epoch_1"


def example_group() -> Group:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(512, (count,), generator=generator).tolist()

    return Group(tokens(PROMPT_LENGTH), [tokens(length) for length in RESPONSE_LENGTHS])


@torch.no_grad()
def transformers_logps(folder: Path, group: Group) -> Tensor:
    """Sums of log-probs over each response's tokens, one response at a time, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums = []
    for response in group.responses:
        tokens = torch.tensor([[*group.prompt, *response]])
        logits_TV = model(tokens).logits[0, len(group.prompt) - 1 : -1].double()
        logps_TV = logits_TV.log_softmax(dim=1)
        sums.append(logps_TV.gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


@pytest.fixture(scope="module", params=BUILDERS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TransformerDecoder, Path]:
    """A decoder, and the folder that was written from it."""
    decoder = trained_like(BUILDERS[request.param])
    return decoder, export(decoder, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_log_probs_are_transformers(exported: tuple[TransformerDecoder, Path]) -> None:
    """Packed, against the same weights in transformers with one response at a time: 5e-4 nats
    in a sum of 100 tokens, fp32 (the sum is near -700).
    """
    decoder, folder = exported
    group = example_group()
    expected_N = transformers_logps(folder, group)
    end_at_hidden_states(decoder)
    logps_N = response_logps(decoder, pack([group]), CPU)
    torch.testing.assert_close(logps_N.double(), expected_N, rtol=0, atol=5e-4)


@pytest.mark.parametrize("exported", ["llama3_1", "llama3_2"], indirect=True)
def test_log_probs_would_show_a_missing_rope_scaling(
    exported: tuple[TransformerDecoder, Path], tmp_path: Path
) -> None:
    """What the comparison above would not forgive: the 100-token sum moves by over 100 times its
    tolerance.
    """
    _, folder = exported
    config = json.loads((folder / "config.json").read_text())
    del config["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    group = example_group()
    moved_N = transformers_logps(tmp_path, group) - transformers_logps(folder, group)
    assert moved_N[0].abs() > 100 * 5e-4


def test_torchtune_loads_identical_weights(exported: tuple[TransformerDecoder, Path]) -> None:
    decoder, folder = exported
    model_type = "LLAMA3" if "output.weight" in decoder.state_dict() else "LLAMA3_2"
    if decoder.layers[0].attn.q_proj.bias is not None:
        model_type = "QWEN2"
    loaded = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type=model_type,
        output_dir=str(folder.parent / "again"),
    ).load_checkpoint()["model"]
    expected = decoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_transformers_loads_the_tokenizer(exported: tuple[TransformerDecoder, Path]) -> None:
    """Plain text has the same ids; control tokens, which only a template may write, are known."""
    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    text = "Grüße, 日本! What's up?"
    assert tokenizer(text, add_special_tokens=False).input_ids == tiny_tokenizer().encode(text)
    assert tokenizer.convert_tokens_to_ids("<extra_id_1>") == tiny_tokenizer().token_id(
        "<extra_id_1>"
    )


@pytest.mark.parametrize(
    ("builder", "tied", "factor"),
    [(llama3, False, None), (llama3_1, False, 8.0), (llama3_2, True, 32.0)],
)
def test_config_says_what_was_built(
    builder: Callable[..., TransformerDecoder], tied: bool, factor: float | None
) -> None:
    with torch.device("meta"):
        config = hf_config(builder(**TINY))
    shape = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 16_384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": tied,
    }
    assert {key: config[key] for key in shape} == shape
    assert config.get("rope_scaling", {}).get("factor") == factor


def test_decoder_ends_at_the_final_norm() -> None:
    """Output matrix times what it returns are the logits that it returned before."""
    decoder = trained_like(llama3)
    tokens = torch.arange(9)[None]
    logits = decoder(tokens)
    end_at_hidden_states(decoder)
    torch.testing.assert_close(decoder(tokens) @ output_weight(decoder).t(), logits)


def test_rows_may_be_longer_than_the_context() -> None:
    """Positions restart in every response: 3 x 7 packed tokens for a model of 8 positions."""
    decoder = trained_like(llama3, max_seq_len=8)
    end_at_hidden_states(decoder)
    batch = pack([Group([1, 2], [[3] * 6] * 3) for _ in range(3)])
    assert len(batch.tokens_T) > 8
    assert decoder.max_seq_len == PACKED_LENGTH_LIMIT
    logps_N = response_logps(decoder, batch, CPU)
    torch.testing.assert_close(logps_N, logps_N[:1].expand(9))


def test_tied_output_is_the_embedding() -> None:
    decoder = trained_like(llama3_2)
    assert output_weight(decoder) is decoder.tok_embeddings.weight


def meta(builder: Callable[..., TransformerDecoder], **changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return builder(**(TINY | changes))


@pytest.mark.parametrize(
    "decoder",
    [meta(llama3), meta(llama3_2), meta(lora_llama3, **LORA)],
    ids=["untied", "tied", "lora"],
)
def test_plan_lays_out_every_parameter(decoder: TransformerDecoder) -> None:
    """One left out would stay off the tensor-parallel mesh, and the gradient norm would fail."""
    spread = {
        name
        for name, style in tensor_parallel_plan(decoder).items()
        if not isinstance(style, PrepareModuleInput)
    }
    owners = {name.rpartition(".")[0] for name, _ in decoder.named_parameters()}
    left_out = {
        owner
        for owner in owners
        if owner not in spread
        and owner.removesuffix(".lora_a").removesuffix(".lora_b") not in spread
    }
    assert left_out == set()


def test_plan_names_only_modules_that_exist() -> None:
    decoder = meta(llama3)
    assert set(tensor_parallel_plan(decoder)) <= dict(decoder.named_modules()).keys()


def test_plan_of_a_layer() -> None:
    """Column-parallel into the heads and MLP units, row-parallel out of them, norms on sequence
    shards.
    """
    styles = {
        name.removeprefix("layers.1."): type(style)
        for name, style in tensor_parallel_plan(meta(llama3)).items()
        if not name.startswith("layers.0.")
    }
    columns = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3", "output")
    assert styles == (
        {"tok_embeddings": EmbeddingParallel}
        | dict.fromkeys(("norm", "sa_norm", "mlp_norm"), SequenceParallel)
        | dict.fromkeys(("attn", "mlp"), PrepareModuleInput)
        | dict.fromkeys(columns, ColwiseParallel)
        | dict.fromkeys(("attn.output_proj", "mlp.w2"), RowwiseParallel)
    )


def test_plan_shards_lora_only_where_there_is_lora() -> None:
    plan = tensor_parallel_plan(
        meta(lora_llama3, **(LORA | {"lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": False}))
    )
    lora = [name for name, style in plan.items() if isinstance(style, LoRAParallel)]
    assert lora == ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]


def test_heads_are_divided_among_the_ranks() -> None:
    decoder = meta(llama3)
    divide_heads(decoder, 2)
    heads = [(layer.attn.num_heads, layer.attn.num_kv_heads) for layer in decoder.layers]
    assert heads == [(2, 1)] * 2


def test_a_model_that_can_be_split_has_no_problems() -> None:
    assert list(tensor_parallel_problems(meta(llama3), 2)) == []


def test_all_problems_of_a_split_are_named() -> None:
    """4 heads, 2 key/value heads, 384 units and 512 entries over 4: only the 2 don't divide.

    Over 5 nothing does.
    """
    assert list(tensor_parallel_problems(meta(llama3), 4)) == [
        "the model's 2 key/value heads can't be split over 4 tensor-parallel ranks"
    ]
    assert len(list(tensor_parallel_problems(meta(llama3), 5))) == 4


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
def test_llamas_are_supported(builder: Callable[..., TransformerDecoder]) -> None:
    assert list(unsupported_parts(meta(builder))) == []


def test_adapted_layers_are_supported() -> None:
    assert list(unsupported_parts(meta(lora_llama3, **LORA))) == []


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("apply_lora_to_output", "output layer"),
        ("use_dora", "DoRA"),
    ],
)
def test_what_would_be_left_out_is_refused(key: str, part: str) -> None:
    """The message names the key that turns it off."""
    decoder = meta(lora_llama3, **LORA, **{key: True})
    (problem,) = unsupported_parts(decoder)
    assert part in problem
    assert f"set model.{key}=false" in problem
