"""The training recipe through `tune run`: one process, many ranks, micro-batches, kill and resume.

Runs of one process stand against all others. Their 21 groups, or the first 6 of them, have 2 to 6
responses of 1 word up to the length limit; with 5 groups a step, the last step of an epoch has a
single group, so that three of four data-parallel ranks run empty rows there.

Dimension letters: B, A are the two LoRA matrices.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchtune.models.llama3 import llama3

from steerlm2.checkpoints.checkpointer import ScratchCheckpointer
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.runs.lock import LOCK_FILE
from steerlm2.runs.logs import LOG_FOLDER
from steerlm2.training.batches import batch_of_step
from steerlm2.training.schedules import warmup_cosine_hold

if TYPE_CHECKING:
    from tests.recipes.conftest import RunFolder, TuneProcess, WriteGroups

pytestmark = pytest.mark.slow

Train = Callable[..., "RunFolder"]
Steps = dict[int, dict[str, float]]

GROUP_SIZES = [2, 6, 3, 5, 4, 2, 6] * 3
GLOBAL_BATCH_SIZE = 5
STEPS = 20
MAX_SEQ_LEN = 72
MODEL = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "intermediate_dim": 384,
    "max_seq_len": 2048,
    "rope_base": 10000,
}
"""tiny/steerlm2's, but without grouped-query attention: 4 ranks can then split its heads."""
SEED = 42

TRAIN = ("loss", "distance", "grad_norm")
VALIDATION = ("val_loss", "val_distance")
FEW_GROUPS = 6
SHORT = ("max_steps=2", "val_every_n_steps=null", "save_every_n_steps=null")
SHARED_BASELINE = (
    "loss.baseline=0.5",
    "loss.samples_per_prompt=8",
    "steerlm2.assume_samples_of_q=true",
)
VALIDATED = (*SHORT, "val_every_n_steps=2", *SHARED_BASELINE)
"""Of few groups: the second step is the one of a single group."""
LORA = (
    "model=torchtune.models.llama3.lora_llama3",
    "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=4",
    "model.lora_alpha=8",
    "lr=3e-3",
)
ADAPTERS = "adapter/adapter_model.safetensors"
ONE_LAYER = ("model.num_layers=1",)
TIED = ("model=torchtune.models.llama3_2.llama3_2",)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, write_groups: WriteGroups) -> list[str]:
    """The command line that all runs share."""
    data = write_groups(tmp_path_factory.mktemp("data") / "groups.jsonl", GROUP_SIZES)
    return [
        "--config",
        "tiny/steerlm2",
        "dataset=steerlm2.datasets.steerlm2_dataset",
        f"dataset.source={data}",
        f"dataset.max_seq_len={MAX_SEQ_LEN}",
        "~dataset.num_records",
        "~dataset.responses_per_prompt",
        "~dataset.split",
        "dataset_val.num_records=6",
        "dataset_val.responses_per_prompt=3",
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"global_batch_size={GLOBAL_BATCH_SIZE}",
        f"max_steps={STEPS}",
        "lr=1e-4",  # larger steps amplify any rounding, a thousandfold at 1e-3
        "lr_scheduler.warmup_steps=3",
        "lr_scheduler.constant_steps=0",
        "save_every_n_steps=7",
        "val_every_n_steps=10",
        "generation.max_new_tokens=3",
    ]


@pytest.fixture(scope="module")
def few_groups(tmp_path_factory: pytest.TempPathFactory, write_groups: WriteGroups) -> str:
    """The override that trains on the first groups."""
    folder = tmp_path_factory.mktemp("data")
    data = write_groups(folder / "few_groups.jsonl", GROUP_SIZES[:FEW_GROUPS])
    return f"dataset.source={data}"


@pytest.fixture(scope="module")
def train(
    tune: TuneProcess,
    arguments: list[str],
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """`train(*overrides, nproc=None, output_dir=<a new folder>)` runs the recipe to its end."""

    def run(*overrides: str, nproc: int | None = None, output_dir: Path | None = None) -> RunFolder:
        folder = output_dir or tmp_path_factory.mktemp("run")
        result = tune(
            "steerlm2_distributed", *arguments, *overrides, f"output_dir={folder}", nproc=nproc
        )
        return run_folder(folder, result.stdout)

    return run


@pytest.fixture(scope="module")
def disk_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk_log") / "log.txt"


@pytest.fixture(scope="module")
def reference(train: Train, disk_log: Path) -> RunFolder:
    return train(
        "metric_logger._component_=torchtune.training.metric_logging.DiskLogger",
        f"metric_logger.log_dir={disk_log.parent}",
        f"metric_logger.filename={disk_log.name}",
    )


@pytest.fixture(scope="module")
def validated_reference(train: Train, few_groups: str) -> RunFolder:
    return train(*VALIDATED, few_groups)


@pytest.fixture(scope="module")
def short_reference(train: Train, few_groups: str) -> RunFolder:
    return train(*SHORT, few_groups)


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """SIGKILL for the process and its children, once the condition holds."""
    while process.poll() is None and not condition():
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def steps(run: RunFolder, key: str) -> Steps:
    """The rows of metrics.jsonl that have the key, by their step."""
    if not (run.path / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row for row in run.entries() if key in row}


def worst_step(run: RunFolder, reference: RunFolder, key: str) -> float:
    """The largest difference of a metric in any step; both runs have the same steps.

    It is relative to the step's value or the run's mean, whichever is larger: the distance of a
    single group may be nearly 0, and its rounding error is that of log-probs of 100 nats all the
    same.
    """
    got, expected = steps(run, key), steps(reference, key)
    assert got.keys() == expected.keys()
    assert expected
    mean = sum(abs(row[key]) for row in expected.values()) / len(expected)
    differences = [
        abs(got[step][key] - row[key]) / max(abs(row[key]), mean) for step, row in expected.items()
    ]
    return torch.tensor(differences).max().item()  # NaN, if there is one


def worst_tensor(run: RunFolder, reference: RunFolder, file: str = "model.safetensors") -> float:
    """The largest ||difference|| / ||expected|| of any exported tensor."""
    got, expected = run.weights(file), reference.weights(file)
    assert got.keys() == expected.keys()
    differences = [(got[name] - expected[name]).norm() / expected[name].norm() for name in expected]
    return torch.stack(differences).max().item()


def start_weights() -> dict[str, Tensor]:
    """What a run without a checkpointer starts from, by torchtune's names."""
    with torch.device("meta"):
        decoder = llama3(**MODEL)
    return ScratchCheckpointer(decoder, tiny_tokenizer(), seed=SEED, output_dir="-").weights


# The reference run by itself


@pytest.mark.parametrize(
    ("groups", "sizes"), [(len(GROUP_SIZES), [5, 5, 5, 5, 1]), (FEW_GROUPS, [5, 1])]
)
def test_last_step_of_an_epoch_has_one_group_for_four_ranks(groups: int, sizes: list[int]) -> None:
    batches = [batch_of_step(i, groups, GLOBAL_BATCH_SIZE, SEED) for i in range(len(sizes))]
    assert [len(batch) for batch in batches] == sizes


def test_metrics_of_a_training_step(reference: RunFolder) -> None:
    first = json.loads((reference.path / "metrics.jsonl").read_text().splitlines()[1])
    assert first.keys() == {
        "step",
        "epoch",
        "loss",
        "distance",
        "ess_target",
        "ess_baseline",
        "share_one_hot_target",
        "mean_log_ratio",
        "mean_ratio",
        "log_mean_ratio",
        "lr",
        "grad_norm",
        "rank_imbalance",
        "tokens_per_second",
        "peak_memory_gib",
    }


def test_metrics_of_a_validation(reference: RunFolder) -> None:
    assert reference.entries()[0].keys() == {
        "step",
        "val_loss",
        "val_distance",
        "val_ess_target",
        "val_ess_baseline",
        "val_share_one_hot_target",
        "val_mean_log_ratio",
        "val_mean_ratio",
        "val_log_mean_ratio",
    }


def test_every_step_is_logged_and_every_tenth_validated(reference: RunFolder) -> None:
    assert list(steps(reference, "loss")) == list(range(1, STEPS + 1))
    assert list(steps(reference, "val_loss")) == [0, 10, 20]


def test_each_validation_samples_an_answer(reference: RunFolder) -> None:
    samples = reference.entries("samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 10, 20]
    assert {sample["prompt"] for sample in samples} == {"What is the capital of France?"}


def test_distance_falls(reference: RunFolder) -> None:
    """By more than half from the first epoch to the fourth: the same 21 groups in both."""
    distance = {step: row["distance"] for step, row in steps(reference, "distance").items()}
    first, fourth = (sum(distance[step] for step in range(start, start + 5)) for start in (1, 16))
    assert fourth < first / 2


def test_stdout_ends_with_the_table_and_where_the_files_are(reference: RunFolder) -> None:
    table, validation, files = reference.stdout.rstrip().split("\n\n")[-3:]
    assert [line.split()[0] for line in table.splitlines()[2:]] == [
        "distance",
        "loss",
        "ess_target",
        "ess_baseline",
        "share_one_hot_target",
        "mean_log_ratio",
        "mean_ratio",
        "log_mean_ratio",
        "grad_norm",
        "lr",
    ]
    heading, *metrics = validation.splitlines()
    assert heading == f"validation at step {STEPS}"
    assert [line.split()[0] for line in metrics[:2]] == ["loss", "distance"]
    assert [line.split(":")[0] for line in files.splitlines()] == ["plot", "metrics", "weights"]


def test_curves_are_a_png(reference: RunFolder) -> None:
    assert (reference.path / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_newest_checkpoint_is_kept(reference: RunFolder) -> None:
    """keep_last_n_checkpoints=1; they are written after steps 7, 14 and, as the last, 20."""
    assert os.listdir(reference.path / "checkpoints") == ["step_000020"]


def test_disk_logger_gets_every_row(reference: RunFolder, disk_log: Path) -> None:
    logged = [line for line in disk_log.read_text().splitlines() if line.startswith("Step ")]
    assert [int(line.split()[1]) for line in logged] == [row["step"] for row in reference.entries()]


# 1 process against 4 ranks: the layout changes nothing but the order of sums

LAYOUTS = {
    "fsdp4": (),
    "tp2_fsdp2": ("tensor_parallel_dim=2",),
    "hsdp2x2_checkpointing": (
        "data_parallel_replicate_dim=2",
        "enable_activation_checkpointing=true",
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def on_four_ranks(request: pytest.FixtureRequest, train: Train, few_groups: str) -> RunFolder:
    return train(*VALIDATED, few_groups, *LAYOUTS[request.param], nproc=4)


@pytest.mark.parametrize("key", TRAIN + VALIDATION)
def test_four_ranks_give_the_metrics_of_one_process(
    on_four_ranks: RunFolder, validated_reference: RunFolder, key: str
) -> None:
    """In each of 2 steps and 2 validations."""
    assert worst_step(on_four_ranks, validated_reference, key) < 1e-4


def test_four_ranks_give_the_weights_of_one_process(
    on_four_ranks: RunFolder, validated_reference: RunFolder
) -> None:
    assert worst_tensor(on_four_ranks, validated_reference) < 1e-3


def test_four_ranks_give_the_answers_of_one_process(
    on_four_ranks: RunFolder, validated_reference: RunFolder
) -> None:
    assert on_four_ranks.entries("samples.jsonl") == validated_reference.entries("samples.jsonl")


# The same for other models and other ways to compute

REPLICAS = ("data_parallel_replicate_dim=2",)
MANY_LENGTHS = ("steerlm2.max_tokens_per_microbatch=300",)
"""The second packed sequence then differs from the first in all of its sizes, and what is compiled
for it serves all others. It takes 10 seconds on each rank."""
FEW_A_ROW = ("steerlm2.strategy=two_pass", "steerlm2.micro_batch_size=2")
MODES = {
    "lora_tp2_fsdp2": ((*LORA, *ONE_LAYER, *SHARED_BASELINE), ("tensor_parallel_dim=2",), 4),
    "tied_tp2": ((*TIED, *ONE_LAYER, *SHARED_BASELINE), ("tensor_parallel_dim=2",), 2),
    "tp4": (SHARED_BASELINE, ("tensor_parallel_dim=4",), 4),
    "two_pass_fsdp4": (SHARED_BASELINE, FEW_A_ROW, 4),
    "compile_tp2": (
        (*ONE_LAYER, *SHARED_BASELINE),
        ("tensor_parallel_dim=2", "compile=true", *MANY_LENGTHS),
        2,
    ),
    "hsdp2x2_reduce_every_microbatch": ((), (*REPLICAS, *FEW_A_ROW), 4),
    "hsdp2x2_reduce_once": (
        (),
        (*REPLICAS, *FEW_A_ROW, "fsdp_reduce_every_microbatch=false"),
        4,
    ),
}


@pytest.fixture(scope="module", params=MODES)
def mode(
    request: pytest.FixtureRequest, train: Train, few_groups: str, short_reference: RunFolder
) -> tuple[RunFolder, RunFolder]:
    """The run on several ranks, and one process's with the same model.

    Compiled to a graph with its backward, but not to C++: that is test_reward_distributed's.
    """
    model, layout, nproc = MODES[request.param]
    short = (*SHORT, few_groups)
    one = train(*short, *model) if model else short_reference
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
        return train(*short, *model, *layout, nproc=nproc), one


@pytest.mark.parametrize("key", TRAIN)
def test_each_mode_gives_the_metrics_of_one_process(
    mode: tuple[RunFolder, RunFolder], key: str
) -> None:
    assert worst_step(*mode, key) < 1e-4


def test_each_mode_gives_the_weights_of_one_process(mode: tuple[RunFolder, RunFolder]) -> None:
    assert worst_tensor(*mode) < 1e-3


@pytest.mark.parametrize("mode", ["lora_tp2_fsdp2"], indirect=True)
def test_sharded_adapters_are_those_of_one_process(mode: tuple[RunFolder, RunFolder]) -> None:
    """By themselves: in the merged weights they are a small part."""
    assert worst_tensor(*mode, ADAPTERS) < 1e-3


@pytest.mark.parametrize("mode", ["compile_tp2"], indirect=True)
def test_compiled_embedding_moves_as_that_of_one_process(
    mode: tuple[RunFolder, RunFolder],
) -> None:
    """Relative to its movement: a lost gradient leaves the embedding near its start."""
    start_VD = start_weights()["tok_embeddings.weight"]
    moved_VD, expected_VD = (run.weights()["model.embed_tokens.weight"] - start_VD for run in mode)
    assert (moved_VD - expected_VD).norm() < 1e-3 * expected_VD.norm()


# Micro-batches: 1 x 8 = 8 x 1 = rows filled to a token budget

MICRO_BATCHES = {
    "row_per_group": ("strategy=single_pass", "max_tokens_per_microbatch=1"),
    "groups_up_to_300_tokens": ("strategy=single_pass", "max_tokens_per_microbatch=300"),
    "row_per_step": ("strategy=single_pass", "max_tokens_per_microbatch=100000"),
    "some_groups_two_pass": ("strategy=auto", "max_tokens_per_microbatch=200"),
    "row_per_response": ("strategy=two_pass", "forward_micro_batch_size=2"),
    "row_per_3_responses": (
        "strategy=two_pass",
        "micro_batch_size=3",
        "forward_micro_batch_size=2",
    ),
}


@pytest.fixture(scope="module", params=MICRO_BATCHES)
def micro_batched(request: pytest.FixtureRequest, train: Train, few_groups: str) -> RunFolder:
    settings = (f"steerlm2.{setting}" for setting in MICRO_BATCHES[request.param])
    return train(*VALIDATED, few_groups, *settings)


@pytest.mark.parametrize("key", TRAIN + VALIDATION)
def test_micro_batches_do_not_change_the_metrics(
    micro_batched: RunFolder, validated_reference: RunFolder, key: str
) -> None:
    """In each of 2 steps and 2 validations."""
    assert worst_step(micro_batched, validated_reference, key) < 1e-4


def test_micro_batches_do_not_change_the_weights(
    micro_batched: RunFolder, validated_reference: RunFolder
) -> None:
    assert worst_tensor(micro_batched, validated_reference) < 1e-4


# Kill and resume


@pytest.fixture(scope="module")
def killed(
    tune: TuneProcess,
    arguments: list[str],
    run_folder: type[RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """A run like the reference, killed after the first step past its checkpoint of step 7."""
    folder = run_folder(tmp_path_factory.mktemp("killed"))
    process = tune.start("steerlm2_distributed", *arguments, f"output_dir={folder.path}")
    checkpoint = folder.path / "checkpoints" / "step_000007"
    kill_when(process, lambda: 8 in steps(folder, "loss") and checkpoint.exists())
    return folder


@pytest.fixture(scope="module")
def resume(killed: RunFolder, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`resume(nproc=None)` continues a copy of the killed run."""

    def run(nproc: int | None = None) -> RunFolder:
        folder = tmp_path_factory.mktemp("resumed") / "run"
        shutil.copytree(killed.path, folder)
        return train("resume_from_checkpoint=true", nproc=nproc, output_dir=folder)

    return run


@pytest.fixture(scope="module")
def resumed(resume: Train) -> RunFolder:
    return resume()


@pytest.fixture(scope="module")
def resumed_on_two(resume: Train) -> RunFolder:
    return resume(nproc=2)


def files(folder: Path) -> dict[Path, bytes]:
    """The bytes of every file, by its path in the folder; but for the lock of a killed run, and the
    logs, which every start goes on with."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    names = {path: path.relative_to(folder) for path in paths}
    return {name: path.read_bytes() for path, name in names.items() if name.parts[0] != LOG_FOLDER}


def test_kill_was_in_mid_epoch_past_a_checkpoint(killed: RunFolder) -> None:
    """So that there are steps to forget and an epoch to enter in its middle (it has 5 steps)."""
    assert os.listdir(killed.path / "checkpoints") == ["step_000007"]
    last = max(steps(killed, "loss"))
    assert last > 7
    assert last % 5 != 0


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_resumed_lines_are_those_of_the_uninterrupted_run(
    resumed: RunFolder, reference: RunFolder, file: str
) -> None:
    """Bit for bit; no step is missing or stands there twice."""
    assert resumed.entries(file) == reference.entries(file)


def test_resumed_weights_are_those_of_the_uninterrupted_run(
    resumed: RunFolder, reference: RunFolder
) -> None:
    """Bit for bit."""
    got, expected = resumed.weights(), reference.weights()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_resumed_run_sets_nothing_aside(resumed: RunFolder) -> None:
    assert not (resumed.path / "earlier_runs").exists()


def test_resumed_on_two_ranks_repeats_and_misses_no_step(resumed_on_two: RunFolder) -> None:
    logged = [row["step"] for row in resumed_on_two.entries() if "loss" in row]
    assert logged == list(range(1, STEPS + 1))


@pytest.mark.parametrize("key", TRAIN + VALIDATION)
def test_resumed_on_two_ranks_gives_the_metrics_of_the_uninterrupted_run(
    resumed_on_two: RunFolder, reference: RunFolder, key: str
) -> None:
    assert worst_step(resumed_on_two, reference, key) < 1e-4


def test_resumed_on_two_ranks_gives_the_weights_of_the_uninterrupted_run(
    resumed_on_two: RunFolder, reference: RunFolder
) -> None:
    assert worst_tensor(resumed_on_two, reference) < 1e-4


def test_resuming_takes_the_learning_rate_of_the_config(
    killed: RunFolder, train: Train, tmp_path: Path
) -> None:
    """Half the rate and a shorter run: step 8 has what a new run of 9 steps would have there."""
    shutil.copytree(killed.path, tmp_path / "run")
    overrides = ("resume_from_checkpoint=true", "lr=5e-4", "max_steps=9")
    resumed = train(*overrides, output_dir=tmp_path / "run")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-4)
    schedule = warmup_cosine_hold(optimizer, num_training_steps=9, warmup_steps=3)
    expected = [5e-4 * schedule.lr_lambdas[0](step) for step in (7, 8)]
    assert [steps(resumed, "lr")[step]["lr"] for step in (8, 9)] == pytest.approx(expected)


def test_resuming_with_another_batch_size_is_refused_and_changes_nothing(
    killed: RunFolder, tune: TuneProcess, arguments: list[str]
) -> None:
    before = files(killed.path)
    result = tune(
        "steerlm2_distributed",
        *arguments,
        f"output_dir={killed.path}",
        "resume_from_checkpoint=true",
        "global_batch_size=4",
        check=False,
    )
    error = result.stderr[result.stderr.index("error: ") :]
    assert error.startswith(f"error: {killed.path}/checkpoints/step_000007 was written with ")
    assert "global_batch_size: 5 then, 4 now" in error
    assert "Traceback" not in result.stderr
    assert result.returncode == 1
    assert files(killed.path) == before


# LoRA on the checkpoint that the reference run exported


@pytest.fixture(scope="module")
def lora(reference: RunFolder, train: Train, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("lora")
    (base,) = reference.path.glob("epoch_*")
    return train(
        *SHORT,
        *LORA,
        "checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
        f"checkpointer.checkpoint_dir={base}",
        "checkpointer.checkpoint_files=[model.safetensors]",
        "checkpointer.model_type=LLAMA3",
        f"checkpointer.output_dir={folder}",
        output_dir=folder,
    )


def test_every_adapter_is_trained(lora: RunFolder) -> None:
    """2 layers x 6 matrices (q, v, output and three of the MLP); each B started at 0."""
    adapters = lora.weights(ADAPTERS)
    trained = [name for name, B in adapters.items() if ".lora_B." in name and B.norm() > 0]
    assert len(trained) == 2 * 6


def test_merged_weights_are_the_base_plus_the_adapters(
    lora: RunFolder, reference: RunFolder
) -> None:
    """W + (alpha / rank) B A, with alpha / rank = 8 / 4; other tensors are the base's."""
    adapters = lora.weights(ADAPTERS)
    expected = reference.weights()
    for name, A in adapters.items():
        if ".lora_A." in name:
            B = adapters[name.replace(".lora_A.", ".lora_B.")]
            matrix = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            expected[matrix] += 8 / 4 * B @ A
    merged = lora.weights("model-00001-of-00001.safetensors")
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


# bf16, in the folder of an earlier run


@pytest.fixture(scope="module")
def bf16(
    validated_reference: RunFolder,
    train: Train,
    few_groups: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """Computation in bf16, weights in float32; written where the reference's files lie."""
    folder = tmp_path_factory.mktemp("bf16") / "run"
    shutil.copytree(validated_reference.path, folder)
    return train(
        *(*VALIDATED, few_groups),
        "dtype=bf16",
        "param_dtype=fp32",
        "metric_logger._component_=torchtune.training.metric_logging.TensorBoardLogger",
        f"metric_logger.log_dir={folder}/tensorboard",
        "metric_logger.organize_logs=false",
        output_dir=folder,
    )


def test_bf16_gives_about_the_loss_of_fp32(bf16: RunFolder, validated_reference: RunFolder) -> None:
    """The mean over all steps, to 5%: single steps depart as rounding adds up."""
    runs = (bf16, validated_reference)
    loss, expected = (sum(row["loss"] for row in steps(run, "loss").values()) for run in runs)
    assert loss == pytest.approx(expected, rel=0.05)


def test_earlier_run_is_moved_and_whole(bf16: RunFolder, validated_reference: RunFolder) -> None:
    assert files(bf16.path / "earlier_runs" / "1") == files(validated_reference.path)


def test_tensorboard_gets_every_loss(bf16: RunFolder) -> None:
    events = EventAccumulator(str(bf16.path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    logged = {event.step: event.tensor_proto.float_val[0] for event in events.Tensors("loss")}
    assert logged == pytest.approx({step: row["loss"] for step, row in steps(bf16, "loss").items()})
