"""Weights in and out, and a resumed run that is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import FullModelHFCheckpointer

from steerlm2.attributes import AttributeSchema
from steerlm2.data.templates import extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.models.reward_head import add_reward_head
from steerlm2.training.checkpoint import (
    BEST,
    STATE_FILE,
    best_state,
    checkpoints,
    load_best_weights,
    load_training_state,
    load_weights,
    open_checkpointer,
    open_reward_checkpointer,
    resume_training,
    save_best_weights,
    save_training_state,
    save_weights,
)
from steerlm2.training.distributed import World
from steerlm2.training.hf_checkpoint import INIT_STD, ScratchCheckpointer

CPU = World(torch.device("cpu"))
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
LORA: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}


def meta_decoder(**changes: Any) -> TransformerDecoder:
    with torch.device("meta"):
        return llama3(**(TINY | changes))


def meta_lora_decoder() -> TransformerDecoder:
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY)
    set_trainable_params(decoder, get_adapter_params(decoder))
    return decoder


def scratch(decoder: TransformerDecoder, seed: int = 0, folder: Any = "out") -> ScratchCheckpointer:
    return ScratchCheckpointer(decoder, tiny_tokenizer(), seed=seed, output_dir=str(folder))


def loaded(decoder: TransformerDecoder, seed: int = 0) -> TransformerDecoder:
    load_weights(decoder, scratch(decoder, seed), CPU, seed=seed)
    return decoder


def same_state(first: Any, second: Any) -> bool:
    """Bitwise equality of nested dicts and lists with tensors in them."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_state(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


class Folder:
    """Stands for any checkpointer that reads these weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def load_checkpoint(self) -> dict[str, Any]:
        return {"model": self.weights}

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError


# Weights


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (loaded(meta_decoder(), seed).state_dict() for seed in (3, 3, 4))
    assert same_state(first, again)
    assert not same_state(first, other)


def test_fresh_weights_differ_from_matrix_to_matrix() -> None:
    """w1 and w3 have one shape, but not one set of values."""
    mlp = loaded(meta_decoder()).layers[0].mlp
    assert not torch.equal(mlp.w1.weight, mlp.w3.weight)


def test_fresh_matrices_are_normal_and_norms_are_one() -> None:
    """512 x 32 = 16,384 values: their standard deviation is within 3% of 0.02 (6 sigma)."""
    decoder = loaded(meta_decoder())
    assert decoder.tok_embeddings.weight.std().item() == pytest.approx(INIT_STD, rel=0.03)
    assert torch.equal(decoder.norm.scale, torch.ones(32))


def test_loaded_decoder_has_its_positions() -> None:
    """RoPE's table isn't a weight: a decoder from the meta device has to compute it."""
    decoder = loaded(meta_decoder())
    with torch.no_grad():
        logits = decoder(torch.tensor([[5, 6, 7]]))
        swapped = decoder(torch.tensor([[6, 5, 7]]))
    assert logits.isfinite().all()
    assert not torch.equal(logits[0, -1], swapped[0, -1])


def test_weights_take_the_decoders_dtype() -> None:
    decoder = loaded(meta_decoder().bfloat16())
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}


def test_adapters_start_as_nothing() -> None:
    """LoRA's B is zero and its A is not: the model is the base model, and can be trained."""
    decoder = loaded(meta_lora_decoder())
    q_proj = decoder.layers[0].attn.q_proj
    assert torch.equal(q_proj.lora_b.weight, torch.zeros(32, 4))
    assert (q_proj.lora_a.weight != 0).all()


def test_weights_that_do_not_fit_are_all_named() -> None:
    """One missing, one too many, two of another shape."""
    weights = dict(scratch(meta_decoder(intermediate_dim=40)).weights)
    del weights["norm.scale"]
    weights["extra.weight"] = torch.zeros(1)
    del weights["layers.0.mlp.w2.weight"]
    with pytest.raises(ValueError, match="the checkpoint doesn't fit the model") as error:
        load_weights(meta_decoder(), Folder(weights), CPU, seed=0)
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  - extra.weight is not in the model",
        "  - layers.0.mlp.w1.weight has shape [40, 32], the model's is [48, 32]",
        "  - layers.0.mlp.w2.weight is missing",
        "  - layers.0.mlp.w3.weight has shape [40, 32], the model's is [48, 32]",
        "  - norm.scale is missing",
    ]


def test_exported_weights_are_the_decoders(tmp_path: Path) -> None:
    decoder = loaded(meta_decoder())
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(decoder, checkpointer, CPU, epoch=2, dtype=torch.float32, output_dir=tmp_path)
    component = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path / "epoch_2"),
        "checkpoint_files": ["model.safetensors"],
        "model_type": "LLAMA3",
        "output_dir": str(tmp_path / "next"),
    }
    again = open_checkpointer(component, decoder, tiny_tokenizer(), seed=0, output_dir="unused")
    assert isinstance(again, FullModelHFCheckpointer)
    assert same_state(again.load_checkpoint()["model"], dict(decoder.state_dict()))


def test_export_is_in_the_dtype_asked_for(tmp_path: Path) -> None:
    decoder = loaded(meta_decoder())
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(decoder, checkpointer, CPU, epoch=1, dtype=torch.bfloat16, output_dir=tmp_path)
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "epoch_1" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def trained_lora_decoder() -> TransformerDecoder:
    decoder = loaded(meta_lora_decoder())
    torch.manual_seed(1)
    for parameter in get_adapter_params(decoder).values():
        torch.nn.init.normal_(parameter)
    return decoder


@pytest.mark.parametrize(
    ("known", "expected"),
    [(None, [7, 1]), ({"eos_token_id": [5, 7], "top_p": 0.9}, [7, 5])],
    ids=["of the tokenizer", "of the checkpoint"],
)
def test_an_export_says_where_its_responses_end(
    known: dict[str, Any] | None, expected: list[int], tmp_path: Path
) -> None:
    """The stop token first, then what ended a generation before; other settings stay."""
    decoder = loaded(meta_decoder())
    checkpointer = scratch(decoder, folder=tmp_path)
    file = tmp_path / "epoch_1" / "generation_config.json"
    if known:
        file.parent.mkdir()
        file.write_text(json.dumps(known))
    save_weights(
        decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=tmp_path, stop_id=7
    )
    assert json.loads(file.read_text()) == (known or {}) | {"eos_token_id": expected}


def test_adapters_are_merged_into_the_exported_weights(tmp_path: Path) -> None:
    """W + (alpha / rank) B A = W + 2 B A."""
    decoder = trained_lora_decoder()
    v_proj = decoder.layers[0].attn.v_proj
    expected = v_proj.weight + 2 * v_proj.lora_b.weight @ v_proj.lora_a.weight
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    torch.testing.assert_close(tensors["model.layers.0.self_attn.v_proj.weight"], expected.detach())


def test_merging_leaves_the_decoder_as_it_is(tmp_path: Path) -> None:
    """An export in mid-run must not merge the adapters into what is trained on."""
    decoder = trained_lora_decoder()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    assert same_state(before, dict(decoder.state_dict()))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_adapters_are_saved_beside_the_merged_weights(adapter_only: bool, tmp_path: Path) -> None:
    decoder = trained_lora_decoder()
    checkpointer = scratch(decoder, folder=tmp_path)
    save_weights(
        decoder,
        checkpointer,
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
        adapter_only=adapter_only,
    )
    adapters = load_file(tmp_path / "epoch_1" / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == len(get_adapter_params(decoder))
    name = "layers.0.attn.v_proj.lora_b.weight"
    theirs = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    assert torch.equal(adapters[theirs], decoder.get_parameter(name))
    assert (tmp_path / "epoch_1" / "model.safetensors").exists() != adapter_only


def test_without_a_component_weights_start_from_the_seed() -> None:
    checkpointer = open_checkpointer(
        None, meta_decoder(), tiny_tokenizer(), seed=0, output_dir="out"
    )
    assert isinstance(checkpointer, ScratchCheckpointer)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    component = {"_component_": "torchtune.training.FullModelHFCheckpointer"}
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no config.json.*tune download"):
        open_checkpointer(
            component | {"checkpoint_dir": str(tmp_path)},
            meta_decoder(),
            tiny_tokenizer(),
            seed=0,
            output_dir="out",
        )


# Training state


def new_run(decoder: TransformerDecoder | None = None) -> tuple[Any, torch.optim.Optimizer]:
    decoder = loaded(decoder or meta_decoder())
    trained = [p for p in decoder.parameters() if p.requires_grad]
    return decoder, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def train(decoder: TransformerDecoder, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on tokens from the global random generator."""
    for _ in range(steps):
        logits = decoder(torch.randint(512, (2, 5)))
        (logits.square().mean() - logits.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(folder: Path, step: int, run: tuple[Any, torch.optim.Optimizer], **options: Any) -> None:
    save_training_state(folder, step, *run, {"data": {"seed": 5}}, CPU, **options)


@pytest.mark.parametrize("decoder", [meta_decoder, meta_lora_decoder], ids=["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_one(decoder: Any, tmp_path: Path) -> None:
    """2 steps, saved, 3 more; against a fresh start that loads and runs the 3: weights and AdamW's
    state are equal bit for bit. The batches come from the random state, so it is restored too.
    """
    torch.manual_seed(0)
    uninterrupted = new_run(decoder())
    train(*uninterrupted, 2)
    save(tmp_path, 2, uninterrupted)
    train(*uninterrupted, 3)

    torch.manual_seed(99)
    resumed = new_run(decoder())
    load_training_state(tmp_path / "step_000002", *resumed, CPU)
    train(*resumed, 3)
    for first, second in zip(uninterrupted, resumed, strict=True):
        assert same_state(dict(first.state_dict()), dict(second.state_dict()))


def test_saving_changes_nothing_in_the_run_that_goes_on(tmp_path: Path) -> None:
    """5 steps, with and without a save after the second."""
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        run = new_run()
        train(*run, 2)
        if saves:
            save(tmp_path, 2, run)
        train(*run, 3)
        runs.append(dict(run[0].state_dict()))
    assert same_state(*runs)


def test_state_comes_back_with_its_step(tmp_path: Path) -> None:
    run = new_run()
    save(tmp_path, 7, run)
    state = load_training_state(tmp_path / "step_000007", *run, CPU)
    assert state == {"step": 7, "data": {"seed": 5}}


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Resumed with another model: a ValueError, which recipes show without a traceback."""
    save(tmp_path, 1, new_run())
    other = new_run(meta_decoder(intermediate_dim=40))
    with pytest.raises(ValueError, match="w1"):
        load_training_state(tmp_path / "step_000001", *other, CPU)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run = new_run()
    for step in (1, 2, 3, 10):
        save(tmp_path, step, run, keep_last_n=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000010"]


def test_without_a_limit_all_checkpoints_are_kept(tmp_path: Path) -> None:
    run = new_run()
    for step in (1, 2, 3):
        save(tmp_path, step, run)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_00000{i}" for i in (1, 2, 3)]


def whole(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text("{}")
    return folder


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    """A save that was killed leaves another name, or no state file."""
    complete = whole(tmp_path / "step_000010")
    whole(tmp_path / "step_000020.partial")
    (tmp_path / "step_000030").mkdir()
    assert checkpoints(tmp_path) == [complete]


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    """Also where the step outgrows its six digits."""
    names = ["step_000009", "step_000010", "step_999999", "step_1000000"]
    for name in reversed(names):
        whole(tmp_path / name)
    assert [path.name for path in checkpoints(tmp_path)] == names


def test_no_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []


def test_a_save_that_fails_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """Step 2's save ends before it is complete, with one checkpoint to keep."""
    run = new_run()
    save(tmp_path, 1, run, keep_last_n=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_training_state(tmp_path, 2, *run, {"data": object()}, CPU, keep_last_n=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000001"]


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes show those without a traceback; torch wraps them into a BaseException."""

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    run = new_run()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, run)


def test_a_save_goes_over_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / "step_000002.partial").mkdir(parents=True)
    (tmp_path / "step_000002.partial" / "rest").write_text("")
    save(tmp_path, 2, new_run())
    assert not (tmp_path / "step_000002" / "rest").exists()


def test_frozen_weights_are_not_in_the_training_state(tmp_path: Path) -> None:
    """LoRA's base weights come from their checkpoint again: 2 adapters of 2 matrices are saved."""
    save(tmp_path, 1, new_run(meta_lora_decoder()))
    keys = dcp.FileSystemReader(tmp_path / "step_000001").read_metadata().state_dict_metadata
    assert len([key for key in keys if key.startswith("model.")]) == 4


# Resuming


def with_schedule(lr: float) -> tuple[Any, torch.optim.Optimizer, Any]:
    """A run whose learning rate is lr / (1 + step)."""
    decoder, optimizer = new_run()
    for group in optimizer.param_groups:
        group["lr"] = lr
    return decoder, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))


def test_a_resumed_run_takes_the_configs_learning_rate_at_its_step(tmp_path: Path) -> None:
    """Saved at step 3 of a run with 0.01; resumed with 0.08: 0.08 / 4 now, 0.08 / 5 after a step.
    The moments are the checkpoint's.
    """
    decoder, optimizer, _ = with_schedule(0.01)
    train(decoder, optimizer, 3)
    save(tmp_path, 3, (decoder, optimizer))
    again, other, schedule = with_schedule(0.08)
    found = resume_training(tmp_path, again, other, schedule, {"seed": 5}, CPU)
    assert found == (tmp_path / "step_000003", 3)
    assert other.param_groups[0]["lr"] == 0.02
    assert same_state(other.state_dict()["state"], optimizer.state_dict()["state"])
    other.step()
    schedule.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.016)


def test_a_resumed_run_takes_the_configs_optimizer_settings(tmp_path: Path) -> None:
    """weight_decay 0.1 when it was saved, 0.3 in the config that goes on."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    decoder, optimizer, schedule = with_schedule(0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.3
    resume_training(tmp_path, decoder, optimizer, schedule, {"seed": 5}, CPU)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    run = with_schedule(0.01)
    before = {name: tensor.clone() for name, tensor in run[0].state_dict().items()}
    assert resume_training(tmp_path / "none", *run, {"seed": 5}, CPU) is None
    assert same_state(before, dict(run[0].state_dict()))


def test_another_order_of_the_data_is_refused(tmp_path: Path) -> None:
    """Batches would be repeated and left out."""
    save(tmp_path, 3, with_schedule(0.01)[:2])
    with pytest.raises(ValueError, match=r"was written with {'seed': 5}, this run has {'seed': 6}"):
        resume_training(tmp_path, *with_schedule(0.01), {"seed": 6}, CPU)


# Attribute models: LoRA, and the best weights


def attribute_decoder(*, lora: bool = False) -> TransformerDecoder:
    """On the meta device; under LoRA the adapters and the head are trained."""
    with torch.device("meta"):
        decoder = lora_llama3(**LORA, **TINY) if lora else llama3(**TINY)
        add_reward_head(decoder, 2)
    if lora:
        set_trainable_params(decoder, get_adapter_params(decoder))
        decoder.output.requires_grad_()
    return decoder


def attribute_model(folder: Path, *, lora: bool = False, seed: int = 0) -> tuple[Any, Any]:
    decoder = attribute_decoder(lora=lora)
    checkpointer = open_reward_checkpointer(
        None,
        decoder,
        tiny_tokenizer(),
        extra_id_template(),
        AttributeSchema(("humor", "verbosity")),
        seed=seed,
        output_dir=str(folder),
        load_head=False,
    )
    load_weights(decoder, checkpointer, CPU, seed=seed, fresh_head=lora)
    return decoder, checkpointer


def changed(decoder: TransformerDecoder) -> dict[str, Tensor]:
    """All trained parameters are made something else; the state of the decoder after it."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


def test_lora_trains_the_head_and_the_adapters(tmp_path: Path) -> None:
    """The head is fresh: with a frozen one the scores would be random directions."""
    decoder, _ = attribute_model(tmp_path, lora=True)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    trained = [p for p in decoder.parameters() if p.requires_grad]
    train(decoder, torch.optim.AdamW(trained, lr=1e-2), 2)
    moved = {name for name, t in decoder.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {*get_adapter_params(decoder), "output.weight"}


def exported_adapter(folder: Path, **options: Any) -> tuple[TransformerDecoder, dict[str, Tensor]]:
    decoder, checkpointer = attribute_model(folder, lora=True)
    changed(decoder)
    save_weights(
        decoder, checkpointer, CPU, epoch=1, dtype=torch.float32, output_dir=folder, **options
    )
    return decoder, load_file(folder / "epoch_1" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_adapter_of_an_attribute_model_has_its_head(adapter_only: bool, tmp_path: Path) -> None:
    """Under the name that PEFT gives a module which is saved whole, beside q's and v's A and B."""
    decoder, tensors = exported_adapter(tmp_path, adapter_only=adapter_only)
    head = tensors.pop("base_model.model.score.weight")
    assert torch.equal(head, decoder.output.weight)
    assert len(tensors) == 4
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)


def test_the_adapters_config_names_the_head(tmp_path: Path) -> None:
    exported_adapter(tmp_path)
    file = tmp_path / "epoch_1" / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_the_adapter_of_a_language_model_names_no_head(tmp_path: Path) -> None:
    decoder = trained_lora_decoder()
    save_weights(
        decoder,
        scratch(decoder, folder=tmp_path),
        CPU,
        epoch=1,
        dtype=torch.float32,
        output_dir=tmp_path,
    )
    file = tmp_path / "epoch_1" / "adapter" / "adapter_config.json"
    assert "modules_to_save" not in json.loads(file.read_text())


def test_the_merged_attribute_model_has_the_trained_head(tmp_path: Path) -> None:
    decoder, _ = exported_adapter(tmp_path)
    tensors = load_file(tmp_path / "epoch_1" / "model.safetensors")
    assert torch.equal(tensors["score.weight"], decoder.output.weight)
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_best_weights_come_back(lora: bool, tmp_path: Path) -> None:
    """Saved, trained on, loaded: bit for bit, head and frozen weights included."""
    decoder, _ = attribute_model(tmp_path, lora=lora)
    best = changed(decoder)
    save_best_weights(tmp_path, 4, decoder, {"val_loss": 0.5}, CPU)
    changed(decoder)
    load_best_weights(tmp_path, decoder, CPU)
    assert same_state(dict(decoder.state_dict()), best)


def test_the_best_weights_of_another_process_come_back(tmp_path: Path) -> None:
    """A run that was resumed after its best step: base weights from their checkpoint, the rest
    from the file.
    """
    decoder, _ = attribute_model(tmp_path, lora=True)
    best = changed(decoder)
    save_best_weights(tmp_path, 4, decoder, {}, CPU)
    again, _ = attribute_model(tmp_path, lora=True)
    load_best_weights(tmp_path, again, CPU)
    assert same_state(dict(again.state_dict()), best)


def test_frozen_weights_are_not_among_the_best(tmp_path: Path) -> None:
    """2 adapters of 2 matrices, and the head."""
    decoder, _ = attribute_model(tmp_path, lora=True)
    save_best_weights(tmp_path, 4, decoder, {}, CPU)
    keys = dcp.FileSystemReader(tmp_path / BEST).read_metadata().state_dict_metadata
    assert {key.removeprefix("model.") for key in keys} == {
        *get_adapter_params(decoder),
        "output.weight",
    }


def test_better_weights_replace_the_best(tmp_path: Path) -> None:
    decoder, _ = attribute_model(tmp_path)
    save_best_weights(tmp_path, 4, decoder, {"val_loss": 0.5}, CPU)
    better = changed(decoder)
    save_best_weights(tmp_path, 6, decoder, {"val_loss": 0.25}, CPU)
    changed(decoder)
    load_best_weights(tmp_path, decoder, CPU)
    assert same_state(dict(decoder.state_dict()), better)
    assert best_state(tmp_path) == {"step": 6, "val_loss": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_without_best_weights_there_is_no_state(tmp_path: Path) -> None:
    assert best_state(tmp_path) is None
    (tmp_path / "best.partial").mkdir()
    (tmp_path / "best.partial" / STATE_FILE).write_text("{}")
    assert best_state(tmp_path) is None


def test_the_best_weights_are_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Nor are they counted, or removed, when old checkpoints are."""
    decoder, _ = attribute_model(tmp_path)
    save_best_weights(tmp_path, 4, decoder, {}, CPU)
    optimizer = torch.optim.AdamW(decoder.parameters())
    for step in (5, 6):
        save(tmp_path, step, (decoder, optimizer), keep_last_n=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "step_000006"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000006"]


def test_a_failed_save_leaves_the_earlier_best(tmp_path: Path) -> None:
    decoder, _ = attribute_model(tmp_path)
    save_best_weights(tmp_path, 4, decoder, {"val_loss": 0.5}, CPU)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_best_weights(tmp_path, 6, decoder, {"val_loss": object()}, CPU)
    assert best_state(tmp_path) == {"step": 4, "val_loss": 0.5}


def test_saving_the_best_weights_leaves_the_random_state(tmp_path: Path) -> None:
    """A run that validates more often trains on the same batches."""
    decoder, _ = attribute_model(tmp_path)
    before = torch.get_rng_state()
    save_best_weights(tmp_path, 4, decoder, {}, CPU)
    assert torch.equal(torch.get_rng_state(), before)
