"""Prepare training data: read sources, split, merge and repeat their records, write them as JSONL.

    tune run prepare_data --config data/oasst output_dir=DIR

The `builder` of a source is the function that reads it; steerlm2/data/sources holds ours, and any
other function works too. What it yields decides what is written:

    SteerLM2 records        train.jsonl and val.jsonl
    units of conversations  train.jsonl and val.jsonl (conversation format), train_reg.jsonl and
                            val_reg.jsonl (regression format, a line for each labelled turn)

Beside a file whose labels have a `schema` of their own FILE.settings.json says it: whoever trains
on FILE needn't say it again.

Contents that spell a marker of the regression format are in the conversation files only.

Records are kept in a temporary file until they are written in their order; only their offsets are
in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerlm2.attributes import AttributeSchema, as_schema, read_label
from steerlm2.config.keys import (
    OutputsKeys,
    SchemaKeys,
    at_least_one,
    outputs_problems,
    schema_problems,
    settings_of,
)
from steerlm2.config.loader import Component, instantiate
from steerlm2.data.conversations import (
    REGRESSION_MARKERS,
    Conversation,
    conversation_to_json,
    has_broken_answer,
    regression_records,
    spells_marker,
)
from steerlm2.data.jsonl import LineProblems, json_line, shortened
from steerlm2.data.records import BROKEN, USER, Record, record_to_json
from steerlm2.data.settings import settings_file
from steerlm2.data.sources.base import SplitRecord, Unit
from steerlm2.data.sources.helpsteer import strengths_of
from steerlm2.data.spool import Spool, open_spool
from steerlm2.files import replace_durably, write_durably
from steerlm2.runs.entry import recipe_main
from steerlm2.runs.logs import show_warnings, tell

FILES = {
    "train": {"": "train.jsonl", "regression": "train_reg.jsonl"},
    "val": {"": "val.jsonl", "regression": "val_reg.jsonl"},
}


@dataclass(kw_only=True)
class SourceConfig:
    """A source, and what becomes of its records."""

    source: str
    """What the builder reads: a file, a folder, or a data set's name on the hub."""
    builder: Component
    """Function that yields SteerLM2 records or units of conversations; steerlm2.data.sources has
    them."""
    only_helpfulness: bool | None = None
    """For builders that have it: labels with no other attribute; null: as the builder has it."""
    preference: bool | None = None
    """For builders that have it: pairs with a preference; null: as the builder has it."""
    train_fraction: float | None = 0.95
    """Share of the records for train.jsonl, drawn from `seed`; null: the source's own split."""
    own_split: bool = False
    """Keep the split of a source that has validation data; `train_fraction` is for others."""
    split_by: Literal["prompt", "record"] = "prompt"
    """What `train_fraction` keeps on one side: all records whose conversations begin alike, or a
    record alone, as NeMo-Aligner's scripts do."""
    sample_fraction: float = 1.0
    """Share of each split to keep, drawn."""
    repeat: int = 1
    """How many times the training records are written."""

    def source_problems(self, where: str = "") -> Iterator[str]:
        for name in ("train_fraction", "sample_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                yield f"'{where}{name}' must be above 0 and at most 1, got {value}"
        yield from at_least_one(self, "repeat", section=where)
        for name in self.options():
            if name in self.builder:
                yield f"'{where}builder.{name}' is taken from '{where}{name}': set that"

    def options(self) -> dict[str, bool]:
        """The arguments of the builder."""
        given = {"only_helpfulness": self.only_helpfulness, "preference": self.preference}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(kw_only=True)
class PrepareDataConfig(SchemaKeys, OutputsKeys, SourceConfig):
    """The keys of prepare_data: those of the first source, and those of the output."""

    output_dir: str
    """Folder of train.jsonl and val.jsonl."""
    merge: dict[str, SourceConfig] = field(default_factory=dict)
    """More sources, by any name."""
    seed: int = 0
    """Of the order of the records, their split, and what is sampled."""

    def problems(self) -> list[str]:
        problems = [*self.source_problems(), *schema_problems(self.schema)]
        problems += outputs_problems(self)
        for name, source in self.merge.items():
            problems += source.source_problems(f"merge.{name}.")
        return problems


@recipe_main(PrepareDataConfig)
def main(cfg: PrepareDataConfig) -> None:
    show_warnings()
    output_dir = Path(cfg.output_dir)
    sources = [cfg, *cfg.merge.values()]
    with open_spool(_existing_parent(output_dir)) as spool:
        sides: Sides = {}
        schema = as_schema(cfg.schema)
        splits = [_read(source, spool, schema, cfg.seed, sides) for source in sources]
        if len({split.kind for split in splits}) > 1:
            raise ValueError("sources of conversations can't be merged with sources of groups")
        train, val = array("Q"), array("Q")
        for epoch in range(max(source.repeat for source in sources)):
            for source, split in zip(sources, splits, strict=True):
                if epoch < source.repeat:
                    train.extend(split.train)
        for split in splits:
            val.extend(split.val)
        kind = splits[0].kind
        counted = "answers" if kind is Record else "labelled"
        settings = settings_of(cfg, ["schema"])
        tallies = _write(output_dir, {"train": train, "val": val}, spool, counted, settings)

    if kind is Record:
        train_file = (output_dir / "train.jsonl").absolute()
        recipe = "score_responses" if tallies["train"].answers else "sample_responses"
        tell(f"\nNext: run the recipe {recipe} on {train_file}")


class SpooledSplit(NamedTuple):
    """The records of a source, as offsets in the spool."""

    train: array[int]
    val: array[int]
    kind: type


class Spooled(NamedTuple):
    """What is spooled of a record or unit."""

    answers: list[int]
    """Of each of its records, the number of labelled turns or responses."""
    lines: dict[str, bytes]
    """Its lines for each of the output files."""
    unheld: list[int]
    """The places of those of its conversations that the regression format can't hold. None of the
    unit is in the regression file then: its readers take two adjacent lines for a pair."""


Sides = dict[int, bool]
"""Prompt -> whether it is for training, of all sources so far."""


def _read(
    source: SourceConfig, spool: Spool, schema: AttributeSchema, seed: int, sides: Sides
) -> SpooledSplit:
    """Spool a source's records; shuffle, split and sample their offsets."""
    offsets = {split: array("Q") for split in ("train", "validation", None)}
    prompts = {split: array("Q") for split in offsets}
    problems = LineProblems(source.source, numbered=", record ")
    kind: type = Record
    num_records = num_broken = 0
    for number, item in enumerate(
        instantiate(source.builder, source.source, **source.options()), start=1
    ):
        kind = Record if isinstance(item, Record) else type(item)
        split = item.split if isinstance(item, Unit | SplitRecord) else None
        if isinstance(item, Unit):
            num_broken += _leave_out_broken(item)
        try:
            spooled = _render(item, schema)
        except ValueError as error:
            problems.add(number, error)
            continue
        offsets[split].append(spool.add(tuple(spooled)))
        prompts[split].append(_prompt_digest(item, number))
        num_records += len(spooled.answers)
    problems.raise_if_any()
    if num_broken:
        tell(
            f"{source.source}: left out {num_broken} conversations with U+FFFD in an answer, "
            f"which is {BROKEN}"
        )
    if not num_records:
        raise ValueError(
            f"{source.source} gave no records: is it the kind of file that the builder reads?"
        )

    rng = random.Random(seed)
    if source.train_fraction is None or (source.own_split and offsets["validation"]):
        train, val = offsets["train"] + offsets[None], offsets["validation"]
        _note_shared_prompts(source, prompts, sides)
    else:
        if offsets["train"] and offsets["validation"]:
            tell(
                f"{source.source}: its own split, {len(offsets['train'])} and "
                f"{len(offsets['validation'])} records, isn't kept (own_split=true keeps it)"
            )
        pooled = offsets["train"] + offsets["validation"] + offsets[None]
        pooled_prompts = prompts["train"] + prompts["validation"] + prompts[None]
        order = list(range(len(pooled)))
        rng.shuffle(order)
        num_train = max(1, int(len(pooled) * source.train_fraction))
        if source.split_by == "prompt":
            for_training = _by_prompt([pooled_prompts[i] for i in order], num_train, sides)
        else:
            for_training = [place < num_train for place in range(len(order))]
        train = array("Q", (pooled[i] for i, ours in zip(order, for_training, strict=True) if ours))
        val = array(
            "Q", (pooled[i] for i, ours in zip(order, for_training, strict=True) if not ours)
        )
        if num_train < len(pooled) and not (train and val):
            tell(f"{source.source}: all on one side, because its records have one prompt")
    if source.sample_fraction < 1:
        train, val = (_sample(split, source.sample_fraction, rng) for split in (train, val))
    return SpooledSplit(train, val, kind)


def _leave_out_broken(unit: Unit) -> int:
    """Drop the conversations with a broken answer; of a pair, both. Their number."""
    before = len(unit.conversations)
    whole = [each for each in unit.conversations if not has_broken_answer(each)]
    unit.conversations = [] if unit.is_pair and len(whole) < before else whole
    return before - len(unit.conversations)


def _prompt_digest(item: Any, number: int) -> int:
    """Of what a conversation begins with, up to the user's first turn: threads of a tree share it.

    Args:
        number: an empty unit has a digest of its own.
    """
    if isinstance(item, Record):
        turns = item.prompt_turns
    else:
        turns = item.conversations[0].turns if item.conversations else []
    first = next((i for i, turn in enumerate(turns) if turn.role == USER), len(turns))
    texts = [turn.value.strip() for turn in turns[: first + 1]] or [f"number {number}"]
    digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=8, person=b"prompt")
    return int.from_bytes(digest.digest(), "big")


def _by_prompt(prompts: list[int], num_train: int, sides: Sides) -> list[bool]:
    """Whether each record is for training: as many whole prompts as fit, in their order.

    Args:
        prompts: of each record.
        num_train: the number of records wanted for training.
        sides: those of earlier sources stay as they are; gets those of these prompts.
    """
    sizes = Counter(prompts)
    room = num_train - sum(size for prompt, size in sizes.items() if sides.get(prompt))
    for prompt, size in sizes.items():
        if prompt in sides:
            continue
        sides[prompt] = size <= room or room == num_train
        room -= size * sides[prompt]
    return [sides[prompt] for prompt in prompts]


def _note_shared_prompts(
    source: SourceConfig, prompts: Mapping[str | None, array[int]], sides: Sides
) -> None:
    """Say how many records a source's own split has on the other side than their prompt's first."""
    num_shared = 0
    for split, ours in ((None, True), ("train", True), ("validation", False)):
        for prompt in prompts[split]:
            num_shared += sides.setdefault(prompt, ours) != ours
    if num_shared:
        tell(
            f"{source.source}: {num_shared} records have a prompt that the other side of the split "
            "has too (the source's own split; a train_fraction splits by prompt)"
        )


def _render(item: Any, schema: AttributeSchema) -> Spooled:
    if isinstance(item, Record):
        return Spooled([len(item.responses)], {"": json_line(record_to_json(item))}, [])
    if not isinstance(item, Unit):
        raise ValueError(f"the builder must give records or units, not {type(item).__name__}")
    schema = strengths_of(schema) if item.is_pair else schema
    conversations = [_with_labels_of(schema, each) for each in item.conversations]
    labelled = [
        [json_line(record) for record in regression_records(each, schema)] for each in conversations
    ]
    unheld = [
        place
        for place, each in enumerate(conversations)
        if labelled[place] and not item.as_published and spells_marker(each)
    ]
    regression = b"" if unheld else b"".join(itertools.chain(*labelled))
    together = b"".join(json_line(conversation_to_json(each)) for each in conversations)
    lines = {"": together, "regression": regression}
    return Spooled([len(each) for each in labelled], lines, unheld)


def _with_labels_of(schema: AttributeSchema, conversation: Conversation) -> Conversation:
    """The conversation with its labels in the order of the schema; they must be of it."""
    turns = [
        dataclasses.replace(turn, label=turn.label and read_label(turn.label, schema))
        for turn in conversation.turns
    ]
    return dataclasses.replace(conversation, turns=turns)


def _sample(offsets: array[int], fraction: float, rng: random.Random) -> array[int]:
    """A random share of the offsets (at least one, if there are any), in their order."""
    number = min(len(offsets), max(1, round(len(offsets) * fraction)))
    return array("Q", (offsets[i] for i in sorted(rng.sample(range(len(offsets)), number))))


@dataclass
class _Tally:
    """Counts of a split."""

    records: int = 0
    answers: int = 0
    fewest: int | None = None
    most: int = 0
    num_unheld: int = 0
    """Labelled turns that the regression file lacks."""
    unheld: list[int] = field(default_factory=list)
    """The lines of the conversations because of which it lacks them."""

    def add(self, answers: int) -> None:
        self.records += 1
        self.answers += answers
        self.fewest = answers if self.fewest is None else min(self.fewest, answers)
        self.most = max(self.most, answers)


def _write(
    output_dir: Path,
    splits: dict[str, array[int]],
    spool: Spool,
    counted: str,
    settings: dict[str, Any],
) -> dict[str, _Tally]:
    """Write the files, rename them when all are complete, and print their counts.

    Args:
        counted: the word for what is counted of a record: its answers, or those with a label.
        settings: go beside each file, where there are any.

    Raises:
        ValueError: where the folder was removed meanwhile.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    temporaries = {
        name: output_dir / f".{name}.{os.getpid()}.tmp"
        for names in FILES.values()
        for name in names.values()
    }
    try:
        tallies = {
            split: _write_split(
                offsets, {kind: temporaries[name] for kind, name in FILES[split].items()}, spool
            )
            for split, offsets in splits.items()
        }
        tell(f"{'file':<15} {'records':>8} {counted:>8} {'per record':>11}")
        for split, tally in tallies.items():
            for kind, name in FILES[split].items():
                beside = settings_file(output_dir / name)
                beside.unlink(missing_ok=True)  # an earlier run's
                if temporaries[name].stat().st_size:
                    if any(settings.values()):
                        write_durably(beside, json.dumps(settings, indent=2) + "\n")
                    replace_durably(temporaries[name], output_dir / name)
                    tell(f"{name:<15} {_table_row(kind, tally)}")
                elif (output_dir / name).exists():
                    # An earlier run's validation records may be training records now.
                    (output_dir / name).unlink()
                    tell(f"{name:<15} removed: left by an earlier run, this one has none")
            if tally.num_unheld:
                tell(_unheld_text(FILES[split][""], FILES[split]["regression"], tally))
    except FileNotFoundError as error:
        raise ValueError(
            f"{output_dir.absolute()} was removed or replaced while the run wrote into it: start "
            "the run again"
        ) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    return tallies


def _write_split(offsets: array[int], paths: dict[str, Path], spool: Spool) -> _Tally:
    tally = _Tally()
    with contextlib.ExitStack() as stack:
        files = {kind: stack.enter_context(open(path, "wb")) for kind, path in paths.items()}
        for offset in offsets:
            answers, lines, unheld = spool.read(offset)
            if unheld:
                tally.num_unheld += sum(answers)
                tally.unheld += [tally.records + 1 + place for place in unheld]
            for number in answers:
                tally.add(number)
            for kind, text in lines.items():
                files[kind].write(text)
    return tally


def _table_row(kind: str, tally: _Tally) -> str:
    if kind == "regression":
        return f"{tally.answers - tally.num_unheld:>8}"
    return f"{tally.records:>8} {tally.answers:>8} {f'{tally.fewest} to {tally.most}':>11}"


def _unheld_text(name: str, regression_name: str, tally: _Tally) -> str:
    lines = ", ".join(shortened([str(line) for line in tally.unheld]))
    return (
        f"{regression_name}: left out {tally.num_unheld} labelled turns, because contents spell "
        f"{', '.join(REGRESSION_MARKERS)}, which that format takes for its own ({name} has them, "
        f"in lines {lines}): train attribute models on {name}"
    )


def _existing_parent(folder: Path) -> Path:
    """The folder, or the nearest existing folder above it, for the spool.

    It is on the disk of the output, which has enough space, and no folder is made if there turns
    out to be nothing to write.
    """
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


if __name__ == "__main__":
    main()
