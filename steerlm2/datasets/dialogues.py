"""Conversations for supervised fine-tuning, tokenised, in memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steerlm2.attributes import as_schema, encode_label
from steerlm2.data.conversations import Conversation, has_broken_answer, iter_conversations
from steerlm2.data.packing import Dialogue
from steerlm2.data.records import ASSISTANT, BROKEN, REPLACEMENT, Turn
from steerlm2.data.synthetic import synthetic_records
from steerlm2.data.templates import Template, encode_dialogue, extra_id_template
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.facts import ModelFacts, schema_of_labels


@dataclass
class DialogueDataset(Sequence[Dialogue]):
    """Tokenised conversations, and the numbers of those that were shortened or dropped.

    A response is never cut off, because it would lose its stop token. A conversation longer than
    `max_seq_len` loses its last turns, or is dropped if not even its first response fits. One
    without a turn of the assistant, or with a text to learn that isn't valid UTF-8, is left out.
    """

    conversations: list[Conversation] = field(default_factory=list)
    """The conversations as they are trained on; `Dialogue.index` is the index in this list."""
    dialogues: list[Dialogue] = field(default_factory=list)
    num_shortened: int = 0
    num_dropped: int = 0
    num_unanswered: int = 0
    num_broken: int = 0
    """Conversations with U+FFFD in a text to learn, which a model would learn to write."""

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: Any) -> Any:
        return self.dialogues[index]

    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(len(dialogue.tokens) for dialogue in self.dialogues)

    def num_labelled(self) -> int:
        """The number of assistant turns with a label."""
        return sum(turn.label is not None for turn in self._answers())

    def summary(self) -> str:
        targets = sum(len(dialogue.target_positions) for dialogue in self.dialogues)
        left_out = "".join(f"; {number} left out: {cause}" for number, cause in self._left_out())
        return (
            f"{len(self)} conversations of {len(self._answers())} answers, {self.num_labelled()} "
            f"under a label, with {targets} tokens to predict ({self.num_shortened} lost their "
            f"last turns, being too long; {self.num_dropped} were dropped: no answer fits"
            f"{left_out})"
        )

    def _left_out(self) -> list[tuple[int, str]]:
        """Numbers above 0 with their causes."""
        causes = [
            (self.num_unanswered, "no turn of the assistant"),
            (self.num_broken, f"U+FFFD in a text to learn, {BROKEN}"),
        ]
        return [(number, cause) for number, cause in causes if number]

    def _answers(self) -> list[Turn]:
        turns = (turn for conversation in self.conversations for turn in conversation.turns)
        return [turn for turn in turns if turn.role == ASSISTANT]


def dialogue_dataset(
    tokenizer: Tokenizer,
    *,
    source: str,
    max_seq_len: int,
    use_labels: bool,
    train_on_input: bool = False,
    template: Template | None = None,
) -> DialogueDataset:
    """Conversations of a JSONL file.

    Args:
        source: a .jsonl or .jsonl.gz file in the conversation format.
        max_seq_len: tokens of a conversation.
        use_labels: True: the labels of the assistant's turns are part of the text, for Q'(y|a,x).
            False: they are left out, for P(y|x).
        train_on_input: train on all tokens, not only on the assistant's.
        template: defaults to the extra_id template.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming every bad line (the first 10), among them those with an answer without
            text; where no conversation is left; where
            `use_labels` finds no label.
    """
    return tokenize_conversations(
        iter_conversations(source),
        tokenizer,
        template,
        source,
        max_seq_len=max_seq_len,
        use_labels=use_labels,
        train_on_input=train_on_input,
    )


def synthetic_dialogue_dataset(
    tokenizer: Tokenizer,
    *,
    num_records: int,
    responses_per_prompt: int,
    max_seq_len: int,
    use_labels: bool,
    train_on_input: bool = False,
    template: Template | None = None,
    split: Literal["train", "validation"] = "train",
    seed: int = 0,
) -> DialogueDataset:
    """The responses of `synthetic_dataset`, each as a conversation with its own rounded scores."""
    return tokenize_conversations(
        (
            Conversation([*record.prompt_turns, _labelled(response)], record.system)
            for record in synthetic_records(num_records, responses_per_prompt, seed, split=split)
            for response in record.responses
        ),
        tokenizer,
        template,
        "the synthetic data set",
        max_seq_len=max_seq_len,
        use_labels=use_labels,
        train_on_input=train_on_input,
    )


def tokenize_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    template: Template | None,
    source: str,
    *,
    max_seq_len: int,
    use_labels: bool,
    train_on_input: bool,
) -> DialogueDataset:
    """Conversations as a data set; the arguments are those of `dialogue_dataset`.

    Raises:
        ValueError: where no conversation is left; where `use_labels` finds no label.
    """
    dataset = DialogueDataset()
    template = template or extra_id_template()
    for conversation in conversations:
        turns = conversation.turns
        if not any(turn.role == ASSISTANT for turn in turns):
            dataset.num_unanswered += 1
            continue
        if has_broken_answer(conversation) or (train_on_input and _has_broken_input(conversation)):
            dataset.num_broken += 1
            continue
        if not use_labels:
            turns = [dataclasses.replace(turn, label=None) for turn in turns]
        dialogue, num_turns = encode_dialogue(
            template,
            tokenizer,
            conversation.system,
            turns,
            max_seq_len=max_seq_len,
            train_on_input=train_on_input,
        )
        if dialogue is None:
            dataset.num_dropped += 1
            continue
        dataset.num_shortened += any(turn.role == ASSISTANT for turn in turns[num_turns:])
        index = len(dataset.conversations)
        dataset.conversations.append(Conversation(turns[:num_turns], conversation.system))
        dataset.dialogues.append(dataclasses.replace(dialogue, index=index))
    if not dataset.dialogues:
        problems = [f"{source} holds no conversations to train on"]
        if dataset.num_dropped:
            problems.append(
                f"in {dataset.num_dropped} no turn of the assistant fits into max_seq_len="
                f"{max_seq_len} tokens (raise max_seq_len)"
            )
        problems += [f"{number} left out: {cause}" for number, cause in dataset._left_out()]
        raise ValueError("; ".join(problems))
    if use_labels and not dataset.num_labelled():
        raise ValueError(
            f"{source}: no assistant's turn has a label for use_labels=true to put into the "
            "prompt; label them (recipe annotate_attributes), or set use_labels=false"
        )
    return dataset


def _has_broken_input(conversation: Conversation) -> bool:
    return any(
        REPLACEMENT in text
        for text in (conversation.system, *(turn.value for turn in conversation.turns))
    )


def language_model_facts(
    conversations: Iterable[Conversation],
    template: Mapping[str, Any],
    schema: Mapping[str, Any] | None,
) -> ModelFacts:
    """What a language model that is trained on these conversations says of itself.

    Args:
        template: section of the config.
        schema: likewise; None: the attributes of the default schema that the labels name.

    Raises:
        ValueError: for labels that aren't of the schema.
    """
    labels, systems = [], Counter[str]()
    for conversation in conversations:
        labels += [turn.label for turn in conversation.turns if turn.label is not None]
        systems[conversation.system] += 1
    known = None if schema is None else as_schema(schema)
    own_schema, default_label = schema_of_labels(labels, known)
    return ModelFacts(
        kind="language model",
        template=template,
        schema=own_schema,
        default_label=default_label,
        system=systems.most_common(1)[0][0] if systems else None,
    )


def _labelled(response: Any) -> Turn:
    values = {name: round(score) for name, score in (response.scores or {}).items()}
    return Turn(ASSISTANT, response.value, encode_label(values))
