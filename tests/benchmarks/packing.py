"""Padding and imbalance of packed micro-batches, on real groups and on a long-tailed distribution.

    python tests/benchmarks/packing.py --oasst oasst2_trees.jsonl.gz --json FILE

Steps of `--groups` prompts are spread over `--ranks` ranks and packed up to `--max-tokens`, in the
order in which training would see them. For each distribution:

    padding            tokens that belong to no group, as a share of all that are computed: empty
                       empty micro-batches of ranks with fewer, and filling up to a multiple of
                       `--multiple-of` (the tensor-parallel degree)
    of padded rows     the same share if every response were a row, padded to the step's longest
    rank imbalance     the busiest rank's cost above the average one's; mean and worst step
    lock-step          the same if ranks wait for each other in every micro-batch, as FSDP does
    fill               tokens of a micro-batch as a share of the budget, over all but each rank's
                       last

Costs are estimated, linear and quadratic term, for a model of Llama 3.1's 8B size. Open Assistant
groups have 2 to 4 answers and are few, so a step holds all of them unless `--groups` is lower; they
are tokenised as UTF-8 bytes or nearly so, about 3 to 4 tokens where Llama has one. The
HelpSteer2-like distribution is log-normal: prompts of 180 tokens on average (at most 4,000), n=10
responses of 370 (at most 2,000).

For Open Assistant also: the tokens saved if all groups of a conversation shared their prefixes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerlm2.data.packing import Group, pack
from steerlm2.data.sources.oasst import oasst_groups
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.datasets.groups import tokenize_records
from steerlm2.training.batches import batch_of_step, steps_per_epoch
from steerlm2.training.step_plan import costs_of, plan_step

PAIR_COST = 2 * 32 * 4096 / 6.98e9
"""`models.decoders.pair_cost` of Llama 3.1 8B: 32 layers with 6.98e9 weights, 32 heads of 128."""


def helpsteer2_like(count: int) -> list[Group]:
    generator = random.Random(0)

    def tokens(mean: float, spread: float, most: int) -> list[int]:
        length = generator.lognormvariate(math.log(mean) - spread**2 / 2, spread)
        return [0] * min(max(round(length), 2), most)

    return [
        Group(tokens(180, 1.0, 4000), [tokens(370, 0.7, 2000) for _ in range(10)], index)
        for index in range(count)
    ]


def oasst(path: str) -> list[Group]:
    records = list(oasst_groups(path))
    return tokenize_records(records, tiny_tokenizer(), None, 16_384, path).groups


def measure(groups: list[Group], args: argparse.Namespace) -> dict[str, Any]:
    """Over one pass through the groups."""
    size = min(args.groups, len(groups))
    computed = needed = unshared = padded = 0
    imbalances, lock_step, fills = [], [], []
    for step in range(steps_per_epoch(len(groups), size)):
        batch = [groups[i] for i in batch_of_step(step, len(groups), size, seed=0)]
        if len(batch) < size:
            continue
        plans = [
            plan_step(
                batch,
                rank=rank,
                num_ranks=args.ranks,
                strategy="single_pass",
                max_tokens_per_microbatch=args.max_tokens,
                micro_batch_size=1,
                forward_micro_batch_size=1,
                pair_cost=PAIR_COST,
            )
            for rank in range(args.ranks)
        ]
        imbalances.append(plans[0].imbalance)
        microbatches = [
            plan.single_pass + [[]] * (plan.num_backward - len(plan.single_pass)) for plan in plans
        ]
        computed += sum(
            _packed_tokens(each, args.multiple_of) for own in microbatches for each in own
        )
        needed += sum(group.num_tokens for group in batch)
        longest = max(len(g.prompt) + max(map(len, g.responses)) for g in batch)
        padded += sum(longest * len(group.responses) for group in batch)
        unshared += sum(len(g.prompt) + len(r) for g in batch for r in g.responses)
        costs = [[sum(costs_of(each, PAIR_COST)) for each in own] for own in microbatches]
        together = sum(max(each) for each in zip(*costs, strict=True))
        lock_step.append(together * args.ranks / sum(map(sum, costs)) - 1)
        fills += [
            sum(group.num_tokens for group in each) / args.max_tokens
            for plan in plans
            for each in plan.single_pass[:-1]
        ]
    return {
        "groups": len(groups),
        "steps": len(imbalances),
        "prompt_tokens": statistics.mean(len(group.prompt) for group in groups),
        "response_tokens": statistics.mean(len(r) for g in groups for r in g.responses),
        "unshared_tokens_per_packed_token": unshared / needed,
        "padding": 1 - needed / computed,
        "padding_of_padded_rows": 1 - unshared / padded,
        "rank_imbalance": statistics.mean(imbalances),
        "worst_rank_imbalance": max(imbalances),
        "lock_step_imbalance": statistics.mean(lock_step),
        "fill": statistics.mean(fills) if fills else None,
    }


def _packed_tokens(groups: list[Group], multiple_of: int) -> int:
    return len(pack(groups, multiple_of=multiple_of).tokens_T)


def shared_prefixes(groups: Sequence[Group]) -> dict[str, float]:
    """What a tree over all groups of a conversation would save, of all packed tokens.

    Distinct prefixes are what a tree computes; prompts come in full once per group otherwise. What
    all groups begin with, the system prompt, is counted by itself.
    """
    first, last = min(group.prompt for group in groups), max(group.prompt for group in groups)
    common = next(i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1)
    nodes = {
        (*group.prompt, *response)[:end]
        for group in groups
        for response in group.responses
        for end in range(1, len(group.prompt) + len(response))
    }
    packed = sum(group.num_tokens for group in groups)
    by_system_prompt = common * (len(groups) - 1) / packed
    return {
        "packed_tokens": packed,
        "saved_by_conversations": 1 - len(nodes) / packed - by_system_prompt,
        "saved_by_system_prompt": by_system_prompt,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oasst", help="tree export; without it only the other distribution")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--groups", type=int, default=128, help="prompts of a step")
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--multiple-of", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {"helpsteer2-like": helpsteer2_like(2048)}
    if args.oasst:
        found["oasst"] = oasst(args.oasst)
    results: dict[str, Any] = {name: measure(groups, args) for name, groups in found.items()}
    keys = list(next(iter(results.values())))
    print(f"| | {' | '.join(results)} |\n|---{'|---' * len(results)}|")
    for key in keys:
        values = [result[key] for result in results.values()]
        print(f"| {key} | {' | '.join('-' if v is None else f'{v:.4g}' for v in values)} |")
    if args.oasst:
        results["prefix_sharing"] = shared_prefixes(found["oasst"])
        print(f"\nprefixes shared across groups of a conversation: {results['prefix_sharing']}")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "oasst")}
        args.json.write_text(json.dumps({"settings": settings, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
