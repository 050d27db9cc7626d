"""The fine-tuning recipe through `tune run`: its loss, ranks, kill and resume, what is learned.

The conversations have 2, 4 or 6 turns; some answers have no label. With 7 of 23 in a step, the
last of the 4 steps of an epoch has 2: of 4 ranks, 2 have nothing to do.

Dimension letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules import TransformerDecoder
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from steerlm2.checkpoints.checkpointer import HFCheckpointer, ScratchCheckpointer
from steerlm2.data.conversations import Conversation, conversation_to_json, iter_conversations
from steerlm2.data.jsonl import json_line
from steerlm2.data.records import Turn
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import encode_prompt, encode_response, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.training.batches import batch_of_step

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess

Train = Callable[..., "RunFolder"]
Rows = dict[int, dict[str, float]]

NUM_CONVERSATIONS = 23
GLOBAL_BATCH_SIZE = 7
STEPS = 10
EPOCH = ("max_steps=4", "save_every_n_steps=null", "generation.max_new_tokens=3")
SEED = 42
MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "intermediate_dim": 384,
    "max_seq_len": 2048,
    "rope_base": 10000,
    "norm_eps": 1e-5,
}
"""tiny/acsft's."""
LORA = (
    "model=torchtune.models.llama3.lora_llama3",
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=4",
    "model.lora_alpha=8",
)
TEMPLATE = extra_id_template()
TOKENIZER = tiny_tokenizer()
STOP = encode_response(TEMPLATE, TOKENIZER, "-")[-1]

USERS_METRICS = '''
import json, os

def lengths(prompts, labels, responses, *, log):
    """A line for each call; the mean number of characters."""
    with open(log, "a") as file:
        row = {"rank": os.environ.get("RANK", "0"), "arguments": [prompts, labels, responses]}
        file.write(json.dumps(row) + "\\n")
    return {"length": sum(map(len, responses)) / len(responses)}
'''


def conversation_file(path: Path, num_conversations: int, seed: int) -> Path:
    """1 to 3 questions with answers; every fourth answer lacks its label."""
    rng = random.Random(seed)
    records = iter(synthetic_records(3 * num_conversations, 2, seed))
    lines = []
    for number in range(num_conversations):
        turns = []
        for _ in range(number % 3 + 1):
            record = next(records)
            label = record.label if rng.random() < 0.75 else None
            turns += [*record.prompt_turns, Turn("Assistant", record.responses[0].value, label)]
        lines.append(json_line(conversation_to_json(Conversation(turns, record.system))))
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Conversations for training and for validation."""
    folder = tmp_path_factory.mktemp("data")
    return (
        conversation_file(folder / "train.jsonl", NUM_CONVERSATIONS, seed=1),
        conversation_file(folder / "val.jsonl", 6, seed=2),
    )


@pytest.fixture(scope="module")
def train(
    tune: TuneProcess,
    files: tuple[Path, Path],
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """`train(*overrides, nproc=None, output_dir=<a new folder>)` runs the recipe to its end."""
    (tune.cwd / "users_metrics.py").write_text(USERS_METRICS)

    def run(*overrides: str, nproc: int | None = None, output_dir: Path | None = None) -> RunFolder:
        folder = output_dir or tmp_path_factory.mktemp("run")
        result = tune(*command_line(files, folder, *overrides), nproc=nproc)
        return run_folder(folder, result.stdout)

    return run


def command_line(files: tuple[Path, Path], output_dir: Path, *overrides: str) -> list[str]:
    metric = f"{{_component_: users_metrics.lengths, log: {output_dir}/calls.jsonl}}"
    arguments = ["sft_distributed", "--config", "tiny/acsft", f"output_dir={output_dir}"]
    for key, file in zip(("dataset", "dataset_val"), files, strict=True):
        arguments += [f"{key}=steerlm2.datasets.dialogue_dataset", f"{key}.source={file}"]
        arguments += [f"~{key}.{n}" for n in ("num_records", "responses_per_prompt", "split")]
    return [
        *arguments,
        f"global_batch_size={GLOBAL_BATCH_SIZE}",
        "max_tokens_per_microbatch=300",
        f"max_steps={STEPS}",
        "lr=1e-3",
        "lr_scheduler.warmup_steps=3",
        "val_every_n_steps=4",
        "save_every_n_steps=5",
        "generation.from_dataset_val=3",
        "generation.max_new_tokens=6",
        "generation.temperature=0",
        f"generation.metrics=[{metric}]",
        *overrides,
    ]


@pytest.fixture(scope="module")
def reference(train: Train) -> RunFolder:
    return train()


def rows(run: RunFolder, key: str) -> Rows:
    """The rows of metrics.jsonl that have the key, by their step."""
    return {row["step"]: row for row in run.entries() if key in row}


def worst(run: RunFolder, reference: RunFolder) -> float:
    """The largest relative difference of any metric, in training and validation."""
    got, expected = run.entries(), reference.entries()
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    differences = [
        abs(a[key] - b[key]) / max(abs(b[key]), 1e-2)
        for a, b in zip(got, expected, strict=True)
        for key in b
    ]
    return torch.tensor(differences).max().item()  # NaN, if there is one


def worst_tensor(run: RunFolder, reference: RunFolder) -> float:
    """The largest ||difference|| / ||expected|| of any exported tensor."""
    got, expected = run.weights(), reference.weights()
    assert got.keys() == expected.keys()
    differences = [(got[name] - expected[name]).norm() / expected[name].norm() for name in expected]
    return torch.stack(differences).max().item()


# The loss, against plain float64


def loss_of_answers(decoder: torch.nn.Module, conversations: list[Conversation]) -> float:
    """-log P(answer | everything before it) of every answer by itself, over all their tokens."""
    nats, count = 0.0, 0
    for conversation in conversations:
        for i, turn in enumerate(conversation.turns):
            if turn.role == "Assistant":
                before = conversation.turns[:i]
                prompt = encode_prompt(TEMPLATE, TOKENIZER, conversation.system, before, turn.label)
                answer = encode_response(TEMPLATE, TOKENIZER, turn.value)
                logits_TV = decoder(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
                logps_TV = logits_TV.log_softmax(dim=1)
                nats -= logps_TV[range(len(answer)), answer].sum().item()
                count += len(answer)
    return nats / count


def decoder_with(weights: dict[str, torch.Tensor]) -> TransformerDecoder:
    decoder = llama3(**MODEL).double().eval()
    decoder.load_state_dict(weights)
    return decoder


def exported_decoder(run: RunFolder) -> TransformerDecoder:
    (folder,) = run.path.glob("epoch_*")
    return decoder_with(HFCheckpointer(str(folder)).load_checkpoint()["model"])


@torch.no_grad()
def test_first_loss_is_the_mean_over_all_answers_tokens(
    reference: RunFolder, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Sum of -log P over the 7 conversations' answers and stop tokens / how many these are; the
    validation before it likewise. fp32 against float64: 1e-6."""
    fresh = ScratchCheckpointer(
        llama3(**MODEL), TOKENIZER, seed=SEED, output_dir=str(tmp_path)
    ).weights
    decoder = decoder_with(fresh)
    conversations, validation = (list(iter_conversations(file)) for file in files)
    batch = batch_of_step(0, NUM_CONVERSATIONS, GLOBAL_BATCH_SIZE, SEED)
    expected = loss_of_answers(decoder, [conversations[i] for i in batch])
    assert rows(reference, "loss")[1]["loss"] == pytest.approx(expected, rel=1e-6)
    expected = loss_of_answers(decoder, validation)
    assert rows(reference, "val_loss")[0]["val_loss"] == pytest.approx(expected, rel=1e-6)


class TransformersLogits(torch.nn.Module):
    """A folder's model in transformers, called as a decoder is."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
STYLES: dict[str, dict[str, Any]] = {
    "llama2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama3": {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "llama3_1": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": SCALING},
    "llama3_2": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": SCALING | {"factor": 32.0},
    },
}


def checkpoint_of_transformers(folder: Path, style: str, version: int) -> None:
    """A folder that transformers wrote, with the rotary positions as that version spells them."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    layers = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    given = copy.deepcopy(sizes | layers | {"initializer_range": 0.2} | STYLES[style])
    LlamaForCausalLM(LlamaConfig(**given)).save_pretrained(folder)
    TOKENIZER.save(str(folder))
    if version == 4:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("style", "version"),
    [
        *(("llama2", 4), ("llama3", 5)),
        *(("llama3_1", 4), ("llama3_1", 5), ("llama3_2", 4), ("llama3_2", 5)),
    ],
)
@torch.no_grad()
def test_a_checkpoints_losses_are_transformers_before_and_after(
    train: Train, files: tuple[Path, Path], tmp_path: Path, style: str, version: int
) -> None:
    """Its validation loss, and that of the export after 2 steps; the run's config says no number
    of the model."""
    checkpoint_of_transformers(tmp_path, style, version)
    run = train(
        *("model=steerlm2.models.from_checkpoint", *(f"~model.{key}" for key in MODEL)),
        "checkpointer._component_=steerlm2.checkpoints.HFCheckpointer",
        f"checkpointer.checkpoint_dir={tmp_path}",
        *("max_steps=2", "val_every_n_steps=2", "save_every_n_steps=null", "generation=null"),
        "lr_scheduler.warmup_steps=0",
    )
    losses = [row["val_loss"] for row in rows(run, "val_loss").values()]
    assert losses[1] < losses[0] - 0.01
    validation = list(iter_conversations(files[1]))
    for loss, folder in zip(losses, (tmp_path, *run.path.glob("epoch_*")), strict=True):
        expected = loss_of_answers(TransformersLogits(folder), validation)
        assert loss == pytest.approx(expected, abs=1e-4)


# The reference run by itself


def test_loss_falls(reference: RunFolder) -> None:
    losses = [row["loss"] for row in rows(reference, "loss").values()]
    assert losses[-1] < 0.9 * losses[0]


def test_stdout_says_what_the_data_is(reference: RunFolder, files: tuple[Path, Path]) -> None:
    answers = [turn for c in iter_conversations(files[0]) for turn in c.turns[1::2]]
    labelled = sum(turn.label is not None for turn in answers)
    assert 0 < labelled < len(answers)
    expected = f"{NUM_CONVERSATIONS} conversations of {len(answers)} answers, {labelled} under"
    assert expected in reference.stdout


def test_users_metric_function_is_logged(reference: RunFolder, files: tuple[Path, Path]) -> None:
    """From the working directory; it gets the prompts, labels and responses of samples.jsonl: the
    config's prompt with its label, and 3 validation conversations with their own."""
    validation = list(iter_conversations(files[1]))[:3]
    prompts = ["What is the capital of France?"]
    prompts += ["\n".join(turn.value for turn in c.turns[:-1]) for c in validation]
    labels = ["humor:2,verbosity:1", *(c.turns[-1].label for c in validation)]
    calls = [row["arguments"] for row in reference.entries("calls.jsonl")]
    logged = rows(reference, "val_length")
    assert len(calls) == len(logged) == 4  # before the first step, after 4, 8 and 10
    samples = reference.entries("samples.jsonl")
    for (step, row), call in zip(logged.items(), calls, strict=True):
        responses = [sample["response"] for sample in samples if sample["step"] == step]
        assert call == [prompts, labels, responses]
        assert row["val_length"] == sum(map(len, responses)) / 4


def test_stdout_says_which_step_was_exported(reference: RunFolder) -> None:
    losses = {step: row["val_loss"] for step, row in rows(reference, "val_loss").items() if step}
    best = min(losses, key=lambda step: losses[step])
    assert reference.stdout.rstrip().endswith(f"(of step {best})")


# The layout changes nothing but the order of sums

FEW_LENGTHS = ("max_tokens_per_microbatch=2000",)
"""A micro-batch a step. Under tensor parallel each new length costs a second on every rank."""
LAYOUTS = {
    "fsdp4": ((), 4),
    "tp2_fsdp2": (
        ("tensor_parallel_dim=2", "enable_activation_checkpointing=true", *FEW_LENGTHS),
        4,
    ),
    "one_conversation_a_row": (("max_tokens_per_microbatch=1",), None),
}


@pytest.fixture(scope="module")
def epoch(train: Train) -> RunFolder:
    return train(*EPOCH)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_share_one_trajectory(train: Train, epoch: RunFolder, name: str) -> None:
    """All metrics of 4 steps to 1e-4, the exported weights to 1e-3, the samples exactly; the
    user's metric function is called on one rank."""
    overrides, nproc = LAYOUTS[name]
    run = train(*EPOCH, *overrides, nproc=nproc)
    assert worst(run, epoch) < 1e-4
    assert worst_tensor(run, epoch) < 1e-3
    assert run.entries("samples.jsonl") == epoch.entries("samples.jsonl")
    assert run.entries("calls.jsonl") == epoch.entries("calls.jsonl")


def test_lora_trains_the_adapters_alone(train: Train) -> None:
    """Two ranks with tensor parallel give what one gives; other matrices stay as they started."""
    short = (*LORA, "max_steps=2", "save_every_n_steps=null", "generation=null")
    one = train(*short)
    two = train(*short, "tensor_parallel_dim=2", nproc=2)
    assert worst(two, one) < 1e-4
    assert worst_tensor(two, one) < 1e-3
    (folder,) = one.path.glob("epoch_*")
    adapters = {"lora_rank": 4, "lora_alpha": 8, "apply_lora_to_mlp": True}
    decoder = lora_llama3(["q_proj", "v_proj", "output_proj"], **adapters, **MODEL)
    start = ScratchCheckpointer(decoder, TOKENIZER, seed=SEED, output_dir="").weights
    fresh = {name: weight for name, weight in start.items() if "lora_" not in name}
    merged = HFCheckpointer(str(folder)).load_checkpoint()["model"]
    changed = {name for name in fresh if not merged[name].equal(fresh[name])}
    adapted = ("q_proj", "v_proj", "attn.output_proj", "mlp.")
    assert changed == {name for name in fresh if any(part in name for part in adapted)}


# Which weights are exported


@pytest.mark.parametrize("export", ["best", "last"])
@torch.no_grad()
def test_exported_weights_are_those_of_the_best_or_the_last_step(
    train: Train, files: tuple[Path, Path], export: str
) -> None:
    """With a learning rate that rises too far, the last step isn't the best."""
    run = train(
        *("lr=0.05", "lr_scheduler.warmup_steps=12", "val_every_n_steps=2", "max_steps=8"),
        *("save_every_n_steps=null", "generation=null", f"export={export}"),
    )
    losses = {step: row["val_loss"] for step, row in rows(run, "val_loss").items() if step}
    assert losses[8] > 1.01 * min(losses.values())
    expected = min(losses.values()) if export == "best" else losses[8]
    validation = list(iter_conversations(files[1]))
    assert loss_of_answers(exported_decoder(run), validation) == pytest.approx(expected, rel=1e-5)


# Kill and resume


def test_killed_run_resumes_bit_for_bit(
    tune: TuneProcess,
    train: Train,
    files: tuple[Path, Path],
    reference: RunFolder,
    run_folder: type[RunFolder],
    tmp_path: Path,
) -> None:
    """SIGKILL after step 8 and its validation, past the checkpoint of step 5 and the best weights
    of step 4."""
    run = run_folder(tmp_path / "run")
    process = tune.start(*command_line(files, run.path))
    while process.poll() is None and 9 not in steps_so_far(run.path):
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    resumed = train("resume_from_checkpoint=true", output_dir=run.path)
    assert "resumed from" in resumed.stdout
    assert resumed.entries() == reference.entries()
    assert resumed.entries("samples.jsonl") == reference.entries("samples.jsonl")
    ours, theirs = resumed.weights(), reference.weights()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def steps_so_far(folder: Path) -> set[int]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return set()
    return {json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]}


# What is learned


@pytest.fixture(scope="module")
def trained(
    tune_command: TuneProcess, run_folder: type[RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """tiny/sft's first 80 of 400 steps; at the end, greedy answers to 6 validation questions."""
    output_dir = tmp_path_factory.mktemp("trained")
    result = tune_command(
        *("sft_distributed", "--config", "tiny/sft", f"output_dir={output_dir}"),
        *("max_steps=80", "val_every_n_steps=80", "save_every_n_steps=null"),
        *("generation.temperature=0", "generation.from_dataset_val=6"),
        *("dataset_val.num_records=6", "dataset_val.responses_per_prompt=2"),
    )
    return run_folder(output_dir, result.stdout)


@torch.no_grad()
def test_stop_token_is_learned(trained: RunFolder) -> None:
    """After an answer's line break its probability is above 0.9; nowhere before that, not after a
    sentence either, is it likelier than all others together."""
    decoder = exported_decoder(trained)
    at_end, before = [], []
    for record in synthetic_records(6, 2, seed=0, split="validation"):
        prompt = encode_prompt(TEMPLATE, TOKENIZER, record.system, record.prompt_turns, None)
        answer = encode_response(TEMPLATE, TOKENIZER, record.responses[0].value)
        logits_TV = decoder(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
        *others, last = logits_TV.softmax(dim=1)[:, STOP].tolist()
        at_end.append(last)
        before += others
    assert min(at_end) > 0.9
    assert max(before) < 0.5


@torch.no_grad()
def test_transformers_answers_as_the_validation_did(trained: RunFolder) -> None:
    """Greedily, with the exported folder's model and tokenizer: the same texts, ended by the stop
    token and not by the limit, as the folder's generation_config.json says."""
    (folder,) = trained.path.glob("epoch_*")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [row for row in trained.entries("samples.jsonl") if row["step"] == 80][1:]
    assert len(samples) == 6
    records = synthetic_records(6, 2, seed=0, split="validation")
    questions = [record for record in records for _ in record.responses][:6]
    for record, sample in zip(questions, samples, strict=True):
        assert sample["prompt"] == record.prompt_turns[0].value
        prompt = encode_prompt(TEMPLATE, TOKENIZER, record.system, record.prompt_turns, None)
        (ids,) = model.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)
        answer = ids[len(prompt) :].tolist()
        assert answer[-1] == STOP
        assert tokenizer.decode(answer[:-1]) == sample["response"] + "\n"


# Users' mistakes


def fails(tune: TuneProcess, *arguments: str) -> str:
    """What the command prints to stderr; one message, without a traceback."""
    result: subprocess.CompletedProcess[str] = tune(*arguments, check=False)
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    return result.stderr


def test_wrong_keys_are_all_named(
    tune: TuneProcess, files: tuple[Path, Path], tmp_path: Path
) -> None:
    message = fails(
        tune,
        *command_line(
            files,
            tmp_path / "out",
            "generation.metrics=[{_component_: users_metrics.nothing}]",
            "generation.max_tokens=3",
            "dataset.use_label=true",
            "export=first",
        ),
    )
    assert "cannot import users_metrics.nothing" in message
    assert "'generation.max_tokens'" in message
    assert "'dataset.use_label'" in message
    assert "'export' must be one of best, last" in message


DATA_BY_RANK = """
import os
from steerlm2.datasets import dialogue_dataset

def data_by_rank(tokenizer, *, source, of_rank_1, **options):
    own = of_rank_1 if os.environ["RANK"] == "1" else source
    return dialogue_dataset(tokenizer, source=own, **options)
"""


def test_nodes_with_other_files_are_refused(
    tune: TuneProcess, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same conversations in another order, so that every step would be of other ones."""
    (tune.cwd / "users_data.py").write_text(DATA_BY_RANK)
    lines = files[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_bytes(b"".join(lines[::-1]))
    changes = ("dataset=users_data.data_by_rank", f"dataset.of_rank_1={tmp_path}/reversed.jsonl")
    arguments = command_line(files, tmp_path / "out", *changes, "generation=null")
    result = tune(*arguments, nproc=2, check=False)
    assert result.returncode == 1
    assert "the data are not the same on all nodes: `dataset`" in result.stderr
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_keys_that_contradict_each_other_are_all_named(
    tune: TuneProcess, files: tuple[Path, Path], tmp_path: Path
) -> None:
    message = fails(
        tune,
        *command_line(
            files,
            tmp_path / "out",
            "val_every_n_steps=null",
            "max_steps=null",
            "dataset.template=null",
            "generation.prompts=[]",
            "generation.from_dataset_val=0",
            "generation.label=humor",
            "generation.top_p=0",
            "global_batch_size=0",
        ),
    )
    assert "'generation' needs 'val_every_n_steps'" in message
    assert "set 'epochs' or 'max_steps'" in message
    assert "'dataset.template' is taken from 'template': set that" in message
    assert "'generation' needs 'prompts' or 'from_dataset_val'" in message
    assert "'generation.label'" in message
    assert "'generation.top_p' must be above 0" in message
    assert "'global_batch_size' must be at least 1, got 0" in message
