"""Secrets are kept out of what is printed and written: messages, logs, records of runs.

Passwords and keys come from the environment or a file. Where they stand in a URL, in a value of a
command line or in a variable of the environment, `masked` takes them out of a text. It is the only
place that knows what a secret looks like, and rather masks too much.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MASK = "***"
LEAST_LENGTH = 8
"""Of a variable's value that is masked. A choice: keys are longer, and words such as `false`, which
would be masked wherever they stand, are shorter."""

_URL_USER = re.compile(
    r"(?P<scheme>(?<![\w+.-])[a-zA-Z][\w+.-]*://)(?:[^\s/?#\"<>]*|[^\s/@:\"<>]*:[^\s@\"<>]*)@"
)
"""Also of a password that has a "/" in it, with which it is no URL."""
_PORT_BEFORE_PATH = re.compile(r"://[^\s/@]*:\d+[/?#]")
_BARE_USER = re.compile(r"(?<![\w/.@+%~-])[\w.+%~-]+:[^\s/:'\"<>{}]+@(?=[\w\[])")
"""A URL without its scheme."""
_INTERPOLATION = re.compile(r"(?:\$\{[^}]*\})+")
_NAME = (
    r"(?:api[_-]?key|access[_-]?key|(?:access|auth|bearer|github|hf|secret)[_-]?token"
    r"|secret(?:[_-]?key)?|private[_-]?key|passw(?:or)?d|credentials?)"
)
"""What a value is called that is a secret; `eos_token` and `max_tokens` are none."""
_SECRET_KEY = re.compile(rf"(?i)(?:.*[._-])?{_NAME}|(?:.*\.)?token")
_ASSIGNED = re.compile(
    rf"(?i)(?<![\w?&;.-])((?:(?:[\w.-]*[._-])?{_NAME}['\"]?(?:=|:\s*)"
    r"|(?:[\w.-]*\.)?token(?:=|['\"]:\s*))['\"]?)(?!\$\{)[^\s'\",;}\]]+"
)
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:key|secret|token|passw|credential|signature)[\w.-]*|sig|auth)=)"
    r"[^\s&#'\"<>]+"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
_HUB_TOKEN = re.compile(r"\bhf_\w{16,}")
_SECRET_VARIABLE = re.compile(
    r"(?:.*_)?(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?|AUTH)(?:_.*)?",
    re.IGNORECASE,
)
_INTERPOLATED: set[str] = set()


def masked(text: str) -> str:
    """A text without the secrets in it.

    They are users with passwords and keys in URLs, values that a name calls a key or a password,
    the values of such variables of the environment, and those of a config's `${oc.env:NAME}`, in
    whose place that stands.
    """
    for name, value in _secret_variables():
        shown = f"${{oc.env:{name}}}" if name in _INTERPOLATED else MASK
        text = text.replace(value, shown)
    text = _URL_USER.sub(_without_user, text)
    text = _BARE_USER.sub(f"{MASK}@", text)
    for pattern in (_QUERY, _ASSIGNED, _BEARER):
        text = pattern.sub(lambda match: match[1] + MASK, text)
    return _HUB_TOKEN.sub(MASK, text)


def masked_values(value: Any, key: str = "") -> Any:
    """Plain nested values without the secrets in their texts.

    Args:
        key: the name of the value.
    """
    if isinstance(value, str):
        return MASK if list(named_secrets(value, key)) else masked(value)
    if isinstance(value, Mapping):
        return {name: masked_values(item, str(name)) for name, item in value.items()}
    return [masked_values(item, key) for item in value] if isinstance(value, list) else value


def named_secrets(value: Any, key: str = "") -> Iterator[str]:
    """Dotted names of the texts in nested values that a name calls a key or a password, unless they
    interpolate a variable."""
    if isinstance(value, str):
        if value and "${" not in value and _SECRET_KEY.fullmatch(key.rpartition(".")[2]):
            yield key
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from named_secrets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from named_secrets(item, key)


def comparable_values(value: Any, key: str = "") -> Any:
    """As `masked_values`, but values that differ stay different: each secret text has its digest
    beside it."""
    if isinstance(value, str):
        shown = masked_values(value, key)
        if shown == value:
            return value
        return f"{shown} (sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]})"
    if isinstance(value, Mapping):
        return {name: comparable_values(item, str(name)) for name, item in value.items()}
    return [comparable_values(item, key) for item in value] if isinstance(value, list) else value


def mask_variables(names: Iterable[str]) -> None:
    """Mask the values of these variables, too, from now on: a config has them as `${oc.env:NAME}`.

    Paths and numbers stay as they are.
    """
    _INTERPOLATED.update(names)


def _without_user(match: re.Match[str]) -> str:
    whole = match[0]
    user, _, password = whole.removeprefix(match["scheme"])[:-1].partition(":")
    if _PORT_BEFORE_PATH.search(whole):  # http://host:8000/path@version
        return whole
    if _INTERPOLATION.fullmatch(password or user):  # it says only where the secret is
        return whole
    return f"{match['scheme']}{MASK}@"


def _secret_variables() -> list[tuple[str, str]]:
    """(name, value), the longest first: one may be part of another."""
    found = [
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= LEAST_LENGTH
        and (_SECRET_VARIABLE.fullmatch(name) or name in _INTERPOLATED)
        and not name.upper().endswith(("_FILE", "_PATH", "_DIR"))
        and not _is_plain(value)
    ]
    return sorted(found, key=lambda pair: len(pair[1]), reverse=True)


def _is_plain(value: str) -> bool:
    """Whether a value is a path or a number."""
    is_path = value.startswith(("/", "~", "./", "../"))
    return is_path or re.fullmatch(r"[\d.,:+-]*", value) is not None
