"""An attribute model loaded from its folder; and training it on more ranks is training it on one.

Dimension letters: N responses, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchtune.models.llama3 import llama3
from transformers import AutoModelForSequenceClassification

from steerlm2.attributes import NOT_LABELLED, AttributeSchema
from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.checkpoints.weights import load_weights, open_reward_checkpointer, save_weights
from steerlm2.data.records import Turn
from steerlm2.data.templates import encode_for_scoring, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.models.reward_head import add_reward_head

CPU = World(torch.device("cpu"))
SCHEMA = AttributeSchema(("humor", "verbosity"))
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 48,
}
TURNS = [Turn("User", "Hi."), Turn("Assistant", "Yes?", "humor:1"), Turn("User", "Why?")]
ANSWERS = ["So.", "Because!", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported attribute model, weights 5 times the usual so that scores differ."""
    output_dir = tmp_path_factory.mktemp("exported")
    with torch.device("meta"):
        decoder = llama3(**SIZES)
        add_reward_head(decoder, len(SCHEMA.names))
    checkpointer = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        SCHEMA,
        seed=0,
        output_dir=str(output_dir),
        load_head=False,
    )
    assert isinstance(checkpointer, ScratchCheckpointer)
    checkpointer.weights = {name: 5 * value for name, value in checkpointer.weights.items()}
    load_weights(decoder, checkpointer, CPU, seed=0)
    save_weights(decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=output_dir)
    return output_dir / "epoch_1"


def load(folder: Path | None, **changes: Any) -> AttributeModel:
    arguments: dict[str, Any] = {
        "schema": SCHEMA,
        "sizes": SIZES,
        "max_seq_len": 128,
        "max_tokens_per_microbatch": 256,
        "dtype": torch.float32,
    }
    arguments |= changes
    component = "steerlm2.checkpoints.HFCheckpointer"
    return load_attribute_model(
        {"_component_": "torchtune.models.llama3.llama3"} | arguments.pop("sizes"),
        {"_component_": component, "checkpoint_dir": str(folder)} if folder else None,
        tiny_tokenizer(),
        extra_id_template(),
        arguments.pop("schema"),
        CPU,
        **arguments,
    )


@torch.no_grad()
def test_scores_of_a_conversation_are_transformers(folder: Path) -> None:
    """From turns and responses to scores, against the folder in transformers: each text alone, with
    the token ids that stand in it. fp32, 1e-5; the scores' size is near 5.
    """
    model = load(folder)
    group, num_cut = model.encode("S", TURNS, ANSWERS)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    expected_NA = torch.cat(
        [theirs(torch.tensor([[*group.prompt, *text]])).logits for text in group.responses]
    )
    assert num_cut == 0
    torch.testing.assert_close(
        torch.tensor(model.score([group])[0]), expected_NA, rtol=1e-5, atol=1e-5
    )
    assert expected_NA.std() > 0.1


def test_encoding_is_what_the_model_was_trained_on(folder: Path) -> None:
    expected = encode_for_scoring(extra_id_template(), tiny_tokenizer(), "S", TURNS, ANSWERS, 24)
    assert load(folder, max_seq_len=24).encode("S", TURNS, ANSWERS) == expected
    assert expected[1] == 3


def test_a_text_beyond_the_token_budget_is_scored_alone(folder: Path) -> None:
    """Budget 1: every response is a micro-batch of its own."""
    wide, narrow = (load(folder, max_tokens_per_microbatch=budget) for budget in (1000, 1))
    groups = [wide.encode("S", TURNS, ANSWERS)[0], wide.encode("", TURNS[:1], ["x"])[0]]
    for one, other in zip(wide.score(groups), narrow.score(groups), strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)


def test_nothing_is_nothing(folder: Path) -> None:
    assert load(folder).score([]) == []


def test_without_a_checkpoint_the_weights_follow_the_seed() -> None:
    first, again, other = (load(None, seed=seed) for seed in (1, 1, 2))
    group, _ = first.encode("S", TURNS, ANSWERS)
    assert first.score([group]) == again.score([group]) != other.score([group])


def test_weights_take_the_dtype(folder: Path) -> None:
    """And scores stay near float32's, without being them: 8 bits, up to a tenth of their norm."""
    exact, rounded = load(folder), load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.decoder.parameters()} == {torch.bfloat16}
    group, _ = exact.encode("S", TURNS, ANSWERS)
    expected = torch.tensor(exact.score([group]))
    difference = torch.tensor(rounded.score([group])) - expected
    assert 0 < difference.norm() < 0.1 * expected.norm()


def test_texts_beyond_the_context_are_refused(folder: Path) -> None:
    """Before any weight is read."""
    with pytest.raises(ValueError, match="129 tokens, more than the model's context of 128"):
        load(folder, max_seq_len=129)


def test_a_smaller_vocabulary_is_refused(folder: Path) -> None:
    """Its checkpoint has as many embeddings as the tokenizer has tokens: the model is to change."""
    with pytest.raises(ValueError, match=r"vocab_size 512, model: 500 \(model\.vocab_size=512\)"):
        load(folder, sizes=SIZES | {"vocab_size": 500})


def test_other_attributes_than_the_heads_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"scores humor, verbosity; the schema has verbosity"):
        load(folder, schema=AttributeSchema(("verbosity", "humor")))


def test_a_model_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="intermediate_size 48, model: 40 "):
        load(folder, sizes=SIZES | {"intermediate_dim": 40})


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'} has no config.json"):
        load(tmp_path / "none")


# On more ranks: attribute_model_on_ranks.py computes, here is what must be equal

LAYOUTS = ("fsdp2", "tp2_fsdp2")
ON_RANKS = Path(__file__).with_name("attribute_model_on_ranks.py")
LOSSES = ("regression", "regular_bt", "margin_bt", "scaled_bt")
REWARD = 2
"""The attribute that is the pairs' reward."""


@pytest.fixture(scope="module")
def folder_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., None]
) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_script(ON_RANKS, folder)
    return folder


@pytest.fixture(scope="module")
def numbers(folder_of_ranks: Path) -> dict[str, dict[str, Any]]:
    """Layout -> what it computed."""
    return {name: torch.load(folder_of_ranks / f"{name}.pt") for name in ("plain", *LAYOUTS)}


def different(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> list[str]:
    """Parameters that differ by more than `tolerance`, relative to the norm of what is expected."""
    assert actual.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if not (actual[name] - value).norm() <= tolerance * value.norm()
    ]


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def loss_by_hand(numbers: dict[str, Any], loss: str) -> float:
    """From the scores, in plain Python: the mean over all labels, or over all pairs. A pair's d is
    the preferred reward minus the other; a tie is half a preference for either.
    """
    texts, pairs = numbers["scores"][:5], numbers["scores"][5:]
    if loss == "regression":
        squares = [
            (score - label) ** 2
            for scores, labels in zip(texts, numbers["labels"], strict=True)
            for score, label in zip(scores[0], labels[0], strict=True)
            if label != NOT_LABELLED
        ]
        assert len(squares) == 3 + 2 + 1 + 1 + 3
        return math.fsum(squares) / len(squares)
    total = 0.0
    for (first, second), strength in zip(pairs, numbers["strengths"], strict=True):
        size = abs(strength)
        margin = size if loss == "margin_bt" else 0
        scale = size if loss == "scaled_bt" else 1
        d = first[REWARD] - second[REWARD]
        ways = [d] if strength < 0 else [-d] if strength > 0 else [d, -d]
        total += scale * sum(minus_log_sigmoid(way - margin) for way in ways) / len(ways)
    return total / len(pairs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_the_loss_of_a_step_is_the_mean_over_all_ranks(
    layout: str, loss: str, numbers: dict[str, Any]
) -> None:
    """Unequal counts per rank (10 labels, 3 pairs): a mean of the ranks' means would differ."""
    found = numbers[layout]["loss"][loss]
    assert found == pytest.approx(loss_by_hand(numbers["plain"], loss), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_with_the_same_weights(layout: str, numbers: dict[str, Any]) -> None:
    assert different(numbers[layout]["loaded"], numbers["plain"]["loaded"], 0) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_scores(layout: str, numbers: dict[str, Any]) -> None:
    """By group, response and attribute, in the groups' order; on every rank (asserted there)."""
    pairs = zip(numbers[layout]["scores"], numbers["plain"]["scores"], strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(
            torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_gradients(
    layout: str, loss: str, numbers: dict[str, Any]
) -> None:
    """Of all 21 parameters, the head's among them, each relative to its norm: 1e-4."""
    expected = numbers["plain"]["gradients"][loss]
    assert len(expected) == 21
    assert expected["output.weight"].norm() > 1e-3
    assert different(numbers[layout]["gradients"][loss], expected, 1e-4) == []


def test_adapters_and_head_have_the_same_gradients_on_ranks(numbers: dict[str, Any]) -> None:
    """LoRA on 4 ranks (TP 2 x FSDP2 2) and on one: nothing else has a gradient. Those of A are zero
    as long as B is.
    """
    expected = numbers["plain"]["gradients"]["lora"]
    trained = {name.split(".")[-2] for name in expected}
    assert trained == {"lora_a", "lora_b", "output"}
    assert min(expected[n].norm() for n in expected if "lora_b" in n or "output." in n) > 1e-4
    assert different(numbers["tp2_fsdp2"]["gradients"]["lora"], expected, 1e-4) == []


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_the_gradient_norm_is_of_all_parameters_together(
    layout: str, numbers: dict[str, Any]
) -> None:
    """sqrt of the sum of all squares; clipped to 0.5, it is 0.5 on every rank (torch divides by the
    norm plus 1e-6).
    """
    gradients = numbers["plain"]["gradients"]["regression"].values()
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert norm > 0.5
    assert numbers[layout]["norm"] == pytest.approx(norm, rel=1e-5)
    assert numbers[layout]["clipped"] == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_same_step(layout: str, numbers: dict[str, Any]) -> None:
    """SGD with the clipped gradients."""
    assert different(numbers[layout]["best"], numbers["plain"]["best"], 1e-5) == []


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_the_best_weights_come_back_on_every_layout(layout: str, numbers: dict[str, Any]) -> None:
    """Bit for bit, after all parameters were halved."""
    assert different(numbers[layout]["best_again"], numbers[layout]["best"], 0) == []


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_the_best_weights_are_what_the_model_computes_with(
    layout: str, numbers: dict[str, Any]
) -> None:
    """Scores, other weights, their scores, the best ones again: bit for bit the first scores. FSDP2
    keeps gathered copies of some weights after a forward without a backward.
    """
    assert numbers[layout]["scores_of_best_again"] == numbers[layout]["scores_of_best"]
    assert numbers[layout]["scores_of_worse"] != numbers[layout]["scores_of_best"]


@pytest.mark.parametrize(
    ("layout", "saved_on"),
    [
        (layout, saved_on)
        for i, layout in enumerate(LAYOUTS)
        for saved_on in ("plain", *LAYOUTS)[: i + 1]
    ],
)
def test_the_best_weights_of_another_layout_are_read(
    layout: str, saved_on: str, numbers: dict[str, Any]
) -> None:
    """On another number of ranks, or another tensor-parallel degree: bit for bit."""
    found = numbers[layout].get(f"best_of_{saved_on}")
    assert found is not None
    assert different(found, numbers[saved_on]["best"], 0) == []


@pytest.mark.parametrize("layout", ["plain", *LAYOUTS])
def test_an_export_holds_the_whole_model(
    layout: str, folder_of_ranks: Path, numbers: dict[str, Any]
) -> None:
    exported = HFCheckpointer(str(folder_of_ranks / layout / "epoch_1")).load_checkpoint()["model"]
    assert different(exported, numbers[layout]["best"], 0) == []


def test_an_export_scores_the_same_on_ranks(numbers: dict[str, Any]) -> None:
    """Loaded by load_attribute_model on the 4 ranks that wrote it, and on one. The step before
    moved the scores.
    """
    expected = torch.tensor(numbers["plain"]["exported_scores"])
    actual = torch.tensor(numbers["tp2_fsdp2"]["exported_scores"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    before = torch.tensor(numbers["plain"]["scores"][:5])
    assert (expected - before).abs().max() > 1e-3
