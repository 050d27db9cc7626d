"""Records of given lengths, and the micro-batches that each recipe makes of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from steerlm2.planning.jobs import Job, Lengths

CONFIGS = ["tiny/steerlm2", "tiny/sft", "tiny/reward"]

MakeJob = Callable[..., Job[Any]]


def lengths(**changes: int) -> Lengths:
    given = {"prompt_tokens": 250, "response_tokens": 350, "responses": 10, "max_seq_len": 4096}
    return Lengths(**given | changes)


def test_lengths_have_the_means_that_were_asked_for() -> None:
    """Of 2,000 prompts and 20,000 responses; what is cut off is within the tolerance."""
    drawn = lengths().draw(2000)
    assert statistics.mean(prompt for prompt, _ in drawn) == pytest.approx(250, rel=0.06)
    assert statistics.mean(r for _, rs in drawn for r in rs) == pytest.approx(350, rel=0.03)
    assert lengths().draw(2000) == drawn


def test_a_prompt_with_a_response_fits_into_the_sequence() -> None:
    drawn = lengths(max_seq_len=400).draw(500)
    assert max(prompt + max(responses) for prompt, responses in drawn) <= 400


@pytest.mark.parametrize("config", CONFIGS)
def test_a_record_has_its_lengths(make_job: MakeJob, config: str) -> None:
    """10 tokens of prompt, a response of 5. The last token of a response is no input where it only
    has to be predicted: 14 tokens; an attribute model reads it: 15."""
    record = make_job(config).record(10, [5])
    assert record.num_tokens == (15 if config == "tiny/reward" else 14)


@pytest.mark.parametrize("config", CONFIGS)
def test_all_ranks_have_as_many_rows_and_each_record_is_in_one(
    make_job: MakeJob, config: str
) -> None:
    job = make_job(config)
    n = job.responses or 3
    records = [job.record(20 + i, [30 + i] * n) for i in range(30)]
    microbatches = job.microbatches(records, 4)
    assert all(len(ranks) == 4 for ranks in microbatches)
    computed = sum(each.num_tokens for ranks in microbatches for each in ranks)
    assert computed == sum(record.num_tokens for record in records)
    assert all(each.num_tokens <= job.budget for ranks in microbatches for each in ranks)


def test_a_group_over_the_budget_takes_two_passes(make_job: MakeJob) -> None:
    """5 responses of 100 tokens don't fit into 300: forwards of 2, 2 and 1, then 5 backwards; and
    the second rank, which has nothing to do, runs as many empty micro-batches."""
    job = make_job(
        "tiny/steerlm2",
        "steerlm2.max_tokens_per_microbatch=300",
        "steerlm2.forward_micro_batch_size=2",
    )
    microbatches = job.microbatches([job.record(10, [101] * 5)], 2)
    assert [ranks[0].trains for ranks in microbatches] == [False] * 3 + [True] * 5
    assert [ranks[0].num_tokens for ranks in microbatches] == [210, 210, 110] + [110] * 5
    assert all(ranks[1].num_tokens == 0 for ranks in microbatches)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_largest_microbatch_is_filled_up_to_the_budget(make_job: MakeJob, config: str) -> None:
    job = make_job(config)
    microbatches = job.microbatches([job.record(20, [30] * (job.responses or 3))], 2)
    assert job.largest_microbatch(microbatches).num_tokens == job.budget


def test_slices_of_a_group_are_not_filled_up(make_job: MakeJob) -> None:
    job = make_job("tiny/steerlm2", "steerlm2.strategy=two_pass")
    microbatches = job.microbatches([job.record(10, [50] * 3)], 1)
    assert job.largest_microbatch(microbatches).num_tokens == 10 + 49


def test_a_model_is_that_of_its_recipe(make_job: MakeJob) -> None:
    """Two attributes of width 128 in the place of the output layer; all weights are trained."""
    decoder = make_job("tiny/reward").build()
    assert decoder.output.weight.shape == (2, 128)
    assert all(p.is_meta and p.requires_grad for p in decoder.parameters())


def test_of_a_lora_model_only_the_adapters_are_trained(make_job: MakeJob) -> None:
    """The frozen base is kept in the dtype of the computation."""
    job = make_job("llama3_1/8B_acsft_lora")
    decoder = job.build()
    trained = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in decoder.parameters() if not p.requires_grad} == {job.dtype}
