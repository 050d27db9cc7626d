"""What attribute models compute on 1, 2 and 4 gloo ranks, in files for test_attribute_model.py.

    python attribute_model_on_ranks.py FOLDER

FOLDER/LAYOUT.pt holds the numbers of a layout, FOLDER/LAYOUT/best its best weights. One process
imports everything once and forks the ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from steerlm2.attributes import NOT_LABELLED, AttributeSchema
from steerlm2.checkpoints.training_state import StateWriter, load_best_weights
from steerlm2.checkpoints.weights import load_weights, open_reward_checkpointer, save_weights
from steerlm2.data.packing import RewardGroup, pack_for_reward
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import clip_gradients, parallelize
from steerlm2.distributed.world import World
from steerlm2.inference.attribute_model import AttributeModel, load_attribute_model
from steerlm2.losses import PairLoss, bradley_terry_sum, num_labelled, squared_error_sum
from steerlm2.models.reward_head import add_reward_head
from steerlm2.training.forward import attribute_scores, score_attributes
from steerlm2.training.step_plan import microbatches_by_rank

LAYOUTS: dict[str, dict[str, int]] = {
    "plain": {"tp": 1, "size": 1},
    "fsdp2": {"tp": 1, "size": 2},
    "tp2_fsdp2": {"tp": 2, "size": 4},
}
THOROUGH = ("plain", "tp2_fsdp2")
"""These also load their export, and compute LoRA's gradients."""

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 48,
}
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
SCHEMA = AttributeSchema(("humor", "verbosity", "quality"))
Loss = PairLoss | Literal["regression"]
LOSSES: tuple[Loss, ...] = ("regression", "regular_bt", "margin_bt", "scaled_bt")
LEARNING_RATE = 0.1
MAX_TOKENS = 40


def texts() -> list[RewardGroup]:
    """5 single texts with 3, 2, 1, 1 and 3 labels, spread by length: ranks get unequal counts."""
    generator = torch.Generator().manual_seed(1)
    lengths = ((20, 9), (3, 17), (0, 5), (11, 2), (30, 25))
    labelled = (3, 2, 1, 1, 3)
    groups = []
    for i, ((prompt, response), count) in enumerate(zip(lengths, labelled, strict=True)):
        tokens = torch.randint(10, 512, (prompt + response,), generator=generator).tolist()
        labels = [float((i + a) % 5) if a < count else NOT_LABELLED for a in range(3)]
        groups.append(RewardGroup(tokens[:prompt], [tokens[prompt:]], i, labels=[labels]))
    return groups


def pairs() -> list[RewardGroup]:
    """3 pairs, one of them a tie: a rank has one, the other two."""
    generator = torch.Generator().manual_seed(2)
    groups = []
    for i, strength in enumerate((-3.0, 0.0, 1.0)):
        tokens = torch.randint(10, 512, (24,), generator=generator).tolist()
        responses = [tokens[10 : 14 + i], tokens[14 + i :]]
        groups.append(RewardGroup(tokens[:10], responses, i, strength=strength))
    return groups


def build(world: World, output_dir: Path, *, lora: bool = False) -> tuple[Any, Any]:
    """Decoder and checkpointer as the recipe makes them, with weights 5 times the usual."""
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **SIZES) if lora else llama3(**SIZES)
        add_reward_head(decoder, len(SCHEMA.names))
    if lora:
        set_trainable_params(decoder, get_adapter_params(decoder))
        decoder.output.requires_grad_()
    checkpointer: Any = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        SCHEMA,
        seed=0,
        output_dir=str(output_dir),
        load_head=False,
    )
    checkpointer.weights = {name: 5 * value for name, value in checkpointer.weights.items()}
    parallelize(decoder, world, dtype=torch.float32)
    load_weights(decoder, checkpointer if world.is_main else None, world, seed=0)
    return decoder, checkpointer


def backward(decoder: TransformerDecoder, world: World, loss: Loss) -> float:
    """One step's forwards and backwards, as the recipe does them; the step's loss."""
    groups = texts() if loss == "regression" else pairs()
    labels = torch.tensor([labels for group in groups for labels in group.labels or ()])
    count = num_labelled(labels) if loss == "regression" else len(groups)
    total = torch.zeros((), dtype=torch.float64)
    for microbatch in microbatches_by_rank(groups, world.dp_size, MAX_TOKENS)[world.dp_rank]:
        batch = pack_for_reward(microbatch, multiple_of=world.padding_multiple)
        scores_NA = attribute_scores(decoder, batch)
        if loss == "regression":
            assert batch.labels_NA is not None
            part = squared_error_sum(scores_NA, batch.labels_NA) / count
        else:
            assert batch.strength_G is not None
            part = bradley_terry_sum(scores_NA[:, 2], batch.strength_G, loss) / count
        (part * world.dp_size).backward()
        total += part.detach()
    return world.sum(total).item()


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def take_gradients(decoder: TransformerDecoder) -> dict[str, Tensor]:
    found = {}
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name], parameter.grad = whole(parameter.grad), None
    return found


def state(decoder: TransformerDecoder) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in decoder.named_parameters()}


def scores(decoder: TransformerDecoder, world: World) -> list[list[list[float]]]:
    groups = texts() + pairs()
    return score_attributes(decoder, groups, world, max_tokens_per_microbatch=MAX_TOKENS)


def load_exported(world: World, folder: Path) -> AttributeModel:
    component = "steerlm2.checkpoints.HFCheckpointer"
    return load_attribute_model(
        {"_component_": "torchtune.models.llama3.llama3"} | SIZES,
        {"_component_": component, "checkpoint_dir": str(folder)},
        tiny_tokenizer(),
        extra_id_template(),
        SCHEMA,
        world,
        max_seq_len=128,
        max_tokens_per_microbatch=MAX_TOKENS,
        dtype=torch.float32,
    )


def compute(world: World, folder: Path, layout: str) -> dict[str, Any]:
    out: dict[str, Any] = {"loss": {}, "gradients": {}}
    out["labels"] = [group.labels for group in texts()]
    out["strengths"] = [group.strength for group in pairs()]
    decoder, checkpointer = build(world, folder / layout)
    out["loaded"] = state(decoder)
    out["scores"] = scores(decoder, world)
    everyones: list[Any] = [out["scores"]] * world.size
    if world.mesh is not None:
        dist.all_gather_object(everyones, out["scores"])
    assert all(own == everyones[0] for own in everyones), "ranks have other scores"
    for loss in LOSSES:
        out["loss"][loss] = backward(decoder, world, loss)
        out["gradients"][loss] = take_gradients(decoder)

    parameters = list(decoder.parameters())
    backward(decoder, world, "regression")
    out["norm"] = clip_gradients(parameters, 0.5).item()
    out["clipped"] = clip_gradients(parameters, None).item()
    torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
    out["best"] = state(decoder)
    out["scores_of_best"] = scores(decoder, world)
    states = StateWriter(folder / layout, world)
    states.save_best(3, decoder, {"val_loss": 0.25})
    states.wait()
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)
    out["scores_of_worse"] = scores(decoder, world)
    load_best_weights(folder / layout, decoder, world)
    out["best_again"] = state(decoder)
    out["scores_of_best_again"] = scores(decoder, world)
    earlier = [name for name in LAYOUTS if (folder / f"{name}.pt").exists()]
    for other in earlier:
        load_best_weights(folder / other, decoder, world)
        out[f"best_of_{other}"] = state(decoder)
    load_best_weights(folder / layout, decoder, world)
    save_weights(
        decoder,
        checkpointer,
        world,
        epoch=1,
        dtype=torch.float32,
        output_dir=folder / layout,
    )
    world.barrier()
    if layout in THOROUGH:
        model = load_exported(world, folder / layout / "epoch_1")
        out["exported_scores"] = model.score(texts())
        adapted, _ = build(world, folder / layout, lora=True)
        backward(adapted, world, "regression")
        out["gradients"]["lora"] = take_gradients(adapted)
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    for layout, shape in LAYOUTS.items():

        def work(world: World, layout: str = layout) -> None:
            numbers = compute(world, folder, layout)
            if world.is_main:
                torch.save(numbers, folder / f"{layout}.pt")

        run_on_ranks(work, size=shape["size"], tensor_parallel_dim=shape["tp"])


if __name__ == "__main__":
    main()
