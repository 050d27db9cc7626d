"""annotate_attributes from its command line: its labels and scores, kills in between, mistakes."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

import annotate_attributes
from annotate_attributes import AttributeSchema, ConversationFormat
from processes import ranks_with_logs, stopped_until_named
from ready_made import recipe_config
from steerlm2.attributes import beta_log_prob, parse_label
from steerlm2.data.jsonl import json_line
from steerlm2.data.records import Turn
from steerlm2.data.templates import encode_segments, extra_id_template
from steerlm2.data.tokenizers import tiny_tokenizer

Json = dict[str, Any]

NAMES = ("humor", "verbosity")
LOG_P = "log(P(a|x,y))"
SLICE = 8
"""records_per_write: 1,000 conversations are 125 slices."""

WORDS = ["a", "the", "of", "and", "is", "to", "it", "has", "you", "for", "this", "capital", "good"]
OLD_LABELS = ("", None, "humor:0", "quality:4,humor:1", "whatever was here")


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most))) + rng.choice(["", "!", "!!!"])


def conversation(rng: random.Random) -> Json:
    """One or two exchanges, of which most answers have a label, with keys of the user's own."""
    turns: list[Json] = []
    for _ in range(rng.choice([1, 1, 2])):
        turns.append({"value": words(rng, 8), "from": "User", "label": None})
        answer = {"from": "Assistant", "id": rng.random(), "value": words(rng, 30)}
        turns.append(answer | ({"label": rng.choice(OLD_LABELS)} if rng.random() < 0.8 else {}))
    return {"lang": "é", "conversations": turns, "system": words(rng, 3), "type": "VALUE_TO_TEXT"}


def write_jsonl(path: Path, rows: list[Json]) -> Path:
    path.write_bytes(b"".join(json_line(row) for row in rows))
    return path


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("annotate") / "conversations.jsonl"
    return write_jsonl(path, [conversation(rng) for _ in range(1000)])


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 SteerLM2 records of 1 to 4 responses, every third without a label; some are annotated."""
    rng = random.Random(1)
    records: list[Json] = [
        {
            "system": words(rng, 3),
            "prompt_turns": [{"from": "User", "value": words(rng, 8)}],
            "label": None if i % 3 == 0 else f"verbosity:{i % 5}" + ",humor:2" * (i % 2),
            "responses": [
                {"from": "Assistant", "value": words(rng, 30), "log(P(y|x))": -3.0, "mine": n}
                | ({"scores": {"quality": 1}, LOG_P: 0.5} if n == 0 and i % 3 else {})
                for n in range(1 + i % 4)
            ],
            "source": "test",
        }
        for i in range(60)
    ]
    return write_jsonl(tmp_path_factory.mktemp("annotate") / "groups.jsonl", records)


def arguments(source: Path, output: Path, model: Path | None, *more: str) -> list[str]:
    checkpointer = "steerlm2.checkpoints.HFCheckpointer"
    weights = [
        f"checkpointer._component_={checkpointer}",
        f"checkpointer.checkpoint_dir={model}",
    ]
    return [
        *("annotate_attributes", "--config", "tiny/annotate_attributes", f"input={source}"),
        *(f"output={output}", f"records_per_write={SLICE}", *(weights if model else []), *more),
    ]


def run_here(source: Path, output: Path, model: Path | None, *more: str) -> None:
    """The recipe in this process."""
    name, _, config, *overrides = arguments(source, output, model, *more)
    recipe = annotate_attributes.AnnotateRecipe(recipe_config(name, config, *overrides))
    recipe.setup()
    recipe.annotate()


@pytest.fixture(scope="module")
def labelled_run(tune_command: Any, conversations: Path, attribute_model: Path) -> tuple[Path, str]:
    """An uninterrupted run on one process: its output file and what it printed."""
    output = conversations.with_name("labelled.jsonl")
    return output, tune_command(*arguments(conversations, output, attribute_model)).stdout


@pytest.fixture(scope="module")
def labelled(labelled_run: tuple[Path, str]) -> Path:
    return labelled_run[0]


@pytest.fixture(scope="module")
def scored(groups: Path, attribute_model: Path) -> Path:
    output = groups.with_name("scored.jsonl")
    run_here(groups, output, attribute_model)
    return output


class Reference:
    """transformers' own LlamaForSequenceClassification, asked for one text at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def scores(self, system: str, turns: list[Json], response: str) -> list[float]:
        template = extra_id_template()
        bare = [Turn(turn["from"], turn["value"]) for turn in turns]
        segments = template.prompt(system, bare, None) + template.scored_response(response)
        ids = encode_segments(segments, tiny_tokenizer())
        return self.model(torch.tensor([ids])).logits[0].tolist()


@pytest.fixture(scope="module")
def reference(attribute_model: Path) -> Reference:
    return Reference(attribute_model)


def expected_label(scores: list[float]) -> str:
    whole = [round(min(4.0, max(0.0, score))) for score in scores]
    return ",".join(f"{name}:{value}" for name, value in zip(NAMES, whole, strict=True))


def test_labels_are_the_models_rounded_scores(
    conversations: Path, labelled: Path, reference: Reference
) -> None:
    """Each turn's text is the conversation up to it, without labels, and nothing after it."""
    seen = set()
    rows = list(zip(read_jsonl(conversations), read_jsonl(labelled), strict=True))
    for before, after in rows[:100]:
        turns = before["conversations"]
        for i, turn in enumerate(turns):
            if turn["from"] == "Assistant" and "label" in turn:
                scores = reference.scores(before["system"], turns[:i], turn["value"])
                label = after["conversations"][i]["label"]
                assert label == expected_label(scores)
                seen.add(label)
    assert len(seen) >= 5


def test_nothing_but_labels_changes(conversations: Path, labelled: Path) -> None:
    """Byte for byte: with the new labels in it, an input object gives the output's very line."""
    lines = labelled.read_bytes().splitlines(keepends=True)
    num_labels = 0
    for before, line in zip(read_jsonl(conversations), lines, strict=True):
        after = json.loads(line)
        for turn, new in zip(before["conversations"], after["conversations"], strict=True):
            if turn["from"] == "Assistant" and "label" in turn:
                assert tuple(parse_label(new["label"])) == NAMES
                turn["label"] = new["label"]
                num_labels += 1
        assert json_line(before) == line
    assert num_labels > 1000


def test_both_files_of_a_folder_are_labelled(
    groups: Path, attribute_model: Path, tmp_path: Path
) -> None:
    """Each as by itself, with its settings beside it; what else is in the folder is left alone."""
    folder, output = tmp_path / "prepared", tmp_path / "labelled"
    folder.mkdir()
    whole = read_jsonl(groups)
    write_jsonl(folder / "train.jsonl", whole[:8])
    write_jsonl(folder / "val.jsonl", whole[8:12])
    write_jsonl(folder / "train_reg.jsonl", [{"text": "not read"}])
    run_here(folder, output, attribute_model)
    for name in ("train.jsonl", "val.jsonl"):
        run_here(folder / name, tmp_path / name, attribute_model)
        assert (output / name).read_text() == (tmp_path / name).read_text()
    assert sorted(path.name for path in output.glob("*.json*")) == [
        *("train.jsonl", "train.jsonl.settings.json"),
        *("val.jsonl", "val.jsonl.settings.json"),
    ]


def test_a_folder_has_files_to_label_and_is_written_to_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither train.jsonl nor val.jsonl"):
        run_here(tmp_path, tmp_path / "out", None)
    with pytest.raises(ValueError, match="'output' must be a folder"):
        run_here(tmp_path, tmp_path / "out.jsonl", None)


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(process: subprocess.Popen[str], partial: Path, lines: int) -> None:
    """SIGKILL for all its processes, once `partial` has so many whole lines."""
    deadline = time.monotonic() + 120
    while whole_lines(partial) < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def resumed(tune: Any, conversations: Path, attribute_model: Path) -> Path:
    """Killed at three random places, then run to its end."""
    output = conversations.with_name("resumed.jsonl")
    partial = output.with_name("resumed.jsonl.partial")
    for lines in sorted(random.Random(2).sample(range(1, 900), 3)):
        kill_at(tune.start(*arguments(conversations, output, attribute_model)), partial, lines)
        assert not output.exists()
        assert lines <= whole_lines(partial) < 1000
    tune(*arguments(conversations, output, attribute_model))
    return output


@pytest.mark.slow
def test_killed_three_times_equals_uninterrupted(labelled: Path, resumed: Path) -> None:
    """Nothing lost, nothing labelled twice, in input order."""
    assert resumed.read_bytes() == labelled.read_bytes()
    assert not resumed.with_name("resumed.jsonl.partial").exists()


def test_responses_get_scores_and_the_beta_log_prob(
    groups: Path, scored: Path, reference: Reference
) -> None:
    """log P(a|x,y) = sum of log P(a_k | score_k) over what the label names; all else is kept."""
    for before, after in zip(read_jsonl(groups), read_jsonl(scored), strict=True):
        label = parse_label(before["label"]) if before["label"] else {}
        for response, new in zip(before["responses"], after["responses"], strict=True):
            scores = reference.scores(before["system"], before["prompt_turns"], response["value"])
            assert tuple(new["scores"]) == NAMES
            assert list(new["scores"].values()) == pytest.approx(scores, abs=1e-4)
            response["scores"] = new["scores"]
            if label:
                response[LOG_P] = new[LOG_P]
                log_p = sum(
                    beta_log_prob([[new["scores"][name]]], [[float(value)]]).item()
                    for name, value in label.items()
                )
                assert new[LOG_P] == pytest.approx(log_p, abs=1e-9)
        assert after == before
        assert any(LOG_P in response for response in after["responses"]) == bool(label)


def scores_in(path: Path) -> list[float]:
    rows = [response for record in read_jsonl(path) for response in record["responses"]]
    return [score for row in rows for score in row["scores"].values()]


@pytest.mark.parametrize("tensor_parallel_dim", [1, 2], ids=["FSDP2", "TP2"])
def test_two_ranks_give_the_same(
    tune: Any,
    groups: Path,
    scored: Path,
    attribute_model: Path,
    tmp_path: Path,
    tensor_parallel_dim: int,
) -> None:
    """And each leaves a log."""
    output = tmp_path / "scored.jsonl"
    layout = f"tensor_parallel_dim={tensor_parallel_dim}"
    tune(*arguments(groups, output, attribute_model, layout), nproc=2)
    assert scores_in(output) == pytest.approx(scores_in(scored), rel=0, abs=1e-4)
    assert ranks_with_logs(tmp_path) == [0, 1]


def test_a_stopped_rank_is_named_and_the_run_goes_on(
    tune: Any, groups: Path, tmp_path: Path
) -> None:
    many, output = tmp_path / "groups.jsonl", tmp_path / "scored.jsonl"
    many.write_bytes(groups.read_bytes() * 5)
    process = tune.start(*arguments(many, output, None, "hang_timeout_seconds=2"), nproc=2)
    stderr = stopped_until_named(process, tmp_path, "scored.jsonl.partial")
    assert re.search(r"rank 0 on \S+: record \d+, in ", stderr)


def test_all_turns_of_a_compressed_file(
    conversations: Path, labelled: Path, attribute_model: Path, tmp_path: Path
) -> None:
    """`turns: all` labels those without a label too, and the others as it did before."""
    source = tmp_path / "conversations.jsonl.gz"
    lines = conversations.read_bytes().splitlines(keepends=True)[:200]
    source.write_bytes(gzip.compress(b"".join(lines)))
    run_here(source, tmp_path / "all.jsonl", attribute_model, "turns=all")
    some = read_jsonl(labelled)[:200]
    num_new = 0
    for before, after in zip(some, read_jsonl(tmp_path / "all.jsonl"), strict=True):
        for turn, new in zip(before["conversations"], after["conversations"], strict=True):
            if turn["from"] == "Assistant" and "label" not in turn:
                assert tuple(parse_label(new["label"])) == NAMES
                num_new += 1
            else:
                assert new["label"] == turn["label"]
    assert num_new > 10


def test_a_long_text_loses_its_beginning_alone(
    attribute_model: Path, reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "ok" of 40 tokens fits with its prompt, the response beside it doesn't: its text loses the
    prompt, and the scores of "ok" are those that it has without that neighbour."""
    record = {
        "system": "is it",
        "prompt_turns": [{"from": "User", "value": "a the of"}],
        "label": "humor:2",
        "responses": [{"value": "ok"}, {"value": "good " * 50 + "!"}],
    }
    source = write_jsonl(tmp_path / "long.jsonl", [record])
    output = tmp_path / "scored.jsonl"
    run_here(source, output, attribute_model, "max_seq_len=40", "max_tokens_per_microbatch=40")
    assert "1 records, 2 texts scored (cut at the beginning, being too long: 1 texts)" in (
        capsys.readouterr().out
    )
    short, long = read_jsonl(output)[0]["responses"]
    prompt = ("is it", record["prompt_turns"])
    assert list(short["scores"].values()) == pytest.approx(
        reference.scores(*prompt, "ok"), abs=1e-4
    )
    assert list(long["scores"].values()) != pytest.approx(
        reference.scores(*prompt, long["value"]), abs=1e-3
    )


def test_other_settings_are_refused(
    conversations: Path, labelled: Path, attribute_model: Path
) -> None:
    before = labelled.read_bytes()
    with pytest.raises(ValueError, match=r"was begun with other settings \(turns, dtype\)"):
        run_here(conversations, labelled, attribute_model, "turns=all", "dtype=bf16")
    assert labelled.read_bytes() == before


def test_a_complete_output_is_left_as_it_is(
    conversations: Path, labelled: Path, attribute_model: Path
) -> None:
    before = labelled.stat()
    run_here(conversations, labelled, attribute_model)
    assert (labelled.stat().st_mtime_ns, labelled.stat().st_ino) == (
        before.st_mtime_ns,
        before.st_ino,
    )


TURN = {"from": "Assistant", "value": "a", "label": ""}
GOOD_CONVERSATION = json.dumps({"system": "", "conversations": [TURN]})
GOOD_RECORD: Json = {
    "system": "",
    "prompt_turns": [{"from": "User", "value": "a"}],
    "label": None,
    "responses": [{"value": "a"}],
}

# Labels drawn from P(a|x,y)


def server_labels(
    fake: Any, source: Path, output: Path, *more: str, slice_size: int = SLICE
) -> Path:
    options = (f"server.url={fake.url}", "max_seq_len=512", "labels=sampled", "server.retries=1")
    run_here(source, output, None, *options, f"records_per_write={slice_size}", *more)
    return output


def test_sampled_labels_have_the_probabilities_of_the_beta_rule() -> None:
    """500 records of 4 answers with the scores 1.3 and 2.6: P(a|x,y) = P(h | 1.3) P(v | 2.6).

    Labels of fewer than 5 expected draws are pooled, which leaves 7 cells (asserted). Chi-square of
    6 degrees of freedom: 22.5 is exceeded once in 1,000 times.
    """
    rng = random.Random(5)
    schema = AttributeSchema(NAMES)
    labelled = ConversationFormat(schema, "all", "sampled", 42, 24.0, "midpoint")
    drawn: list[str] = []
    for place in range(500):
        obj = {"conversations": [TURN | {"value": words(rng, 3)} for _ in range(4)]}
        labelled.annotate(obj, [[1.3, 2.6]] * 4, place)
        drawn += [turn["label"] for turn in obj["conversations"]]
    cells: dict[str, float] = {}
    for h in range(5):
        for v in range(5):
            n = 2000 * beta_log_prob([[1.3, 2.6]], [[h, v]]).sum().exp().item()
            cells[f"humor:{h},verbosity:{v}" if n >= 5 else "rare"] = n
    cells["rare"] = 2000 - sum(n for label, n in cells.items() if label != "rare")
    observed = {label: drawn.count(label) for label in cells}
    observed["rare"] = 2000 - sum(observed.values())
    assert len(cells) == 7
    assert sum((observed[label] - n) ** 2 / n for label, n in cells.items()) < 22.5


def test_sampled_labels_follow_from_the_seed_and_their_place(
    conversations: Path, fake_vllm: Any, tmp_path: Path
) -> None:
    """In slices of another size the same file; with another seed another one. The same answer has
    other labels elsewhere in the file, and a turn that gets a label of its own changes no other.
    """
    fake_vllm.scores = lambda ids: [1.5, 2.5]
    rows = read_jsonl(conversations)[:40]
    source = write_jsonl(tmp_path / "input.jsonl", rows + rows)
    one = server_labels(fake_vllm, source, tmp_path / "one.jsonl")
    other = server_labels(fake_vllm, source, tmp_path / "other.jsonl", slice_size=31)
    assert one.read_bytes() == other.read_bytes()
    again = server_labels(fake_vllm, source, tmp_path / "seed.jsonl", "seed=1")
    labels, reseeded = (list(new_labels(rows + rows, read_jsonl(f))) for f in (one, again))
    assert labels != reseeded
    assert labels[: len(labels) // 2] != labels[len(labels) // 2 :]
    every = server_labels(fake_vllm, source, tmp_path / "all.jsonl", "turns=all")
    assert list(new_labels(rows + rows, read_jsonl(every))) == labels


def test_sampled_labels_are_the_same_after_an_interruption(
    conversations: Path, fake_vllm: Any, tmp_path: Path
) -> None:
    """The server dies half-way; blank lines are no records."""
    source = tmp_path / "input.jsonl"
    source.write_text("\n\n".join(conversations.read_text().splitlines()[:100]) + "\n")
    expected = server_labels(fake_vllm, source, tmp_path / "uninterrupted.jsonl")
    output = tmp_path / "labelled.jsonl"
    num_texts = len(fake_vllm.texts)
    fake_vllm.dies_after = num_texts + num_texts // 2
    with pytest.raises(ConnectionError, match="doesn't answer"):
        server_labels(fake_vllm, source, output)
    assert 0 < whole_lines(output.with_name("labelled.jsonl.partial")) < 100
    fake_vllm.dies_after = None
    server_labels(fake_vllm, source, output)
    assert output.read_bytes() == expected.read_bytes()


def test_sampled_labels_of_two_ranks_are_those_of_one(
    tune: Any, conversations: Path, attribute_model: Path, tmp_path: Path
) -> None:
    """Scores agree to 1e-4 between splits, so a draw can differ where it falls that close to the
    edge of a value: none of these does."""
    source = write_jsonl(tmp_path / "input.jsonl", read_jsonl(conversations)[:50])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run_here(source, one, attribute_model, "labels=sampled")
    tune(*arguments(source, two, attribute_model, "labels=sampled"), nproc=2)
    assert two.read_bytes() == one.read_bytes()


def test_records_get_no_labels_whatever_labels_says(
    groups: Path, scored: Path, attribute_model: Path, tmp_path: Path
) -> None:
    run_here(groups, tmp_path / "out.jsonl", attribute_model, "labels=sampled")
    assert (tmp_path / "out.jsonl").read_bytes() == scored.read_bytes()


def test_rounded_labels_do_not_continue_with_drawn_ones(
    conversations: Path, labelled: Path, attribute_model: Path
) -> None:
    with pytest.raises(ValueError, match=r"was begun with other settings \(labels\)"):
        run_here(conversations, labelled, attribute_model, "labels=sampled")


BAD_INPUTS = {
    "no JSON": ([GOOD_CONVERSATION, "{"], "input.jsonl:2: not valid JSON"),
    "another format later": (
        [GOOD_CONVERSATION, json.dumps(GOOD_RECORD)],
        "input.jsonl:2: 'conversations' must be a list of at least one turn",
    ),
    "another format": (
        ['{"text": "a"}', "[]"],
        "input.jsonl:1: neither a conversation .*\n.*input.jsonl:2: neither a conversation",
    ),
    "a bad turn": (
        [json.dumps({"system": "", "conversations": [TURN, TURN | {"value": 3}, 4]})],
        r"input.jsonl:1: conversations\[1\]: 'value' must be text; conversations\[2\]: must be",
    ),
    "a label of another schema": (
        [json.dumps(GOOD_RECORD), json.dumps(GOOD_RECORD | {"label": "quality:3"})],
        "input.jsonl:2: label 'quality:3': unknown attribute 'quality'; known: humor, verbosity",
    ),
    "nothing": ([], "input.jsonl holds no records: the file is empty"),
    "nothing to label": (
        [json.dumps({"system": "", "conversations": [{"from": "Assistant", "value": "a"}]})],
        "no Assistant turn of its 1 conversations has a 'label' .*turns=all",
    ),
}


@pytest.mark.parametrize(("lines", "reason"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_a_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, lines: list[str], reason: str
) -> None:
    source = tmp_path / "input.jsonl"
    source.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        run_here(source, tmp_path / "output.jsonl", None)
    assert [path.name for path in tmp_path.iterdir()] == ["input.jsonl"]


def test_damaged_weights_are_named_as_the_cause_of_scores_that_are_none(tmp_path: Path) -> None:
    source = tmp_path / "input.jsonl"
    source.write_text(f"{GOOD_CONVERSATION}\n")
    name, _, config, *overrides = arguments(source, tmp_path / "output.jsonl", None)
    recipe = annotate_attributes.AnnotateRecipe(recipe_config(name, config, *overrides))
    recipe.setup()
    with torch.no_grad():
        next(recipe.model.decoder.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="of the attribute model are not finite: its weights are"):
        recipe.annotate()


def test_labels_that_users_have_are_refused(tmp_path: Path) -> None:
    turn = {"from": "User", "value": "a", "label": "humor:3"}
    source = write_jsonl(tmp_path / "input.jsonl", [{"system": "", "conversations": [turn, TURN]}])
    with pytest.raises(ValueError, match="only turns of 'Assistant' can have a label"):
        run_here(source, tmp_path / "output.jsonl", None)


def test_all_problems_of_the_config_are_reported(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "input.jsonl", [])
    with pytest.raises(ValueError, match="the config has problems") as caught:
        run_here(
            source,
            tmp_path / "output.jsonl.gz",
            None,
            *("max_seq_len=0", "schema.names=[a b]", "concentration=0"),
            *("server.url=http://host", "server.retries=-1", "server.concurrency=0"),
        )
    for key in ("max_seq_len", "schema", "concentration", "server.retries", "server.concurrency"):
        assert f"'{key}'" in str(caught.value)
    assert "'output' can't be compressed" in str(caught.value)


def test_a_server_scores_what_it_is_sent(
    conversations: Path, fake_vllm: Any, tmp_path: Path
) -> None:
    """Without any model here. The ids that it gets are those that transformers is given above."""
    rows = read_jsonl(conversations)[:20]
    source = write_jsonl(tmp_path / "input.jsonl", rows)
    output = tmp_path / "labelled.jsonl"
    run_here(source, output, None, f"server.url={fake_vllm.url}", "max_seq_len=512")
    template, labels = extra_id_template(), []
    for row in rows:
        turns = [Turn(turn["from"], turn["value"]) for turn in row["conversations"]]
        for i, turn in enumerate(row["conversations"]):
            if turn["from"] == "Assistant" and "label" in turn:
                segments = template.prompt(row["system"], turns[:i], None)
                segments += template.scored_response(turns[i].value)
                ids = encode_segments(segments, tiny_tokenizer())
                assert ids in fake_vllm.texts
                labels.append(expected_label(fake_vllm.scores(ids)))
    assert len(fake_vllm.texts) == len(labels)
    assert list(new_labels(rows, read_jsonl(output))) == labels


def new_labels(before: list[Json], after: list[Json]) -> Iterator[str]:
    for old, new in zip(before, after, strict=True):
        for turn, new_turn in zip(old["conversations"], new["conversations"], strict=True):
            if turn["from"] == "Assistant" and "label" in turn:
                yield new_turn["label"]


def test_a_dead_server_is_named_and_the_same_command_continues(
    tune: Any, conversations: Path, fake_vllm: Any, tmp_path: Path
) -> None:
    """What was written stays; it comes back, and only texts without a label are asked for."""
    source = write_jsonl(tmp_path / "input.jsonl", read_jsonl(conversations)[:100])
    uninterrupted, output = tmp_path / "uninterrupted.jsonl", tmp_path / "labelled.jsonl"
    options = (f"server.url={fake_vllm.url}", "max_seq_len=512", "server.retries=1")
    run_here(source, uninterrupted, None, *options)
    num_texts = len(fake_vllm.texts)

    fake_vllm.texts.clear()
    fake_vllm.dies_after = num_texts // 2
    result = tune(*arguments(source, output, None, *options), check=False)
    assert result.returncode == 1
    assert f"error: the server at {fake_vllm.url} doesn't answer, tried 2 times" in result.stderr
    assert "the same command continues where it stopped" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()
    partial = output.with_name("labelled.jsonl.partial")
    written = whole_lines(partial)
    assert 0 < written < 100
    assert written % SLICE == 0

    fake_vllm.texts.clear()
    fake_vllm.dies_after = None
    run_here(source, output, None, *options)
    assert output.read_bytes() == uninterrupted.read_bytes()
    assert len(fake_vllm.texts) == len(list(new_labels(*(read_jsonl(source)[written:],) * 2)))


def test_a_server_and_several_processes_are_refused(
    conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without --nproc_per_node"):
        run_here(conversations, tmp_path / "output.jsonl", None, "server.url=http://127.0.0.1:1")


def test_responses_that_are_not_what_was_sampled_are_counted(
    groups: Path, attribute_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are scored too, and nothing else of them changes; the other 6 answers have no flaw."""
    rows = read_jsonl(groups)[:4]
    sampled = {"finish_reason": "stop", "token_ids": [1, 2], "encodes_otherwise": True}
    ways = [{"finish_reason": "abort"}, {"value": "the \ufffd"}, {"finish_reason": "stop"}, sampled]
    for response, more in zip(rows[3]["responses"], ways, strict=True):
        response |= more
    output = tmp_path / "out.jsonl"
    run_here(write_jsonl(tmp_path / "in.jsonl", rows), output, attribute_model)
    flaws = (
        "1 cut off, 1 not valid UTF-8, 1 of other tokens than their text encodes to, 1 of unknown"
    )
    assert f"; of the responses: {flaws} tokens" in capsys.readouterr().out
    annotated = read_jsonl(output)[3]["responses"]
    assert [more.items() <= each.items() for more, each in zip(ways, annotated, strict=True)] == [
        True
    ] * 4
