"""The training recipes on the GPU against the same steps on the CPU in float32."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from checking import (
    CONTEXT,
    Child,
    check,
    entries,
    expect,
    folder,
    largest_difference,
    losses,
    note,
    on_gpu,
    start_tune,
    tune,
)

FP32 = ("dtype=fp32",)
BF16 = ("dtype=bf16",)
MASTER = ("dtype=bf16", "param_dtype=fp32", "optimizer.fused=true")
"""As the 8B and 70B configs: FSDP2 on a mesh of one, NCCL, float32 weights, fused AdamW."""
FULL = ("enable_activation_checkpointing=true",)
SELECTIVE = (*FULL, "ac_mode=selective")
FP32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.05
"""20 steps at a high learning rate; the first step's loss is the sharper figure."""
BF16_FIRST_TOLERANCE = 0.01
PAIRS = "responses_per_prompt=2"
NO_VALIDATION = (
    *("generation=null", "dataset_val=null", "val_every_n_steps=null"),
    "limit_val_batches=null",
)


def training() -> tuple[str, ...]:
    """20 steps with two validations; fewer and smaller ones in a rehearsal."""
    steps, records, val_every = (20, 320, 10) if on_gpu() else (2, 8, 2)
    return (
        *(f"max_steps={steps}", f"dataset.num_records={records}", "save_every_n_steps=null"),
        *("dataset_val.num_records=16", "limit_val_batches=1", f"val_every_n_steps={val_every}"),
        *(f"lr_scheduler.warmup_steps={steps // 4}", *rehearsed("dataset_val")),
    )


def rehearsed(*data_sets: str) -> tuple[str, ...]:
    """Smaller steps in a rehearsal."""
    if on_gpu():
        return ()
    each = (f"{name}.{key}" for name in data_sets for key in ("num_records=4", PAIRS))
    return "global_batch_size=4", f"dataset.{PAIRS}", *each


def steerlm2() -> tuple[str, ...]:
    return "steerlm2_distributed", "tiny/steerlm2", *training(), answers()


def answers() -> str:
    return f"generation.max_new_tokens={8 if on_gpu() else 2}"


def short_steps() -> int:
    return 6 if on_gpu() else 4


def short(*overrides: str) -> tuple[str, ...]:
    """A few steps of tiny/steerlm2 on the same prompts, which it must learn."""
    records = 16 if on_gpu() else 4
    few = (f"dataset.num_records={records}", "lr_scheduler.warmup_steps=0")
    few += (f"max_steps={short_steps()}",)
    base = ("steerlm2_distributed", "tiny/steerlm2", *NO_VALIDATION, *few, *rehearsed())
    return (*base, "lr=2e-3", f"device={CONTEXT.device}", *overrides)


def compiled() -> tuple[str, ...]:
    """Nothing in a rehearsal, where it would take minutes."""
    return ("compile=true",) if on_gpu() else ()


def note_steps(run: Path, reference: Path) -> None:
    """The figures of a run against the CPU's, step by step."""
    ours, theirs = entries(run), entries(reference)
    note(steps=len(ours))
    for key in ("loss", "distance", "grad_norm"):
        pair = [row[key] for row in ours], [row[key] for row in theirs]
        note(**{f"{key}_first": largest_difference(pair[0][:1], pair[1][:1])})
        note(**{f"{key}_worst": largest_difference(*pair)})
    validated = [[row["val_loss"] for row in entries(r, "val_loss")] for r in (run, reference)]
    note(val_loss_worst=largest_difference(*validated))
    rates = [row["tokens_per_second"] for row in ours]
    note(first_step_tokens_per_second=rates[0])
    note(tokens_per_second=statistics.median(rates[len(rates) // 4 :]))
    note(peak_memory_gib=ours[-1]["peak_memory_gib"])


def train_as_cpu(
    *overrides: str,
    tolerance: float,
    processes: int | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """A training run on the device, whose steps must be those of `cpu_reference`."""
    run = folder() / "run"
    started = time.perf_counter()
    device = f"device={CONTEXT.device}"
    tune(*steerlm2(), device, *overrides, f"output_dir={run}", processes=processes, env=env)
    note(seconds=time.perf_counter() - started)
    note_steps(run, folder("cpu_reference") / "run")
    expect(len(list(run.glob("epoch_*/*.safetensors"))) >= 1, "nothing was exported")
    worst = max(CONTEXT.figures["loss_worst"], CONTEXT.figures["val_loss_worst"])
    expect(worst <= tolerance, f"losses differ by {worst:.3g} of the CPU's, more than {tolerance}")
    first = CONTEXT.figures["loss_first"]
    expect(first <= BF16_FIRST_TOLERANCE, f"the first loss differs by {first:.3g} of the CPU's")


@check(120)
def cpu_reference() -> None:
    """20 steps of tiny/steerlm2 on the CPU in float32: what the GPU's are compared with."""
    run = folder() / "run"
    tune(*steerlm2(), "device=cpu", *FP32, f"output_dir={run}")
    note(steps=len(entries(run)), last_loss=entries(run)[-1]["loss"])


@check(120, needs=["cpu_reference"])
def steps_fp32() -> None:
    """The recipe as it is, FlexAttention and all, in float32: CPU and GPU must agree closely."""
    train_as_cpu(*FP32, tolerance=FP32_TOLERANCE)


@check(150, needs=["cpu_reference"])
def steps_like_8b() -> None:
    """All that llama3_1/8B_steerlm2 sets: bf16 with float32 weights (FSDP2, NCCL), fused AdamW,
    compiled, full activation checkpointing."""
    train_as_cpu(*MASTER, *FULL, *compiled(), tolerance=BF16_TOLERANCE)


@check(120, needs=["cpu_reference"], rehearsed_by="steps_like_8b")
def steps_bf16() -> None:
    """bf16 weights, products and states."""
    train_as_cpu(*BF16, tolerance=BF16_TOLERANCE)


@check(120, needs=["cpu_reference"], rehearsed_by="steps_fp32")
def steps_compile() -> None:
    """Compiled layers in float32."""
    train_as_cpu(*FP32, *compiled(), tolerance=FP32_TOLERANCE)


@check(120, needs=["cpu_reference"], rehearsed_by="steps_selective")
def steps_selective_compiled() -> None:
    """Compiled layers with selective activation checkpointing."""
    train_as_cpu(*FP32, *SELECTIVE, *compiled(), tolerance=FP32_TOLERANCE)


@check(90, needs=["cpu_reference"])
def steps_selective() -> None:
    """Selective activation checkpointing of layers that aren't compiled."""
    train_as_cpu(*FP32, *SELECTIVE, tolerance=FP32_TOLERANCE)


@check(90, needs=["cpu_reference"], rehearsed_by="steps_like_8b")
def steps_checkpointing() -> None:
    """Full activation checkpointing, and the allocator's setting of the launch files."""
    env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if on_gpu() else None
    train_as_cpu(*FP32, *FULL, tolerance=FP32_TOLERANCE, env=env)


@check(120, needs=["cpu_reference"])
def steps_two_pass() -> None:
    """The two-pass strategy with small micro-batches."""
    more = ("steerlm2.strategy=two_pass", "steerlm2.micro_batch_size=3")
    more += ("steerlm2.forward_micro_batch_size=4",)
    train_as_cpu(*FP32, *more, tolerance=FP32_TOLERANCE)


@check(90, needs=["cpu_reference"])
def steps_torchrun() -> None:
    """Under torchrun, one process: FSDP2 and NCCL, no mixed precision."""
    train_as_cpu(*FP32, "optimizer.fused=true", tolerance=FP32_TOLERANCE, processes=1)


@check(120, needs=["cpu_reference"], rehearsed_by="steps_torchrun", gpus=2)
def steps_two_gpus() -> None:
    """Two processes with a GPU each: FSDP2 over NCCL."""
    train_as_cpu(*FP32, tolerance=FP32_TOLERANCE, processes=2)


@check(120, needs=["cpu_reference"], rehearsed_by="steps_torchrun", gpus=2)
def steps_two_gpus_tensor_parallel() -> None:
    """Likewise, with half of each matrix on each."""
    train_as_cpu(*FP32, "tensor_parallel_dim=2", tolerance=FP32_TOLERANCE, processes=2)


@check(90, needs=["cpu_reference"], rehearsed_by="steps_like_8b")
def steps_cpu_offload() -> None:
    """Weights and states on the host, with the fused AdamW that the 8B configs set."""
    offload = ("fsdp_cpu_offload=true",) if on_gpu() else ()
    train_as_cpu(*MASTER, *offload, tolerance=BF16_TOLERANCE)


@check(150)
def resume() -> None:
    """Killed between two checkpoints and started again: the same losses as without."""
    every, killed_from, steps, records = (10, 25, 80, 320) if on_gpu() else (2, 3, 14, 16)
    base = (
        *("steerlm2_distributed", "tiny/steerlm2", *NO_VALIDATION, *FP32),
        *(f"max_steps={steps}", f"save_every_n_steps={every}", f"dataset.num_records={records}"),
        *("lr_scheduler.warmup_steps=5", f"device={CONTEXT.device}", *rehearsed()),
    )
    whole = start_tune(*base, f"output_dir={folder()}/whole")
    killed = folder() / "killed"
    kill_after(start_tune(*base, f"output_dir={killed}"), killed, killed_from)
    note(killed_after=len(entries(killed)))
    again = tune(*base, f"output_dir={killed}", "resume_from_checkpoint=true")
    found = re.search(r"resumed from .*?(step_\d+)", again)
    note(resumed_from=found[1] if found else "nothing")
    whole.output()
    ours, theirs = losses(killed), losses(folder() / "whole")
    note(steps=len(ours), difference=largest_difference(ours, theirs))
    expect(CONTEXT.figures["killed_after"] < steps, "the run ended before it could be killed")
    expect(found is not None, "it didn't resume")
    expect(CONTEXT.figures["difference"] <= 1e-3, "losses differ from the run without an end")


def kill_after(child: Child, run: Path, steps: int) -> None:
    """End a run once it has logged so many steps and saved a checkpoint."""
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    while child.poll() is None:
        logged = metrics.read_text().count("\n") if metrics.exists() else 0
        if logged >= steps and any(checkpoints.glob("step_*[0-9]")):
            break
        time.sleep(0.01)
    child.kill()


def other_recipe(recipe: str, config: str, *overrides: str) -> None:
    """A recipe on the device in float32, and as the 8B configs run it, against the CPU's: all at
    once."""
    base = (recipe, config, *training(), *overrides)
    device = f"device={CONTEXT.device}"
    ways = {"cpu": ("device=cpu", *FP32), "fp32": (device, *FP32)}
    ways["bf16"] = (device, *MASTER, *compiled())
    runs = {
        name: start_tune(*base, *options, f"output_dir={folder()}/{name}")
        for name, options in ways.items()
    }
    found = {}
    for name, run in runs.items():
        run.output()
        found[name] = losses(folder() / name)
        note(**{f"{name}_difference": largest_difference(found[name], found["cpu"])})
    note(steps=len(found["fp32"]))
    for name, tolerance in (("fp32", FP32_TOLERANCE), ("bf16", 0.3)):
        off = CONTEXT.figures[f"{name}_difference"]
        expect(off <= tolerance, f"{name}: losses differ by {off:.3g} of the CPU's")


@check(150)
def reward() -> None:
    """reward_distributed, regression; then bf16, float32 weights, compiled."""
    other_recipe("reward_distributed", "tiny/reward")


@check(150)
def sft() -> None:
    """sft_distributed with labels, answers at validation; then bf16, float32 weights, compiled."""
    other_recipe("sft_distributed", "tiny/acsft", answers())


@check(120)
def adamw8bit() -> None:
    """torchao's 8-bit AdamW, saved, and resumed."""
    steps = short_steps()
    saved = (f"save_every_n_steps={steps // 2}", "keep_last_n_checkpoints=2")
    base = short(*saved, f"output_dir={folder()}/run")
    if on_gpu():  # on a CPU it compiles for minutes
        base += ("optimizer._component_=torchao.optim.AdamW8bit", "dtype=bf16", "param_dtype=fp32")
    tune(*base)
    run = folder() / "run"
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / f"step_{steps:06}")
    tune(*base, "resume_from_checkpoint=true")
    note(losses=f"{whole[0]:.3g} to {whole[-1]:.3g}")
    note(resumed=largest_difference(losses(run), whole))
    expect(whole[-1] < 0.95 * whole[0], "it doesn't learn")
    expect(CONTEXT.figures["resumed"] <= 1e-3, "the resumed run differs")


@check(150)
def qlora() -> None:
    """NF4 base weights: alone, and with FSDP2 under torchrun; exported."""
    base = short(
        "model._component_=torchtune.models.llama3.lora_llama3",
        "model.lora_attn_modules=[q_proj,v_proj,output_proj]",
        "model.apply_lora_to_mlp=true",
        *("model.lora_rank=4", "model.lora_alpha=8", "model.quantize_base=true"),
        *("model.embed_dim=256", "model.num_kv_heads=4", "model.intermediate_dim=512"),
        "save_every_n_steps=3",
    )
    ways: dict[str, tuple[int | None, Sequence[str]]] = {"alone": (None, FP32)}
    if on_gpu():
        ways["fsdp_fp32"] = (1, FP32)
    ways["fsdp"] = (1, ("dtype=bf16", "param_dtype=fp32", *compiled()))
    compare_ways(
        {
            name: start_tune(*base, *more, f"output_dir={folder()}/{name}", processes=processes)
            for name, (processes, more) in ways.items()
        }
    )


@check(150)
def float8() -> None:
    """float8=true, plain and compiled, with float32 weights; against bf16. (A rehearsal has
    bf16 in place of float8, which needs a GPU, and nothing plain.)"""
    base = short("save_every_n_steps=null", *MASTER)
    rounded = ("float8=true",) if on_gpu() else ()
    ways = {"bf16": (), "compiled": (*rounded, *FULL, *compiled())}
    if on_gpu():
        ways["plain"] = rounded
    compare_ways(
        {
            name: start_tune(*base, *more, f"output_dir={folder()}/{name}")
            for name, more in ways.items()
        }
    )


def compare_ways(runs: dict[str, Child]) -> None:
    """That runs of this check, which go on at once, learn and end near the first one's losses."""
    first = next(iter(runs))
    found = {}
    for name, run in runs.items():
        run.output()
        found[name] = losses(folder() / name)
        note(**{name: f"{found[name][0]:.3g} to {found[name][-1]:.3g}"})
        note(**{f"{name}_difference": largest_difference(found[name], found[first])})
    for name in runs:
        expect(found[name][-1] < 0.95 * found[name][0], f"{name} doesn't learn")
        off = CONTEXT.figures[f"{name}_difference"]
        expect(off <= 0.3, f"{name} differs from {first} by {off:.3g}")
