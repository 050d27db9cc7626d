"""evaluate_steering: answers that are given, sampled here, or by a server; scores; the report."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import re
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torchtune.models.llama3 import llama3

import evaluate_steering
from processes import ranks_with_logs, stopped_until_named
from ready_made import recipe_config
from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.checkpoints.weights import load_weights, open_checkpointer, open_reward_checkpointer
from steerlm2.data.grammar import grammar_pairs, grammar_prompts
from steerlm2.data.packing import RewardGroup
from steerlm2.data.records import (
    Record,
    Response,
    Sampling,
    Turn,
    read_records,
    write_records,
)
from steerlm2.data.synthetic import score_text
from steerlm2.data.templates import (
    encode_for_scoring,
    encode_prompt,
    encode_response,
    extra_id_template,
    token_ids_digest,
)
from steerlm2.data.tokenizers import tiny_tokenizer
from steerlm2.distributed.parallelize import parallelize
from steerlm2.distributed.world import World
from steerlm2.evaluation import exact_kl as exact_kl_module
from steerlm2.evaluation.exact_kl import exact_kl, grammar_metrics, model_scorer
from steerlm2.evaluation.examples import request_of
from steerlm2.inference.attribute_model import load_attribute_model
from steerlm2.inference.engines import Request, Sample
from steerlm2.models.reward_head import add_reward_head
from steerlm2.runs.resumable import ResumableOutput

if TYPE_CHECKING:
    from tests.conftest import FakeVLLM
    from tests.recipes.conftest import TuneProcess

Json = dict[str, Any]

CHECKPOINTER = "steerlm2.checkpoints.HFCheckpointer"
SCHEMA = AttributeSchema(("humor", "verbosity"))
TEMPLATE, TOKENIZER = extra_id_template(), tiny_tokenizer()
WORLD = World(torch.device("cpu"))
NUM_PROMPTS, N = 6, 2


def recipe_here(output_dir: Path, *overrides: str) -> Any:
    """The recipe in this process, with tiny/evaluate_steering and overrides."""
    cfg = recipe_config(
        "evaluate_steering", "tiny/evaluate_steering", f"output_dir={output_dir}", *overrides
    )
    return evaluate_steering.EvaluateRecipe(cfg)


def run_here(output_dir: Path, *overrides: str) -> Json:
    """steering.json of a run in this process."""
    recipe = recipe_here(output_dir, *overrides)
    recipe.setup()
    recipe.sample()
    recipe.score()
    recipe.report()
    return report_in(output_dir)


def report_in(output_dir: Path) -> Json:
    return json.loads((output_dir / "steering.json").read_text())


def read_answers(path: Path) -> list[Record]:
    return read_records(path, require=(), min_responses=0)


def files_in(output_dir: Path) -> dict[str, bytes]:
    return {
        path.relative_to(output_dir).as_posix(): path.read_bytes()
        for path in output_dir.rglob("*")
        if path.is_file()
    }


def checkpoint(name: str, folder: Path) -> list[str]:
    """Overrides for a model that is sampled here."""
    return weights(f"models.{name}", folder)


def weights(section: str, folder: Path) -> list[str]:
    """Overrides for the section of a model: where its weights come from."""
    return [
        f"{section}.checkpointer._component_={CHECKPOINTER}",
        f"{section}.checkpointer.checkpoint_dir={folder}",
    ]


def decoder_without_weights() -> Any:
    with torch.device("meta"):
        return llama3(
            vocab_size=512,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=128,
            intermediate_dim=384,
            max_seq_len=2048,
            rope_base=10000,
        )


def fresh_checkpoint(folder: Path, seed: int) -> Path:
    decoder = decoder_without_weights()
    checkpointer = open_checkpointer(None, decoder, TOKENIZER, seed=seed, output_dir=str(folder))
    checkpointer.save_checkpoint(checkpointer.load_checkpoint(), 1)
    return folder / "epoch_1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: any token may follow any other, so that nearly all answers are cut off."""
    return fresh_checkpoint(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_reward_model(tmp_path_factory.mktemp("reward"), seed=2)


def untrained_reward_model(folder: Path, seed: int) -> Path:
    decoder = decoder_without_weights()
    with torch.device("meta"):
        add_reward_head(decoder, len(SCHEMA.names))
    checkpointer = open_reward_checkpointer(
        *(None, decoder, TOKENIZER, TEMPLATE, SCHEMA),
        seed=seed,
        output_dir=str(folder),
        load_head=False,
    )
    checkpointer.save_checkpoint(checkpointer.load_checkpoint(), 1)
    return folder / "epoch_1"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_records(path, grammar_prompts("validation")[::7][:NUM_PROMPTS])
    return path


def sampling(prompts: Path, *more: str) -> list[str]:
    return [
        *(f"prompts={prompts}", f"n={N}", "max_new_tokens=12", "records_per_write=2"),
        *("temperature=1", "top_p=1", *more),
    ]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """humor 2 is asked for, and given once and missed by 1 once; verbosity 0, given twice."""
    return answers_file(tmp_path / "given.jsonl", [["Yes. Ha! Ho!", "No. Ha!"]])


def answers_file(path: Path, texts: Sequence[Sequence[str]]) -> Path:
    """A record for each list of answers, all with one label."""
    write_records(
        path,
        [
            Record("S", [Turn("User", f"Q{i}")], "humor:2,verbosity:0", [Response(t) for t in own])
            for i, own in enumerate(texts)
        ],
    )
    return path


def test_given_answers_are_counted_from_the_command_line(
    tune_command: TuneProcess, answers: Path, tmp_path: Path
) -> None:
    """|2 - 2|, |1 - 2|, |0 - 0|, |0 - 0|: mean 0.25; 3 of 4 exact."""
    output_dir = tmp_path / "out"
    result = tune_command(
        *("evaluate_steering", "--config", "tiny/evaluate_steering", f"output_dir={output_dir}"),
        *(f"models.one.answers={answers}", f"models.two.answers={answers}"),
    )
    report = report_in(output_dir)
    assert list(report) == ["one", "two"]
    metrics = report["one"]["metrics"]
    assert metrics["steering_mae"] == pytest.approx(0.25)
    assert metrics["steering_exact_match"] == pytest.approx(0.75)
    assert (metrics["answers"], metrics["words_mean"]) == (2, 2.5)
    assert "truncated" not in metrics  # nothing is known of how these answers ended
    assert "| steering_mae | 0.250 | 0.250 |" in result.stdout
    assert "| steering_mae | 0.250 | 0.250 |" in (output_dir / "steering.md").read_text()
    assert (output_dir / "steering.html").read_text().startswith("<!doctype html>")
    (scored,) = read_answers(output_dir / "scored_exactly" / "one.jsonl")
    assert [r.scores for r in scored.responses] == [
        {"humor": 2.0, "verbosity": 0.0},
        {"humor": 1.0, "verbosity": 0.0},
    ]


def test_standard_errors_and_the_change_against_a_baseline_by_hand(tmp_path: Path) -> None:
    """humor 2 is asked for, so two, one and no exclamation miss by 0, 1 and 2, and verbosity by 0:
    errors of the requests are 0, 0.5 and 1, of the baseline 0.5, 0.5 and 1.

    Standard errors: sd(0, .5, 1) = .5, sd(-.5, 0, 0) = sqrt(((1/3)^2 + 2 (1/6)^2) / 2) = .28868,
    both over sqrt(3).
    """
    two, one, none = "Yes. Ha! Ho!", "Yes. Ha!", "Yes."
    new = answers_file(tmp_path / "new.jsonl", [[two], [one], [none]])
    base = answers_file(tmp_path / "base.jsonl", [[one], [one], [none]])
    report = run_here(
        *(tmp_path / "out", f"models.base.answers={base}", f"models.new.answers={new}"),
        "baseline=base",
    )
    metrics, change = report["new"]["metrics"], report["new"]["change"]
    assert metrics["steering_mae"] == pytest.approx(0.5)
    assert metrics["steering_mae_se"] == pytest.approx(0.5 / 3**0.5)
    assert change["steering_mae"] == pytest.approx(0.5 - 2 / 3)
    assert change["steering_mae_se"] == pytest.approx(0.288675 / 3**0.5, rel=1e-5)
    assert (report["new"]["baseline"], report["base"]["baseline"]) == ("base", None)
    assert report["base"]["change"] == {}


@pytest.fixture(scope="module")
def uninterrupted(
    model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Json]:
    """A checkpoint, asked with labels and without, against given answers."""
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    return output_dir, run_here(output_dir, *two_models(model, prompts))


def two_models(model: Path, prompts: Path) -> list[str]:
    return [
        *sampling(prompts, "baseline=plain", "models.plain.use_labels=false"),
        *(*checkpoint("steered", model), *checkpoint("plain", model)),
    ]


def test_every_answer_is_kept_and_scored(uninterrupted: tuple[Path, Json], prompts: Path) -> None:
    """Each prompt with its label; those that were cut off are marked, counted and scored too."""
    output_dir, report = uninterrupted
    asked = read_answers(prompts)
    records = read_answers(output_dir / "answers" / "steered.jsonl")
    sampled = {"responses": [], "extra": {}, "token_ids_digest": None}
    assert [dataclasses.replace(r, **sampled) for r in records] == [
        dataclasses.replace(r, responses=[], extra={}) for r in asked
    ]
    found = [answer for record in records for answer in record.responses]
    empty = sum(record.extra.get("empty_answers", 0) for record in records)
    assert len(found) + empty == NUM_PROMPTS * N
    cut = [a for a in found if a.finish_reason == "length"]
    metrics = report["steered"]["metrics"]
    assert metrics["truncated"] == len(cut) / len(found) > 0.5
    assert metrics["empty"] == empty / (NUM_PROMPTS * N)
    assert metrics["answers"] == len(found)
    scored = read_answers(output_dir / "scored_exactly" / "steered.jsonl")
    assert [a.scores for r in scored for a in r.responses] == [score_text(a.value) for a in found]


def test_examples_show_the_models_side_by_side(uninterrupted: tuple[Path, Json]) -> None:
    """The first answer of each to the same request, with its scores."""
    output_dir, _ = uninterrupted
    examples = read_answers(output_dir / "examples.jsonl")
    assert examples
    for model in ("steered", "plain"):
        first = {
            request_of(record): record.responses[0].value
            for record in read_answers(output_dir / "answers" / f"{model}.jsonl")
            if record.responses
        }
        for example in examples:
            (own,) = (answer for answer in example.responses if answer.extra["model"] == model)
            assert own.value == first[request_of(example)]
            assert own.scores == score_text(own.value)


def test_all_models_get_the_same_random_numbers(model: Path, prompts: Path, tmp_path: Path) -> None:
    run_here(
        *(tmp_path, *sampling(prompts, "max_prompts=2")),
        *(*checkpoint("one", model), *checkpoint("two", model)),
    )
    one, two = ((tmp_path / "answers" / f"{name}.jsonl") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_model_without_labels_is_not_shown_them(model: Path, tmp_path: Path) -> None:
    """Nor those of earlier turns. It answers all labels of a question alike where there is no
    chance in it, and is compared with what was asked all the same."""
    turns = [Turn("User", "Q"), Turn("Assistant", "A", "humor:0"), Turn("User", "R")]
    other = [turns[0], Turn("Assistant", "A", "humor:4"), turns[2]]
    prompts = tmp_path / "prompts.jsonl"
    pairs = [(turns, "humor:4,verbosity:0"), (other, "humor:0,verbosity:2")]
    write_records(prompts, [Record("S", own, label, []) for own, label in pairs])
    options = sampling(prompts, "n=1", "temperature=0")
    report = run_here(
        *(tmp_path / "out", *options, *checkpoint("with", model), *checkpoint("without", model)),
        "models.without.use_labels=false",
    )
    texts = {}
    for name in ("with", "without"):
        file = tmp_path / "out" / "answers" / f"{name}.jsonl"
        records = read_answers(file)
        assert [record.label for record in records] == [label for _, label in pairs]
        texts[name] = [record.responses[0].value for record in records]
    assert texts["with"][0] != texts["with"][1]
    assert texts["without"][0] == texts["without"][1]
    requested = {row["requested"] for row in report["without"]["curve"]}
    assert requested == {0, 2, 4}
    assert (report["with"]["sees_labels"], report["without"]["sees_labels"]) == (True, False)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("writes", [1, 4])
def test_interrupted_equals_uninterrupted(
    uninterrupted: tuple[Path, Json],
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    """Within the first model's answers, and within the second's (3 slices each)."""
    output_dir, _ = uninterrupted
    left = [writes]
    append = ResumableOutput.append

    def append_until(self: ResumableOutput, lines: Any) -> None:
        append(self, lines)
        left[0] -= 1
        if left[0] == 0:
            assert self._file is not None
            self._file.write(b'{"half a line')
            self._file.close()
            raise Interrupted

    monkeypatch.setattr(ResumableOutput, "append", append_until)
    with pytest.raises(Interrupted):
        run_here(tmp_path, *two_models(model, prompts))
    assert not (tmp_path / "steering.json").exists()
    run_here(tmp_path, *two_models(model, prompts))
    found, wanted = files_in(tmp_path), files_in(output_dir)
    assert found == wanted


def test_two_ranks_equal_one_process(
    tune: TuneProcess,
    uninterrupted: tuple[Path, Json],
    model: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    """From the command line: the same answers, and so the same report; and each leaves a log."""
    _, report = uninterrupted
    tune(
        *("evaluate_steering", "--config", "tiny/evaluate_steering", f"output_dir={tmp_path}"),
        *two_models(model, prompts),
        nproc=2,
    )
    assert report_in(tmp_path) == report
    assert ranks_with_logs(tmp_path) == [0, 1]


def test_a_stopped_rank_is_named_and_the_run_goes_on(
    tune: TuneProcess, model: Path, prompts: Path, tmp_path: Path
) -> None:
    process = tune.start(
        *("evaluate_steering", "--config", "tiny/evaluate_steering", f"output_dir={tmp_path}"),
        *sampling(prompts, *checkpoint("a", model), "hang_timeout_seconds=2"),
        *("label.kind=uniform", "label.attributes=[humor,verbosity]", "label.labels_per_prompt=10"),
        nproc=2,
    )
    stderr = stopped_until_named(process, tmp_path, "answers/a.jsonl.partial")
    assert re.search(r"rank 0 on \S+: a, answers, group \d+, in ", stderr)


def test_a_model_that_was_trained_again_is_not_taken_for_the_same(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    options = sampling(prompts, "max_prompts=2", *checkpoint("one", folder))
    run_here(tmp_path / "out", *options)
    run_here(tmp_path / "out", *options)
    shutil.copytree(fresh_checkpoint(tmp_path, seed=9), folder, dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match=r"one\.jsonl was begun with other settings \(checkpointer\)"
    ):
        run_here(tmp_path / "out", *options)


def test_a_prompt_without_room_is_left_out_and_counted(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    long = grammar_prompts("validation")[0]
    long.prompt_turns = [Turn("User", "good " * 300)]
    source = tmp_path / "prompts.jsonl"
    write_records(source, [long, *read_answers(prompts)[:2]])
    options = sampling(source, "max_seq_len=200", *checkpoint("one", model))
    metrics = run_here(tmp_path / "out", *options)["one"]["metrics"]
    assert (metrics["left_out"], metrics["answers"]) == (1, 2 * N)


class EngineWithAnswers:
    """Answers with one word, or none at all, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def sample(self, requests: Sequence[Request]) -> list[list[Sample]]:
        self.requests += requests
        stop = TOKENIZER.token_id("<extra_id_1>")
        assert stop is not None
        end = TOKENIZER.encode("\n")
        word = [*TOKENIZER.encode("Paris."), *end, stop]
        return [[Sample(word, "stop", -1.0), Sample([*end, stop], "stop", -1.0)] for _ in requests]

    def close(self) -> None:
        pass


def test_a_server_answers(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked by token ids; an answer without text is counted, and isn't scored."""
    engine = EngineWithAnswers()
    monkeypatch.setattr(evaluate_steering, "open_server", lambda *arguments: engine)
    report = run_here(
        tmp_path / "out", *sampling(prompts), "models.served.server.url=http://127.0.0.1:1"
    )
    asked = read_answers(prompts)
    assert sorted(list(request.prompt) for request in engine.requests) == sorted(
        encode_prompt(TEMPLATE, TOKENIZER, r.system, r.prompt_turns, r.label) for r in asked
    )
    metrics = report["served"]["metrics"]
    assert (metrics["answers"], metrics["empty"], metrics["truncated"]) == (NUM_PROMPTS, 0.5, 0)
    records = read_answers(tmp_path / "out" / "answers" / "served.jsonl")
    assert {a.value for r in records for a in r.responses} == {"Paris."}
    assert {r.token_ids_digest for r in records} == {token_ids_digest(TEMPLATE, TOKENIZER)}
    flaws = {"not_utf8", "encoded_otherwise", "unknown_tokens"}
    assert flaws & metrics.keys() == set()


def test_answers_that_are_not_what_was_sampled_are_counted(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an emoji, letters one by one, a text without tokens, an abort; all are scored."""
    *end, stop = encode_response(TEMPLATE, TOKENIZER, "")
    half = [*TOKENIZER.encode("So \N{GRINNING FACE}")[:-1], *end, stop]
    letters = [*(token for letter in "the" for token in TOKENIZER.encode(letter)), *end, stop]
    samples = [
        *(Sample(tokens, "stop", -1.0) for tokens in (half, letters)),
        Sample([*TOKENIZER.encode("So."), *end, stop], "stop", None, "So.\n"),
        Sample(TOKENIZER.encode("Par"), "abort", -1.0),
    ]
    engine = EngineWithAnswers()
    monkeypatch.setattr(engine, "sample", lambda requests: [samples for _ in requests])
    monkeypatch.setattr(evaluate_steering, "open_server", lambda *arguments: engine)
    report = run_here(
        tmp_path / "out",
        *sampling(prompts, "n=4", "max_prompts=2"),
        "models.served.server.url=http://127.0.0.1:1",
    )
    metrics = report["served"]["metrics"]
    assert (metrics["answers"], metrics["truncated"]) == (8, 0.25)
    flaws = [metrics[name] for name in ("not_utf8", "encoded_otherwise", "unknown_tokens")]
    assert flaws == [2, 2, 2]


def reward_section(folder: Path) -> list[str]:
    return ["exact_scorer=null", *weights("attribute_model", folder)]


def groups_of(records: Sequence[Record]) -> list[RewardGroup]:
    return [
        encode_for_scoring(
            TEMPLATE, TOKENIZER, r.system, r.prompt_turns, [a.value for a in r.responses], 1024
        )[0]
        for r in records
    ]


def test_an_attribute_model_scores(answers: Path, reward_model: Path, tmp_path: Path) -> None:
    """As asked directly; the next run takes the file over."""
    options = [f"models.one.answers={answers}", *reward_section(reward_model)]
    report = run_here(tmp_path / "out", *options)
    direct = load_attribute_model(
        {"_component_": f"{__name__}.decoder_without_weights"} if __name__ in sys.modules else {},
        {"_component_": CHECKPOINTER, "checkpoint_dir": str(reward_model)},
        *(TOKENIZER, TEMPLATE, SCHEMA, WORLD),
        max_seq_len=1024,
        max_tokens_per_microbatch=2048,
        dtype=torch.float32,
    )
    ((first, second),) = direct.score(groups_of(read_answers(answers)))
    file = tmp_path / "out" / "scored" / "one.jsonl"
    (record,) = read_answers(file)
    for answer, scores in zip(record.responses, (first, second), strict=True):
        assert list((answer.scores or {}).values()) == pytest.approx(scores, abs=1e-5)
    mae = (abs(first[0] - 2) + abs(second[0] - 2) + abs(first[1]) + abs(second[1])) / 4
    assert report["one"]["metrics"]["steering_mae"] == pytest.approx(mae, abs=1e-5)
    before = file.stat().st_mtime_ns
    run_here(tmp_path / "out", *options)
    assert file.stat().st_mtime_ns == before


def test_what_the_scores_cost_is_measured(
    model: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    """A copy of the attribute model finds the same. A model that is asked without labels
    is away from itself, as the reference, by what it gives to control tokens, which aren't drawn:
    about 9 of 512 in each of the 12 tokens of an untrained one's answer."""
    copy = shutil.copytree(reward_model, tmp_path / "copy")
    found = run_here(
        tmp_path / "out",
        *sampling(prompts),
        *checkpoint("m", model),
        "models.m.use_labels=false",
        *reward_section(reward_model),
        *weights("independent_attribute_model", copy),
        *weights("reference_model", model),
    )["m"]["metrics"]
    assert found["independent_mae"] == found["steering_mae"]
    assert found["independent_mae_se"] == found["steering_mae_se"]
    assert found["kl_reference_answers"] == found["answers"] == NUM_PROMPTS * N
    assert found["kl_reference"] == pytest.approx(12 * 9 / 512, abs=0.05)


def test_answers_that_only_please_the_attribute_model_are_found_out(
    reward_model: Path, prompts: Path, model: Path, tmp_path: Path
) -> None:
    """Reward hacking to the full: of 16 answers to each prompt those that the attribute model finds
    nearest to the label. Another attribute model, here one that has nothing in common with it,
    doesn't find them near."""
    other = untrained_reward_model(tmp_path / "other", seed=5)
    judged = [*reward_section(reward_model), *weights("independent_attribute_model", other)]
    options = [*sampling(prompts), *checkpoint("m", model), *judged, "n=16"]
    before = run_here(tmp_path / "all", *options)["m"]["metrics"]
    records = read_answers(tmp_path / "all" / "scored" / "m.jsonl")

    def distance(record: Record, response: Response) -> float:
        wanted = parse_label(record.label or "")
        return sum(abs((response.scores or {})[name] - value) for name, value in wanted.items())

    hacked = tmp_path / "hacked.jsonl"
    write_records(
        hacked,
        [
            dataclasses.replace(r, responses=[min(r.responses, key=lambda own: distance(r, own))])
            for r in records
        ],
    )
    after = run_here(tmp_path / "hacked", f"models.m.answers={hacked}", *judged)["m"]["metrics"]
    gain = before["steering_mae"] - after["steering_mae"]
    assert gain > 0
    assert abs(before["independent_mae"] - after["independent_mae"]) < gain / 4


def test_a_reference_that_has_nothing_to_compare_with_is_said(
    model: Path, answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody knows with which log-probs given answers were drawn."""
    found = run_here(
        tmp_path / "out",
        f"models.one.answers={answers}",
        *weights("reference_model", model),
    )
    assert "kl_reference" not in found["one"]["metrics"]
    assert "WARNING: models.one: no kl_reference: none of its answers" in capsys.readouterr().out


def test_given_answers_that_are_not_all_of_their_draws_are_told(
    answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that always says the same, one answer would be left, and look as varied as any."""
    left_out = {"duplicates": 5, "cut_off": 1}
    sampled = [
        dataclasses.replace(own, sampling=Sampling(8, 1.0, 1.0, left_out=left_out))
        for own in read_answers(answers)
    ]
    write_records(answers, sampled)
    run_here(tmp_path / "out", f"models.one.answers={answers}")
    told = "WARNING: models.one: 6 of the 8 answers drawn to its prompts aren't there (1 cut_off, "
    assert told in capsys.readouterr().out


def test_an_attribute_server_scores(answers: Path, fake_vllm: FakeVLLM, tmp_path: Path) -> None:
    run_here(
        *(tmp_path / "out", f"models.one.answers={answers}", "exact_scorer=null"),
        *(f"attribute_model.server.url={fake_vllm.url}", "max_seq_len=512"),
        "max_new_tokens=12",
    )
    (record,) = read_answers(tmp_path / "out" / "scored" / "one.jsonl")
    (group,) = groups_of([record])
    assert [list((a.scores or {}).values()) for a in record.responses] == [
        fake_vllm.scores([*group.prompt, *text]) for text in group.responses
    ]


def test_stored_scores(answers: Path, tmp_path: Path) -> None:
    """|3 - 2|, |2 - 2|, |1 - 0|, |0 - 0|: 0.5."""
    (record,) = read_answers(answers)
    stored = ({"humor": 3.0, "verbosity": 1.0}, {"humor": 2.0, "verbosity": 0.0})
    for answer, scores in zip(record.responses, stored, strict=True):
        answer.scores = scores
    write_records(answers, [record])
    report = run_here(tmp_path / "out", f"models.one.answers={answers}", "exact_scorer=null")
    assert report["one"]["metrics"]["steering_mae"] == pytest.approx(0.5)
    assert not (tmp_path / "out" / "scored").exists()


@pytest.mark.parametrize("use_labels", [True, False])
def test_exact_metrics_are_those_of_the_model(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_labels: bool,
) -> None:
    """Against `exact_kl` called directly, on three pairs of the split; given answers have none."""
    pairs = grammar_pairs("validation")[:3]
    monkeypatch.setattr(exact_kl_module, "grammar_pairs", lambda split: pairs)
    given = answers_file(tmp_path / "given.jsonl", [["Yes."]])
    report = run_here(
        *(tmp_path / "out", *sampling(prompts, "max_prompts=1"), *checkpoint("one", model)),
        *(f"models.one.use_labels={use_labels}", f"models.given.answers={given}"),
        "exact_kl._component_=steerlm2.evaluation.grammar_metrics",
    )
    decoder = decoder_without_weights()
    parallelize(decoder, WORLD, dtype=torch.float32)
    component = {"_component_": CHECKPOINTER, "checkpoint_dir": str(model)}
    load_weights(
        decoder, open_checkpointer(component, decoder, TOKENIZER, seed=0, output_dir=""), WORLD,
        seed=0,
    )  # fmt: skip
    direct = exact_kl(
        model_scorer(decoder, WORLD), TOKENIZER, TEMPLATE, pairs, show_labels=use_labels
    ).summary()
    metrics = report["one"]["metrics"]
    for name, value in direct.items():
        assert metrics[f"exact_{name.removeprefix('exact_')}"] == pytest.approx(value, rel=1e-5)
    assert not any(name.startswith("exact_kl") for name in report["given"]["metrics"])


def test_the_grammars_metrics_are_of_the_split_that_is_asked_for() -> None:
    """A model that gives everything the same log-prob: KL = -H(P(y|a,x)) + 30, per pair."""
    asked = []

    def score(groups: Any) -> list[list[float]]:
        asked.extend(groups)
        return [[-30.0] * len(group.responses) for group in groups]

    metrics = grammar_metrics(score, TOKENIZER, TEMPLATE, split="all")
    assert len(asked) == len(grammar_pairs("all"))
    assert set(metrics) >= {"exact_kl", "exact_mass", "exact_steering_mae"}
    assert all(name.startswith("exact_") for name in metrics)
    assert metrics["exact_mass"] == pytest.approx(90 * 2.718281828**-30, rel=1e-6)
    asked.clear()
    grammar_metrics(score, TOKENIZER, TEMPLATE, split="all", max_pairs=3)
    assert len(asked) == 3


def test_tables_go_to_wandb(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its module: as torchtune's logger and we use it, offline."""
    logged: dict[str, Any] = {}
    started: dict[str, Any] = {}
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    run = types.SimpleNamespace(_label=lambda **_: None)

    def init(**arguments: Any) -> Any:
        started.update(arguments)
        wandb.run = run  # type: ignore[attr-defined]
        return run

    class StandInTable:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    stand_in = {
        "run": None,
        "init": init,
        "log": logged.update,
        "Table": StandInTable,
        "config": types.SimpleNamespace(update=lambda *_, **__: None),
        "save": lambda *_, **__: None,
        "finish": lambda: None,
    }
    for name, value in stand_in.items():
        setattr(wandb, name, value)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_here(
        *(tmp_path / "out", f"models.one.answers={answers}", f"models.two.answers={answers}"),
        *("baseline=one", "metric_logger.project=p", "metric_logger.mode=offline"),
        "metric_logger._component_=torchtune.training.metric_logging.WandBLogger",
    )
    assert started["mode"] == "offline"
    assert logged["one/steering_mae"] == pytest.approx(0.25)
    models = logged["Models"]
    assert models.columns == ["metric", "one", "two"]
    assert ["steering_mae", 0.25, 0.25] in models.data
    assert ["steering_mae", 0.0] in logged["Change against one"].data
    assert logged["one/curve"].columns[:2] == ["attribute", "requested"]
    assert "one/cross_talk" not in logged  # only one label: there is none


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        ([], ["'models' is empty: add models.NAME.checkpointer, models.NAME.server.url"]),
        (
            [
                *("models.a.answers=f", "models.a.server.url=http://x", "models.b.use_labels=true"),
                *("baseline=c", "n=0", "models.d/e.answers=f"),
                "exact_kl._component_=steerlm2.evaluation.grammar_metrics",
                *("attribute_model.server=null", "models.a.server.retries=-1"),
            ],
            [
                "'models.a' needs one of checkpointer, server, answers, got server and answers",
                "'models.b' needs one of checkpointer, server, answers, got none",
                "'models.d/e': letters, digits",
                "'models.a.server.retries' must be at least 0",
                "'baseline' must be one of 'models' (a, b, d/e), got c",
                "'n' must be at least 1, got 0",
                "'prompts' is missing",
                "'exact_scorer' and 'attribute_model' are both given",
                "'attribute_model' needs one of checkpointer, server, got none",
                "'exact_kl' is of models with a 'checkpointer'",
            ],
        ),
        (
            [
                "models.a.answers=f",
                *(f"{key}.server.url=http://x" for key in evaluate_steering.ATTRIBUTE_MODELS),
            ],
            ["'independent_attribute_model' is 'attribute_model' itself: name one that was"],
        ),
        (
            [f"checkpointer._component_={CHECKPOINTER}", "tensor_parallel_dim=2"],
            [
                "'checkpointer' is a model's own: set models.NAME.checkpointer",
                "'tensor_parallel_dim' must be 1: every process holds the whole model",
            ],
        ),
        (
            ["models.a.server.url=http://x", "prompts=p", "label.kind=none", "exact_scorer=null"],
            ["'label.kind' none asks for nothing", "nothing scores the answers of a"],
        ),
        (
            ["models.a.answers={answers}", "exact_scorer=null"],
            ["record 1: a response has no score for humor, verbosity"],
        ),
        (
            ["models.a.answers={answers}", "schema.names=[wit]"],
            ["record 1: label 'humor:2,verbosity:0': unknown attribute 'humor'"],
        ),
        (["models.a.answers=nowhere.jsonl"], ["nowhere.jsonl does not exist"]),
        (
            ["models.a.server.url=http://x", "prompts=nowhere.jsonl"],
            ["nowhere.jsonl does not exist"],
        ),
        (
            ["models.a.server.url=http://x", "prompts={answers}", "schema.names=[wit]"],
            ["given.jsonl, prompt 1: label 'humor:2,verbosity:0': unknown attribute 'humor'"],
        ),
        (
            ["prompts={answers}", *checkpoint("a", Path("/nowhere"))],
            ["models.a: /nowhere has no config.json"],
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_sampled(
    answers: Path, tmp_path: Path, overrides: list[str], messages: list[str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        recipe_here(tmp_path, *(o.format(answers=answers) for o in overrides)).setup()
    for message in messages:
        assert message in str(caught.value)


def test_a_mistake_ends_in_one_message(tune: TuneProcess, model: Path, tmp_path: Path) -> None:
    result = tune(
        *("evaluate_steering", "--config", "tiny/evaluate_steering", f"output_dir={tmp_path}"),
        *("prompts=nowhere.jsonl", *checkpoint("a", model)),
        check=False,
    )
    assert result.returncode == 1
    assert "nowhere.jsonl does not exist" in result.stderr
    assert "Traceback" not in result.stderr
