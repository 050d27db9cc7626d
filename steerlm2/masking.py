"""Secrets are kept out of what is printed and written: messages, logs, records of runs.

Passwords and keys come from the environment or a file. Where they stand in a URL, in a value of a
command line or in a variable of the environment, `masked` takes them out of a text. It is the only
place that knows what a secret looks like, and rather masks too much.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MASK = "***"
LEAST_LENGTH = 8
"""Of a variable's value that is masked. A choice: keys are longer, and words such as `false`, which
would be masked wherever they stand, are shorter."""

_INNER_QUOTE = r"(?<![,:{\[\s])\"(?![,:}\]\s])"
"""One that neither begins nor ends a text of JSON; a shell's quotes make '"'"' of a quote."""
_URL_USER = re.compile(
    r"(?P<scheme>(?<![\w+.-])[a-zA-Z][\w+.-]*://)"
    rf"(?:(?:{_INNER_QUOTE}|[^\s/?#\"<>])*|[^\s/@:\"<>]*:(?:{_INNER_QUOTE}|[^\s@\"<>])*)@"
)
"""Also of a password that has a "/" in it, with which it is no URL."""
_PORT_BEFORE_PATH = re.compile(r"://[^\s/@]*:\d+[/?#]")
_BARE_USER = re.compile(r"(?<![\w/.@+%~-])[\w.+%~-]+:[^\s/:'\"<>{}]+@(?=[\w\[])")
"""A URL without its scheme."""
_INTERPOLATION = re.compile(r"(?:\$\{[^}]*\})+")
_NAME = (
    r"(?:api[_-]?key|access[_-]?key"
    r"|(?:access|api|auth|bearer|bot|github|hf|refresh|secret|session)[_-]?token"
    r"|secret(?:[_-]?key)?|private[_-]?key|passw(?:or)?d|passphrase|credentials?)"
)
"""What a value is called that is a secret; `eos_token` and `max_tokens` are none."""
_SECRET_KEY = re.compile(rf"(?i)(?:.*[._-])?{_NAME}|(?:.*\.)?token")
_ASSIGNED = re.compile(
    rf"(?i)(?<![\w?&;.-])((?:(?:[\w.-]*[._-])?{_NAME}['\"]?(?:=|:\s*)"
    rf"|(?:[\w.-]*\.)?token(?:=|['\"]:\s*))['\"]?)(?!\$\{{)(?:'\"'\"'|[^\s'\",;}}\]])+"
)
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w.-]*(?:key|secret|token|passw|credential|signature)[\w.-]*|sig|auth)=)"
    r"[^\s&#'\"<>]+"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
_HUB_TOKEN = re.compile(r"\bhf_\w{16,}")
_SECRET_VARIABLE = re.compile(
    r".*(?:API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_.*)?"
    r"|(?:.*_)?(?:AUTH|KEY|PASS|PAT|PW|SSHPASS)(?:_.*)?|.*_PWD",
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
        for spelled in _spellings(value):
            text = text.replace(spelled, shown)
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
    if list(_named(value, key)):
        return MASK
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {name: masked_values(item, str(name)) for name, item in value.items()}
    return [masked_values(item, key) for item in value] if isinstance(value, list) else value


def named_secrets(value: Any, key: str = "") -> Iterator[str]:
    """Dotted names of the texts and numbers in nested values that a name calls a key or a password,
    unless they interpolate a variable."""
    yield from _named(value, key)
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from named_secrets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from named_secrets(item, key)


def _named(value: Any, key: str) -> Iterator[str]:
    """The key, if its text or number is a secret."""
    is_given = isinstance(value, int) and not isinstance(value, bool)
    is_given = is_given or (isinstance(value, str) and bool(value) and "${" not in value)
    if is_given and _SECRET_KEY.fullmatch(key.rpartition(".")[2]):
        yield key


def comparable_values(value: Any, key: str = "") -> Any:
    """As `masked_values`, but values that differ stay different: beside each secret text stands a
    digest, slow enough (0.2 s) that weak passwords can't be tried out quickly."""
    if isinstance(value, str | int):
        shown = masked_values(value, key)
        if shown == value:
            return value
        return f"{shown} ({_digest(str(value))})"
    if isinstance(value, Mapping):
        return {name: comparable_values(item, str(name)) for name, item in value.items()}
    return [comparable_values(item, key) for item in value] if isinstance(value, list) else value


@functools.cache
def _digest(secret: str) -> str:
    # The salt is the same everywhere: a later run has to find the same digest.
    digest = hashlib.pbkdf2_hmac("sha256", secret.encode(), b"steerlm2", 300_000, dklen=8)
    return f"PBKDF2 {digest.hex()}"


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
        and not name.upper().endswith(("_FILE", "_PATH", "_DIR"))
        and (_is_key(name, value) or (name in _INTERPOLATED and not _is_plain(value)))
    ]
    return sorted(found, key=lambda pair: len(pair[1]), reverse=True)


def _is_key(name: str, value: str) -> bool:
    """Whether a variable is called a key; but for a key's file. A key too may begin with "/"."""
    return _SECRET_VARIABLE.fullmatch(name) is not None and not os.path.exists(value)


def _is_plain(value: str) -> bool:
    """Whether a value is a path or a number."""
    is_path = value.startswith(("/", "~", "./", "../"))
    return is_path or re.fullmatch(r"[\d.,:+-]*", value) is not None


def _spellings(value: str) -> list[str]:
    """A value as texts have it: as it is, in a shell's quotes, in YAML's, in JSON, in Python."""
    spelled = [value, value.replace("'", "'\"'\"'"), value.replace("'", "''")]
    spelled += [json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]]
    return list(dict.fromkeys([*spelled, repr(value)[1:-1]]))
