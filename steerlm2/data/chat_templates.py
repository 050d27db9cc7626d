"""Chat templates: a template as the Jinja text that transformers, vLLM and llama.cpp render.

    tokenizer.apply_chat_template(
        messages, attributes={"humor": 4, "verbosity": 1}, add_generation_prompt=True
    )

gives the token ids of `templates.encode_prompt`. `attributes` is a mapping or a label; attributes
that it leaves out have the default label's values, and without it all have; "" asks for no label.
A message of the role `attributes` says the same for tools that pass no arguments, and a message of
the assistant may have `attributes` of its own. Where no prompt for an answer is asked for, the
argument is of the answer that the messages end with. Without a system message the system text is
that of the training; an empty one means none.

The text is made of what the template writes of a few probes, so that it fits any template whose
conversations are put together of their turns.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steerlm2.attributes import AttributeSchema, parse_label
from steerlm2.data.records import ASSISTANT, USER, Turn
from steerlm2.data.templates import Template, segments_to_text
from steerlm2.data.tokenizers import Tokenizer
from steerlm2.facts import ModelFacts

_SYSTEM, _CONTENT, _LABEL = "\ue000", "\ue001", "\ue002"
"""Stand-ins for contents: characters of a private area, which no template writes."""

_LABEL_OF = """\
{{%- set defaults = {defaults} -%}}
{{%- set ranges = {ranges} -%}}
{{%- macro label_of(given) -%}}
{{%- set seen = namespace(names=[]) -%}}
{{%- for part in (given.split(",") if given is string else given) -%}}
{{%- set name = part.split(":")[0] if given is string else part -%}}
{{%- if name not in ranges -%}}
{{{{- raise_exception("unknown attribute " ~ name ~ ", known: " ~ {known}) -}}}}
{{%- elif name in seen.names -%}}
{{{{- raise_exception(name ~ " is given twice") -}}}}
{{%- endif -%}}
{{%- set seen.names = seen.names + [name] -%}}
{{%- endfor -%}}
{{%- set label = namespace(parts=[]) -%}}
{{%- for name in ranges -%}}
{{%- set own = namespace(value=defaults[name] if name in defaults else none) -%}}
{{%- if given is string -%}}
{{%- for part in given.split(",") -%}}
{{%- set pair = part.split(":") -%}}
{{%- if pair | length != 2 or pair[1] | int | string != pair[1] -%}}
{{{{- raise_exception(part ~ " is not of the form name:number") -}}}}
{{%- elif pair[0] == name -%}}
{{%- set own.value = pair[1] | int -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- elif name in given -%}}
{{%- set own.value = given[name] -%}}
{{%- endif -%}}
{{%- if own.value is not none -%}}
{{%- if own.value is not integer or own.value < ranges[name][0] or own.value > ranges[name][1] -%}}
{{{{- raise_exception(name ~ " must be a whole number from " ~ ranges[name][0] ~ " to " ~
    ranges[name][1] ~ ", got " ~ own.value) -}}}}
{{%- endif -%}}
{{%- set label.parts = label.parts + [name ~ ":" ~ own.value] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- label.parts | join(",") -}}}}
{{%- endmacro -%}}
{{%- set asked = none -%}}
{{%- if attributes is defined and attributes is not none -%}}
{{%- set asked = label_of(attributes) if attributes is mapping or attributes else "" -%}}
{{%- endif -%}}
"""

_TURNS = """\
{{%- for message in messages -%}}
{{%- if message.role != "attributes" and message.content is not string -%}}
{{{{- raise_exception("the content of a message of the role " ~ message.role ~
    " is no text") -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set ns = namespace(label=none, system={system}, first=0) -%}}
{{%- if messages and messages[0].role in ["system", "developer"] -%}}
{{%- set ns.system = messages[0].content -%}}
{{%- set ns.first = 1 -%}}
{{%- endif -%}}
{{%- if ns.system -%}}
{{{{- {start} -}}}}
{{%- else -%}}
{{{{- {start_without_system} -}}}}
{{%- endif -%}}
{{%- for message in messages[ns.first:] -%}}
{{%- if message.role == "user" -%}}
{{{{- {user} -}}}}
{{%- elif message.role == "attributes" -%}}
{set_label}
{{%- elif message.role == "assistant" -%}}
{assistant}
{{%- else -%}}
{{{{- raise_exception("unknown role " ~ message.role ~
    ", known: system (first), user, assistant, attributes") -}}}}
{{%- endif -%}}
{{%- endfor -%}}
"""

_SET_LABEL = """\
{%- set ns.label = label_of(message.content) if message.content else "" -%}"""

_ASSISTANT = """\
{{%- if message.attributes is defined and message.attributes is not none -%}}
{{%- set ns.label = label_of(message.attributes) if message.attributes else "" -%}}
{{%- elif asked is not none and loop.last and not add_generation_prompt -%}}
{{%- set ns.label = asked -%}}
{{%- endif -%}}
{{%- if loop.last and not add_generation_prompt -%}}
{{%- if ns.label -%}}{{{{- {open_labelled} -}}}}{{%- else -%}}{{{{- {open} -}}}}{{%- endif -%}}
{{{{- {close} -}}}}
{{%- elif ns.label -%}}
{{{{- {answer_labelled} -}}}}
{{%- else -%}}
{{{{- {answer} -}}}}
{{%- endif -%}}
{{%- set ns.label = none -%}}"""

_PROMPT = """\
{{%- if add_generation_prompt -%}}
{{%- if asked is not none -%}}
{{%- set ns.label = asked -%}}
{{%- elif ns.label is none and defaults -%}}
{{%- set ns.label = label_of({{}}) -%}}
{{%- endif -%}}
{{%- if ns.label -%}}{{{{- {open_labelled} -}}}}{{%- else -%}}{{{{- {open} -}}}}{{%- endif -%}}
{{%- endif -%}}
"""

_SCORED = """\
{%- if not messages or messages[-1].role != "assistant" -%}
{{- raise_exception("the last message must be the assistant's, the answer to be scored") -}}
{%- endif -%}
"""

_SCORED_ASSISTANT = """\
{{%- if loop.last -%}}
{{{{- {open} ~ {close} -}}}}
{{%- else -%}}
{{{{- {answer} -}}}}
{{%- endif -%}}"""


def chat_template(template: Template, tokenizer: Tokenizer, facts: ModelFacts) -> str | None:
    """The Jinja text of a template, for a model that was trained with it.

    Of an attribute model it ends at the token whose scores are read, and has no labels.

    Returns:
        None where the template isn't put together of its turns, so that no such text is known.
    """
    scored = facts.kind == "attribute model"
    pieces = _pieces(template, scored=scored)
    if pieces is None:
        return None
    bos = _bos(template, tokenizer)
    shown = {
        key: _expression(bos + text if key.startswith("start") else text)
        for key, text in pieces.items()
    }
    shown["system"] = _literal(facts.system or "")
    if scored:
        assistant = _SCORED_ASSISTANT.format(**shown)
        text = _SCORED + _TURNS.format(**shown, set_label="", assistant=assistant)
    else:
        assistant = _ASSISTANT.format(**shown)
        text = _label_of(facts.schema, facts.default_label)
        text += _TURNS.format(**shown, set_label=_SET_LABEL, assistant=assistant)
        text += _PROMPT.format(**shown)
    return text if _writes_as(text, template, bos, facts) else None


def render(text: str, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
    """What transformers writes by a chat template.

    Raises:
        jinja2.TemplateError: for what the template refuses.
    """

    return _compiled(text).render(messages=messages, **arguments)


@functools.lru_cache(maxsize=8)  # an export renders the same template several times
def _compiled(text: str) -> jinja2.Template:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text)


def messages_of(system: str, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The chat messages of a conversation, labels included."""
    messages = [{"role": "system", "content": system}]
    for turn in turns:
        message = {"role": turn.role.lower(), "content": turn.value}
        if turn.role == ASSISTANT:
            message["attributes"] = turn.label or ""
        messages.append(message)
    return messages


def _label_of(schema: AttributeSchema | None, default_label: str | None) -> str:
    ranges = {name: list(schema.range_of(name)) for name in schema.names} if schema else {}
    defaults = parse_label(default_label) if default_label else {}
    return _LABEL_OF.format(
        defaults=json.dumps(defaults, ensure_ascii=False),
        ranges=json.dumps(ranges, ensure_ascii=False),
        known=_literal(", ".join(ranges) or "none, it was trained without labels"),
    )


def _pieces(template: Template, *, scored: bool) -> dict[str, str] | None:
    """What a template writes of each part of a conversation, with stand-ins for the contents.

    A part's beginning that all turns have in common may be counted to the part before it.
    """
    user, answer = Turn(USER, _CONTENT), Turn(ASSISTANT, _CONTENT)
    labelled = Turn(ASSISTANT, _CONTENT, _LABEL)

    def text(turns: Sequence[Turn] = (), label: str | None = None, system: str = _SYSTEM) -> str:
        return segments_to_text(template.prompt(system, turns, label))

    close = template.scored_response if scored else template.response
    asked = [text(), text([user]), text(label=_LABEL)]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*asked, strict=False))
    start = "".join(column[0] for column in same)
    opened = asked[0][len(start) :]
    pieces = {
        "start": start,
        "start_without_system": text(system="").removesuffix(opened),
        "open": opened,
        "open_labelled": asked[2][len(start) :],
        "user": asked[1][len(start) :].removesuffix(opened),
        "close": segments_to_text(close(_CONTENT)),
    }
    before = start + pieces["user"]
    pieces["answer"] = text([user, answer])[len(before) :].removesuffix(opened)
    pieces["answer_labelled"] = text([user, labelled])[len(before) :].removesuffix(opened)
    return pieces if opened else None


def _bos(template: Template, tokenizer: Tokenizer) -> str:
    """The token that `encode_prompt` puts before what the template writes."""
    first = template.prompt("", [], None)[0]
    if tokenizer.bos_id is None or (
        first.control and tokenizer.token_id(first.text) == tokenizer.bos_id
    ):
        return ""
    return tokenizer.decode([tokenizer.bos_id])


def _writes_as(text: str, template: Template, bos: str, facts: ModelFacts) -> bool:
    """Whether a chat template writes what the template does, of conversations of every form."""
    turns = [Turn(USER, "1"), Turn(ASSISTANT, "2"), Turn(USER, " 3\n"), Turn(ASSISTANT, "")]
    label = facts.default_label
    if label and facts.kind == "language model":
        turns[1] = Turn(ASSISTANT, "2", label)
    for system in ("", "4\n"):
        for length in range(1, len(turns) + 1):
            own, last = turns[:length], turns[length - 1]
            if facts.kind == "attribute model":
                if last.role != ASSISTANT:
                    continue
                ours = template.prompt(system, own[:-1], None)
                ours = [*ours, *template.scored_response(last.value)]
                theirs = render(text, messages_of(system, own))
            else:
                ours = template.prompt(system, own, label)
                messages = messages_of(system, own)
                theirs = render(text, messages, attributes=label or "", add_generation_prompt=True)
            if theirs != bos + segments_to_text(ours):
                return False
    return True


def _expression(text: str) -> str:
    """A text with stand-ins as a Jinja expression."""
    variables = {_SYSTEM: "ns.system", _CONTENT: "message.content", _LABEL: "ns.label"}
    parts = re.split(f"([{_SYSTEM}{_CONTENT}{_LABEL}])", text)
    return " ~ ".join(variables.get(part) or _literal(part) for part in parts if part) or '""'


def _literal(text: str) -> str:
    """A Jinja literal of a text."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
