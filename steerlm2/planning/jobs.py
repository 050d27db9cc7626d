"""The optimizer steps of each training recipe, for records of given lengths.

The forward, the losses and the packing are the library functions that the recipes call, in the
same order. A test compares the memory with that of a real run.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torchtune.modules import TransformerDecoder

from steerlm2.attributes import as_schema
from steerlm2.checkpoint_dirs import is_checkpoint
from steerlm2.checkpoints.decoder import build_decoder, checkpoint_dir_of
from steerlm2.config.keys import TrainingKeys
from steerlm2.config.loader import instantiate
from steerlm2.data.packing import (
    Dialogue,
    Group,
    RewardGroup,
    pack,
    pack_dialogues,
    pack_for_reward,
)
from steerlm2.distributed.parallelize import DTYPES
from steerlm2.distributed.world import World
from steerlm2.losses import bradley_terry_sum, squared_error_sum
from steerlm2.models.decoders import pair_cost
from steerlm2.training.forward import attribute_scores, response_logps, target_logps
from steerlm2.training.setup import build_loss
from steerlm2.training.step_plan import microbatches_by_rank, plan_step, slices

RecordT = TypeVar("RecordT", Group, Dialogue, RewardGroup)

SPREAD = 0.8
"""Standard deviation of the logarithm of a length. A choice: a tenth of the lengths are then over
2.8 times the median."""
SHORTEST = 8
"""Tokens of the shortest prompt or response that is drawn; a choice."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the records to plan with, drawn from log-normal distributions with these means."""

    prompt_tokens: int
    response_tokens: int
    responses: int
    max_seq_len: int
    """Of a prompt with one response; longer draws are cut to it."""

    def draw(self, count: int, seed: int = 0) -> list[tuple[int, list[int]]]:
        """[record] -> (tokens of the prompt, tokens of each response)."""
        rng = random.Random(seed)

        def length(mean: int, longest: int) -> int:
            drawn = round(mean * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD))
            return max(SHORTEST, min(drawn, longest))

        prompts = [length(self.prompt_tokens, self.max_seq_len // 2) for _ in range(count)]
        return [
            (
                prompt,
                [
                    length(self.response_tokens, self.max_seq_len - prompt)
                    for _ in range(self.responses)
                ],
            )
            for prompt in prompts
        ]


@dataclass(frozen=True)
class PlannedMicrobatch(Generic[RecordT]):
    """A micro-batch of one rank."""

    records: Sequence[RecordT]
    trains: bool = True
    """False: a forward without gradients (the first pass of `two_pass`)."""

    @property
    def num_tokens(self) -> int:
        return sum(record.num_tokens for record in self.records)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and a token that it attends to."""
        return sum(record.num_pairs for record in self.records)


def planned_without_checkpoint(cfg: TrainingKeys) -> str | None:
    """A sentence, where the model of the checkpoint is planned for before there is one."""
    folder = checkpoint_dir_of(cfg.model, cfg.checkpointer)
    planned_as = cfg.model.get("planned_as")
    if planned_as is None or is_checkpoint(folder):
        return None
    return f"{folder} is no checkpoint yet: planned as {planned_as}"


class Job(abc.ABC, Generic[RecordT]):
    """One of the training recipes with its config."""

    recipe: ClassVar[str]
    record_name: ClassVar[str]
    budget_key: ClassVar[str]

    def __init__(self, cfg: Any) -> None:
        self.cfg: TrainingKeys = cfg
        self.dtype = DTYPES[self.cfg.dtype]
        self.param_dtype = DTYPES[self.cfg.param_dtype or self.cfg.dtype]

    @property
    @abc.abstractmethod
    def budget(self) -> int:
        """Tokens of a micro-batch."""

    @property
    @abc.abstractmethod
    def responses(self) -> int | None:
        """Responses of a record; None where the recipe doesn't determine their number."""

    @abc.abstractmethod
    def record(self, prompt: int, responses: Sequence[int]) -> RecordT:
        """A record of these lengths."""

    @abc.abstractmethod
    def microbatches(
        self, records: Sequence[RecordT], num_ranks: int
    ) -> list[list[PlannedMicrobatch[RecordT]]]:
        """[micro-batch][rank]: those of a step, in the order in which they are computed."""

    @abc.abstractmethod
    def forward(
        self, decoder: TransformerDecoder, records: Sequence[RecordT], world: World
    ) -> Callable[[], None]:
        """Run a micro-batch's forward and loss; returns a function that runs its backward."""

    @functools.cached_property
    def pair_cost(self) -> float:
        """`models.decoders.pair_cost` of the model."""
        return pair_cost(self.build())

    def build(self) -> TransformerDecoder:
        """The model as the recipe builds it, on the meta device."""
        return build_decoder(
            self.cfg.model,
            self.dtype,
            checkpointer=self.cfg.checkpointer,
            param_dtype=self.param_dtype,
            num_attributes=self.num_attributes,
        )

    @property
    def num_attributes(self) -> int | None:
        """Of an attribute model; None of a language model."""
        return None

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        lr = self.cfg.optimizer.get("lr", self.cfg.lr)
        return instantiate(self.cfg.optimizer, parameters, lr=lr)

    def largest_microbatch(
        self, microbatches: Sequence[Sequence[PlannedMicrobatch[RecordT]]]
    ) -> PlannedMicrobatch[RecordT]:
        """The largest micro-batch, lengthened to the token budget, which other data could fill.

        Args:
            microbatches: [micro-batch][rank].
        """
        each = [microbatch for ranks in microbatches for microbatch in ranks]
        largest = max(each, key=lambda microbatch: (microbatch.trains, microbatch.num_tokens))
        missing = self.budget - largest.num_tokens
        sliced = any(not microbatch.trains for microbatch in each)
        if missing <= 0 or sliced:
            return largest
        *others, last = largest.records
        return PlannedMicrobatch([*others, self._lengthened(last, missing)])

    @abc.abstractmethod
    def _lengthened(self, record: RecordT, tokens: int) -> RecordT: ...


class SteerLM2Job(Job[Group]):
    recipe = "steerlm2_distributed"
    record_name = "prompts"
    budget_key = "steerlm2.max_tokens_per_microbatch"
    responses = None

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.options = cfg.steerlm2
        self.loss_fn = build_loss(cfg.loss, cfg.steerlm2.normalize)

    @property
    def budget(self) -> int:
        return self.options.max_tokens_per_microbatch

    def record(self, prompt: int, responses: Sequence[int]) -> Group:
        return _with_targets(Group(range(prompt), [range(length) for length in responses]))

    def microbatches(
        self, records: Sequence[Group], num_ranks: int
    ) -> list[list[PlannedMicrobatch[Group]]]:
        options = self.options
        ranks = []
        for rank in range(num_ranks):
            plan = plan_step(
                records,
                rank=rank,
                num_ranks=num_ranks,
                strategy=options.strategy,
                max_tokens_per_microbatch=self.budget,
                micro_batch_size=options.micro_batch_size,
                forward_micro_batch_size=options.forward_micro_batch_size,
                pair_cost=self.pair_cost,
            )
            first = slices(plan.two_pass, options.forward_micro_batch_size)
            second = slices(plan.two_pass, options.micro_batch_size)
            forward = [PlannedMicrobatch([part], trains=False) for part in first]
            forward += [PlannedMicrobatch([], trains=False)] * (plan.num_no_grad - len(forward))
            backward = [PlannedMicrobatch([_with_targets(part)]) for part in second]
            backward += [PlannedMicrobatch(groups) for groups in plan.single_pass]
            backward += [PlannedMicrobatch([])] * (plan.num_backward - len(backward))
            ranks.append(forward + backward)
        return [list(of_ranks) for of_ranks in zip(*ranks, strict=True)]

    def forward(
        self, decoder: TransformerDecoder, records: Sequence[Group], world: World
    ) -> Callable[[], None]:
        batch = pack(records, multiple_of=world.padding_multiple).to(world.device)
        logps_N = response_logps(decoder, batch, world)
        leaf_N = logps_N.detach().requires_grad_()
        assert batch.log_q_N is not None
        assert batch.w_N is not None
        loss = self.loss_fn(
            leaf_N, batch.log_q_N, batch.w_N, batch.sizes_G, batch.response_lengths_N
        )
        grad_N = torch.autograd.grad(loss, leaf_N)[0]
        return lambda: logps_N.backward(grad_N * world.dp_size)

    def _lengthened(self, record: Group, tokens: int) -> Group:
        *others, last = record.responses
        responses = [*others, range(len(last) + tokens)]
        return dataclasses.replace(record, responses=responses)


class SFTJob(Job[Dialogue]):
    recipe = "sft_distributed"
    record_name = "conversations"
    budget_key = "max_tokens_per_microbatch"
    responses = 1

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._budget: int = cfg.max_tokens_per_microbatch

    @property
    def budget(self) -> int:
        return self._budget

    def record(self, prompt: int, responses: Sequence[int]) -> Dialogue:
        length = prompt + sum(responses)
        return Dialogue(range(length), range(prompt, length))

    def microbatches(
        self, records: Sequence[Dialogue], num_ranks: int
    ) -> list[list[PlannedMicrobatch[Dialogue]]]:
        return _by_microbatch(microbatches_by_rank(records, num_ranks, self.budget, self.pair_cost))

    def forward(
        self, decoder: TransformerDecoder, records: Sequence[Dialogue], world: World
    ) -> Callable[[], None]:
        batch = pack_dialogues(records, multiple_of=world.padding_multiple).to(world.device)
        logps_R = target_logps(decoder, batch, world)
        loss = -logps_R.double().sum() / max(len(batch.targets_R), 1)
        return (loss * world.dp_size).backward

    def _lengthened(self, record: Dialogue, tokens: int) -> Dialogue:
        length = len(record.tokens) + tokens
        return Dialogue(range(length), range(record.target_positions[0], length))


class RewardJob(Job[RewardGroup]):
    recipe = "reward_distributed"
    record_name = "texts"
    budget_key = "max_tokens_per_microbatch"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.schema = as_schema(cfg.schema)
        self.loss = cfg.loss
        self._budget: int = cfg.max_tokens_per_microbatch

    @property
    def budget(self) -> int:
        return self._budget

    @property
    def responses(self) -> int:
        return 1 if self.loss == "regression" else 2

    def record(self, prompt: int, responses: Sequence[int]) -> RewardGroup:
        texts = [range(length) for length in responses]
        if self.loss != "regression":
            return RewardGroup(range(prompt), texts, strength=1.0)
        labels = [[0.0] * len(self.schema.names)] * len(texts)
        return RewardGroup(range(prompt), texts, labels=labels)

    def microbatches(
        self, records: Sequence[RewardGroup], num_ranks: int
    ) -> list[list[PlannedMicrobatch[RewardGroup]]]:
        return _by_microbatch(microbatches_by_rank(records, num_ranks, self.budget, self.pair_cost))

    def forward(
        self, decoder: TransformerDecoder, records: Sequence[RewardGroup], world: World
    ) -> Callable[[], None]:
        batch = pack_for_reward(records, multiple_of=world.padding_multiple).to(world.device)
        scores_NA = attribute_scores(decoder, batch)
        if self.loss == "regression":
            assert batch.labels_NA is not None
            loss = squared_error_sum(scores_NA, batch.labels_NA)
        else:
            assert batch.strength_G is not None
            loss = bradley_terry_sum(scores_NA[:, 0], batch.strength_G, self.loss)
        return (loss * world.dp_size).backward

    @property
    def num_attributes(self) -> int:
        return len(self.schema.names)

    def _lengthened(self, record: RewardGroup, tokens: int) -> RewardGroup:
        *others, last = record.responses
        responses = [*others, range(len(last) + tokens)]
        return dataclasses.replace(record, responses=responses)


JOBS: dict[str, type[Job[Any]]] = {job.recipe: job for job in (SteerLM2Job, SFTJob, RewardJob)}


def _with_targets(group: Group) -> Group:
    n = len(group.responses)
    return dataclasses.replace(group, log_q=[0.0] * n, weights=[1 / n] * n)


def _by_microbatch(
    ranks: list[list[list[RecordT]]],
) -> list[list[PlannedMicrobatch[RecordT]]]:
    """[micro-batch][rank] from [rank][micro-batch]."""
    return [
        [PlannedMicrobatch(records) for records in of_ranks]
        for of_ranks in zip(*ranks, strict=True)
    ]
