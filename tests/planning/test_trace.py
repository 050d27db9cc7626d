"""A fake step has the bytes that arithmetic gives, and every 70B config runs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from steerlm2._tune import RECIPES
from steerlm2.planning.jobs import JOBS, Job
from steerlm2.planning.trace import Trace, fake_world, trace_step

MakeJob = Callable[..., Job[Any]]

RECIPE_CONFIGS = Path(__file__).resolve().parents[2] / "recipe_configs"
MULTI_NODE = {
    "llama2/70B_acsft_multinode": 256,
    "llama2/70B_steerlm2_multinode": 128,
    "llama3/70B_acsft_multinode": 64,
    "llama3/70B_reward_multinode": 64,
    "llama3/70B_sft_multinode": 64,
    "llama3_1/70B_reward_helpfulness_multinode": 64,
    "llama3_1/70B_reward_scaled_bt_multinode": 32,
    "llama3_1/70B_steerlm2_multinode": 256,
    "llama3_3/70B_steerlm2_multinode": 256,
}
"""GPUs of the headers' commands."""


def traced(
    job: Job[Any],
    world_size: int,
    *,
    accumulates: bool = True,
    num_layers: int | None = None,
    prompt: int = 100,
    response: int = 100,
) -> Trace:
    """Of a micro-batch of one record, whose prompt and responses have so many tokens."""
    records = [job.record(prompt, [response] * (job.responses or 4))]
    with fake_world(world_size, job.cfg) as world:
        return trace_step(job, records, world, accumulates=accumulates, num_layers=num_layers)


def test_every_multi_node_training_config_is_listed() -> None:
    names = [name for recipe in JOBS for name in RECIPES[recipe]]
    assert {name for name in names if name.endswith("_multinode")} == MULTI_NODE.keys()


@pytest.mark.parametrize("name", MULTI_NODE)
def test_a_70b_config_takes_a_fake_step_on_its_gpus(name: str, make_job: MakeJob) -> None:
    """Its own layout and micro-batch on as many ranks as its header starts; 1 of its 80 layers."""
    trace = traced(make_job(name), MULTI_NODE[name], num_layers=1)
    assert {collective.dimension for collective in trace.traffic} >= {"dp_shard", "tp"}
    assert trace.peak["activations"] > 0


@pytest.mark.parametrize(
    ("name", "trained_as"),
    [
        ("llama3/70B_annotate_attributes_multinode", "llama3/70B_reward_multinode"),
        ("llama3_1/70B_score_responses_multinode", "llama3_1/70B_steerlm2_multinode"),
    ],
)
def test_a_70b_config_that_only_reads_runs_on_its_gpus(
    name: str, trained_as: str, make_job: MakeJob
) -> None:
    """The model is that of a training config; its layout runs on 4 nodes."""
    reads, trains = (
        OmegaConf.load(RECIPE_CONFIGS / f"{config}.yaml") for config in (name, trained_as)
    )
    assert reads.model == trains.model
    layout = ("dtype", "tensor_parallel_dim", "data_parallel_shard_dim")
    job = make_job(trained_as, *(f"{key}={reads[key]}" for key in layout))
    assert traced(job, 32, num_layers=1).flops["forward"] > 0


@pytest.mark.slow
def test_70b_takes_a_whole_fake_step_on_256_gpus(make_job: MakeJob) -> None:
    """4 of its 80 layers, of 0.856e9 weights each, and 2.1e9 of embedding and output. A rank keeps
    1/256 in float32, as much of gradients, and twice that of AdamW's moments; norms are on every
    rank of a tensor-parallel group, and the rotary embedding's table is 0.06 GiB."""
    trace = traced(make_job("llama3_1/70B_steerlm2_multinode"), 256, num_layers=4)
    share = (4 * 0.8556e9 + 2.1013e9) / 256 * 4
    assert trace.state["gradients"] == pytest.approx(share, rel=0.01)
    assert trace.state["optimizer"] == pytest.approx(2 * share, rel=0.01)
    assert trace.state["parameters"] == pytest.approx(share + 131072 * 128 * 4, rel=0.01)


def num_weights(job: Job[Any]) -> int:
    return sum(parameter.numel() for parameter in job.build().parameters())


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_shards_are_equal_parts_of_the_state(world_size: int, make_job: MakeJob) -> None:
    """float32: 4 bytes a weight, 4 a gradient, 8 of AdamW's moments, and a step counter."""
    job = make_job("tiny/sft")
    state = traced(job, world_size).state
    share = 4 * num_weights(job) / world_size
    assert state["gradients"] == share
    assert state["optimizer"] == pytest.approx(2 * share, rel=1e-3)


def test_replicas_hold_what_a_smaller_world_would(make_job: MakeJob) -> None:
    """HSDP: 2 replicas sharded over 4 are as full as 4 processes, and reduce over both."""
    single = traced(make_job("tiny/sft"), 4)
    replicated = traced(make_job("tiny/sft", "data_parallel_replicate_dim=2"), 8)
    assert replicated.state == single.state
    reduced = {(c.dimension, c.operation) for c in replicated.traffic if c.phase == "backward"}
    assert reduced >= {("dp_replicate", "all_reduce"), ("dp_shard", "reduce_scatter")}


def test_bytes_that_fsdp_gathers_and_reduces(make_job: MakeJob) -> None:
    """bf16 weights are gathered once in the forward and, layers only, again in the backward; their
    gradients are reduced in float32."""
    job = make_job("tiny/sft", "dtype=bf16", "param_dtype=fp32")
    traffic = {
        (c.phase, c.operation): t.nbytes
        for c, t in traced(job, 4).traffic.items()
        if c.dimension == "dp_shard"
    }
    decoder = job.build()
    weights = sum(p.numel() for p in decoder.parameters())
    layers = sum(p.numel() for p in decoder.layers.parameters())
    assert traffic["forward", "all_gather"] == 2 * weights
    assert traffic["backward", "all_gather"] == 2 * layers
    assert traffic["backward", "reduce_scatter"] == 4 * weights


def test_flops_of_a_plain_model(make_job: MakeJob) -> None:
    """2 FLOPs a weight of a layer and token forwards and twice that backwards, attention apart;
    the logits of 100 targets are one chunk, which isn't computed again in the backward."""
    job = make_job("tiny/sft")
    decoder = job.build()
    weights = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 2)
    output = decoder.output.weight.numel()
    trace = traced(job, 1)
    assert trace.tokens == 199
    linear = {phase: trace.flops[phase] - trace.attention_flops[phase] for phase in trace.flops}
    assert linear["forward"] == 2 * (weights * 199 + output * 100)
    assert linear["backward"] == 4 * weights * 199 + 4 * output * 100


def test_activation_checkpointing_trades_memory_for_a_forward(make_job: MakeJob) -> None:
    """Of 6 layers all products run again in the backward but the last one, which no gradient needs:
    384 to 128 units. Nor do the logits of the 100 targets."""
    plain = traced(make_job("tiny/sft", "model.num_layers=6"), 2)
    saving = make_job("tiny/sft", "model.num_layers=6", "enable_activation_checkpointing=true")
    saved = traced(saving, 2)
    assert saved.peak["activations"] < plain.peak["activations"] / 2
    logits = 2 * 512 * 128 * 100
    again = saved.flops["backward"] - plain.flops["backward"]
    assert again == plain.flops["forward"] - logits - 6 * 2 * 384 * 128 * 199


def test_tensor_parallel_ranks_share_the_work(make_job: MakeJob) -> None:
    """Half of the FLOPs each, of 256 tokens: two ranks pack to a multiple of 64."""
    whole = traced(make_job("tiny/sft"), 1, prompt=128, response=129)
    half = traced(make_job("tiny/sft", "tensor_parallel_dim=2"), 2, prompt=128, response=129)
    assert half.flops["forward"] == pytest.approx(whole.flops["forward"] / 2, rel=0.01)


def test_first_micro_batch_has_no_gradients_yet(make_job: MakeJob) -> None:
    job = make_job("tiny/sft")
    first, later = (traced(job, 2, accumulates=after) for after in (False, True))
    assert first.peak_bytes <= later.peak_bytes
    assert later.peak["gradients"] == later.state["gradients"]


def test_lora_has_gradients_of_adapters_only(make_job: MakeJob) -> None:
    job = make_job("llama3_1/8B_acsft_lora")
    trace = traced(job, 2, num_layers=2)
    assert trace.state["gradients"] < trace.state["parameters"] / 10


def test_eight_bit_moments_are_counted_from_the_optimizer_itself(make_job: MakeJob) -> None:
    """A byte for each moment of the large matrices, instead of four."""
    full = traced(make_job("tiny/sft"), 2)
    job = make_job("tiny/sft", "optimizer._component_=torchao.optim.AdamW8bit")
    ratio = traced(job, 2).state["optimizer"] / full.state["optimizer"]
    assert 0.25 < ratio < 0.35


def test_nf4_weights_are_counted_as_they_are_kept(make_job: MakeJob) -> None:
    """2 layers x (4 x 256**2 + 3 x 256 x 512) numbers on 2 ranks. Instead of 4 bytes each takes a
    half, 1/64 for its block's scale, and 4 / 16384 for the scale of that."""
    overrides = (
        "model._component_=torchtune.models.llama3.lora_llama3",
        *("model.lora_attn_modules=[q_proj]", "model.lora_rank=4", "model.lora_alpha=8"),
        *("model.embed_dim=256", "model.num_kv_heads=4", "model.intermediate_dim=512"),
    )
    plain, quantized = (
        traced(make_job("tiny/sft", *overrides, f"model.quantize_base={value}"), 2)
        for value in ("false", "true")
    )
    numbers = 2 * (4 * 256**2 + 3 * 256 * 512) / 2
    saved = plain.state["parameters"] - quantized.state["parameters"]
    assert saved == pytest.approx(numbers * (4 - 1 / 2 - 1 / 64 - 4 / 16384), rel=1e-3)


def test_a_world_that_does_not_divide_is_an_error(make_job: MakeJob) -> None:
    job = make_job("tiny/sft", "tensor_parallel_dim=2")
    with pytest.raises(ValueError, match=r"3 process\(es\) can't form"), fake_world(3, job.cfg):
        pass
    assert not dist.is_initialized()


def test_layouts_can_be_tried_in_turn(make_job: MakeJob) -> None:
    """The groups of an earlier mesh of the same shape are gone."""
    selective = ("enable_activation_checkpointing=true", "ac_mode=selective")
    replicas = make_job("tiny/sft", *selective, "data_parallel_replicate_dim=2")
    tp = make_job("tiny/sft", *selective, "tensor_parallel_dim=2")
    both = make_job(
        "tiny/sft", *selective, "data_parallel_replicate_dim=2", "tensor_parallel_dim=2"
    )
    first = traced(both, 8, num_layers=1)
    for job in (tp, both, replicas):
        traced(job, 8, num_layers=1)
    assert traced(both, 8, num_layers=1) == first


def test_nothing_is_left_of_the_fake_world(make_job: MakeJob) -> None:
    traced(make_job("tiny/sft"), 2)
    assert not dist.is_initialized()
