"""Conversations for supervised fine-tuning: what is kept, what is left out, what is said of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from steerlm2.attributes import parse_label
from steerlm2.data.conversations import Conversation, conversation_to_json
from steerlm2.data.records import Turn
from steerlm2.data.synthetic import score_text
from steerlm2.data.templates import encode_dialogue, extra_id_template
from steerlm2.data.tokenizers import HFTokenizer, tiny_tokenizer
from steerlm2.datasets import DialogueDataset, dialogue_dataset, synthetic_dialogue_dataset


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return tiny_tokenizer()


def conversation(*spoken: str, labels: Mapping[int, str] | None = None) -> dict[str, Any]:
    """User and assistant in turn; `labels` by place."""
    roles = itertools.cycle(["User", "Assistant"])
    turns = [Turn(next(roles), text, (labels or {}).get(i)) for i, text in enumerate(spoken)]
    return conversation_to_json(Conversation(turns, "S"))


def read(
    folder: Path, tokenizer: HFTokenizer, *lines: dict[str, Any], **options: Any
) -> DialogueDataset:
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"max_seq_len": 256, "use_labels": True} | options
    return dialogue_dataset(tokenizer, source=str(path), **options)


def texts(tokenizer: HFTokenizer, dataset: DialogueDataset) -> list[str]:
    return [tokenizer.decode(dialogue.tokens) for dialogue in dataset]


def length(tokenizer: HFTokenizer, *spoken: str) -> int:
    """Tokens of a conversation without labels."""
    turns = [Turn(t["from"], t["value"]) for t in conversation(*spoken)["conversations"]]
    dialogue, _ = encode_dialogue(extra_id_template(), tokenizer, "S", turns)
    assert dialogue is not None
    return len(dialogue.tokens)


LABELLED = conversation("Q", "A", "R", "B", labels={1: "humor:1", 3: "humor:2"})


def test_labels_of_all_turns_stand_in_the_prompt(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    dataset = read(tmp_path, tokenizer, LABELLED)
    assert texts(tokenizer, dataset) == [
        "<extra_id_0>System\nS\n"
        "<extra_id_1>User\nQ\n<extra_id_1>Assistant\n<extra_id_2>humor:1\nA\n"
        "<extra_id_1>User\nR\n<extra_id_1>Assistant\n<extra_id_2>humor:2\nB\n<extra_id_1>"
    ]
    assert dataset.num_labelled() == 2


def test_without_use_labels_no_turn_shows_one(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    dataset = read(tmp_path, tokenizer, LABELLED, use_labels=False)
    assert texts(tokenizer, dataset) == [
        "<extra_id_0>System\nS\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\nA\n"
        "<extra_id_1>User\nR\n<extra_id_1>Assistant\nB\n<extra_id_1>"
    ]
    assert [turn.label for turn in dataset.conversations[0].turns] == [None] * 4
    assert dataset.num_labelled() == 0


def test_answers_without_a_label_are_kept_beside_labelled_ones(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    dataset = read(tmp_path, tokenizer, LABELLED, conversation("Q", "A"))
    assert dataset.num_labelled() == 2
    assert "2 conversations of 3 answers, 2 under a label" in dataset.summary()


def test_use_labels_without_any_label_is_an_error(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """It would train P(y|x) in silence."""
    with pytest.raises(ValueError, match=r"no assistant's turn has a label .*annotate_attributes"):
        read(tmp_path, tokenizer, conversation("Q", "A"))


def test_long_conversations_lose_whole_turns_or_are_dropped(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """The limit is that of the first. The second has two more turns; the third's only answer is too
    long, the fourth has none. The last ends with words that nobody answered: no loss."""
    first = ("Q", "A", "R", "B")
    limit = length(tokenizer, *first)
    dataset = read(
        tmp_path,
        tokenizer,
        conversation(*first),
        conversation(*first, "S", "C"),
        conversation("Q", "a b c d e f g " * 9),
        conversation("Q"),
        conversation("Q", "A", "Not answered. " * 20),
        max_seq_len=limit,
        use_labels=False,
    )
    assert [len(dialogue.tokens) for dialogue in dataset][:2] == [limit, limit]
    assert [len(each.turns) for each in dataset.conversations] == [4, 4, 2]
    assert dataset[0].tokens == dataset[1].tokens
    assert (dataset.num_shortened, dataset.num_dropped, dataset.num_unanswered) == (1, 1, 1)
    assert dataset.summary().endswith(
        "(1 lost their last turns, being too long; 1 were dropped: no answer fits; "
        "1 left out: no turn of the assistant)"
    )
    assert dataset.longest() == limit


@pytest.mark.parametrize(("train_on_input", "left_out"), [(False, 1), (True, 2)])
def test_broken_utf8_is_not_trained_on_and_counted(
    train_on_input: bool, left_out: int, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    lines = [conversation("Q", "A"), conversation("Q", "an\ufffd"), conversation("\ufffd?", "A")]
    arguments = {"use_labels": False, "train_on_input": train_on_input, "max_seq_len": 512}
    dataset = read(tmp_path, tokenizer, *lines, **arguments)
    assert len(dataset) == len(lines) - left_out
    broken = f"{left_out} left out: U+FFFD in a text to learn, not valid UTF-8"
    assert dataset.summary().endswith(f"no answer fits; {broken})")
    with pytest.raises(ValueError, match=r"holds no conversations .* 1 left out: U\+FFFD"):
        read(tmp_path, tokenizer, lines[1], **arguments)


def test_every_kept_answer_ends_with_its_stop_token(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """Whatever the limit: none is cut off."""
    spoken = ("Q", "One. Two.", "R", "Three.", "S", "Four. Five. Six.")
    stop = tokenizer.token_id("<extra_id_1>")
    for limit in range(length(tokenizer, *spoken[:2]), length(tokenizer, *spoken) + 1):
        line = conversation(*spoken)
        dataset = read(tmp_path, tokenizer, line, max_seq_len=limit, use_labels=False)
        (dialogue,) = dataset
        assert len(dialogue.tokens) <= limit
        places = list(dialogue.target_positions)
        ends = [place for place in places if place + 1 not in places]
        answers = sum(turn.role == "Assistant" for turn in dataset.conversations[0].turns)
        assert [dialogue.tokens[place] for place in ends] == [stop] * answers


def test_index_is_the_place_among_the_kept_conversations(
    tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    dataset = read(tmp_path, tokenizer, conversation("Q"), conversation("R", "A"), use_labels=False)
    assert [dialogue.index for dialogue in dataset] == [0]
    assert dataset.conversations[0].turns[0].value == "R"


def test_train_on_input_reaches_the_dialogues(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    (dialogue,) = read(tmp_path, tokenizer, LABELLED, train_on_input=True)
    assert list(dialogue.target_positions) == list(range(1, len(dialogue.tokens)))


def test_nothing_that_fits_is_an_error_that_says_so(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    """Too long is one cause, having no answer another."""
    with pytest.raises(
        ValueError,
        match=r"train on; in 1 no turn of the assistant fits into max_seq_len=10 tokens.*"
        "; 2 left out: no turn of the assistant$",
    ):
        read(tmp_path, tokenizer, LABELLED, *[conversation("Q")] * 2, max_seq_len=10)


@pytest.mark.parametrize("answer", ["", " \n\t"])
def test_an_answer_without_text_is_named(
    answer: str, tmp_path: Path, tokenizer: HFTokenizer
) -> None:
    """A model would learn to stop at once; in the middle of a conversation too."""
    bad = conversation("Q", answer, "R", "A")
    with pytest.raises(ValueError, match=r":2: conversations\[1\]: the response text is empty$"):
        read(tmp_path, tokenizer, LABELLED, bad, use_labels=False)


def test_empty_file_is_an_error_that_says_so(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    with pytest.raises(ValueError, match=r"conversations\.jsonl holds no conversations"):
        read(tmp_path, tokenizer)


def test_bad_lines_are_named(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    bad = conversation("Q", "A", labels={1: "humor=1"})
    nobody = {"system": "S", "conversations": [{"from": "Robot", "value": "Beep"}]}
    with pytest.raises(ValueError, match=r":2: .*humor=1.*\n.*:4: .*'Robot'"):
        read(tmp_path, tokenizer, LABELLED, bad, LABELLED, nobody)


def test_missing_file_is_named(tmp_path: Path, tokenizer: HFTokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dialogue_dataset(
            tokenizer, source=str(tmp_path / "nowhere.jsonl"), max_seq_len=9, use_labels=False
        )


def test_synthetic_answers_are_labelled_with_what_they_have(tokenizer: HFTokenizer) -> None:
    """The rounded counts of the answer itself, not the label that its record wants."""
    dataset = synthetic_dialogue_dataset(
        tokenizer, num_records=10, responses_per_prompt=3, max_seq_len=256, use_labels=True
    )
    assert len(dataset) == 30
    for each in dataset.conversations:
        question, answer = each.turns
        assert question.role == "User"
        counted = {name: round(score) for name, score in score_text(answer.value).items()}
        assert parse_label(answer.label or "") == counted


def test_synthetic_splits_differ(tokenizer: HFTokenizer) -> None:
    common: dict[str, Any] = {"num_records": 20, "responses_per_prompt": 2, "max_seq_len": 256}
    train, validation = (
        synthetic_dialogue_dataset(tokenizer, split=split, use_labels=False, **common)
        for split in ("train", "validation")
    )
    assert len(train) == len(validation) == 40
    assert [d.tokens for d in train] != [d.tokens for d in validation]
