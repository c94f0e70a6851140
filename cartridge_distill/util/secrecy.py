"""The one filter for everything that is written or shown: no password, no token, no key.

Recipes, logs, errors, printed commands and what a cartridge says of itself pass through here. What
is hidden:

- user and password of a URL, and its query;
- values whose name says what they are (``api_key=``, ``"token": ``, ``X-Api-Key: ``,
  ``--password``);
- what has the shape of a token (``hf_...``, ``sk-...``, ``Bearer ...``);
- the values of this process's own environment variables that are called like a credential.

A name that merely looks like a credential is hidden as well: a hidden setting costs a look into
the configuration, a shown password costs the account. What cannot be told from other text, such as
a bare word, is shown: credentials belong into the environment.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "(not recorded)"

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_SURE = frozenset(
    "password passwords passwd passphrase pwd secret secrets credential credentials apikey "
    "accesskey secretkey privatekey authtoken accesstoken refreshtoken bearer authorization "
    "cookie cookies jwt".split()
)
_OWNERS = frozenset(
    "api access account private secret auth oauth session refresh client modal proxy hub hf "
    "huggingface wandb openai aws azure gcp github gitlab gateway tokasaurus ssh master "
    "encryption signing deploy storage service".split()
)
# Of settings and messages: the name of a column, of a special token, of an entry.
_NO_CREDENTIAL = {
    "key": frozenset(
        "prompt video videos teacher fn image images audio tools tool model response messages "
        "message thinking document source data reward label labels question answer input output "
        "sort primary foreign cache full dict map index row column partition group uid text stem "
        "item shape lora attention query num kv rope frozen trainable metric monitor config "
        "override public missing unknown".split()
    ),
    "token": frozenset(
        "eos bos pad unk sep cls mask special end start begin stop image audio video dp max min "
        "num new last first next prompt response think per each".split()
    ),
}
_JOINED = re.compile(r"(?:api|access|secret|private|auth|modal|hub|hf|wandb|openai)(?:key|token)s?")
_SWITCHES = ("-u", "--user", "--proxy-user", "-U")  # of curl and its kin: user:password

_NAME = re.compile(r"(?<![\w.+-])[A-Za-z_+~-][\w.+-]*(?=\\*[\"']?\s{0,3}[:=])")
_BETWEEN = re.compile(r"\\*[\"']?\s{0,3}(?::=|=>|==|[:=])\s*")
_LINE = re.compile(r"\\*[\"']?[^\n\"'\\}]*")
_VALUE = re.compile(
    r"""b?\\+"[^"\\]*\\*"?"""
    r"""|b?"(?:[^"\\]|\\.)*"?"""
    r"""|b?'(?:[^'\\]|\\.)*'?"""
    r"|(?:Bearer|Basic|Digest|Token|ApiKey)\s+[^\s,;\"'}\])]+"
    r"|\{[^{}]*\}?|\[[^\[\]]*\]?|\([^()]*\)?"
    r"|(?:[^\s,;&}\])\"'|\\]|,(?!\s|[\w.-]+[=:]|$))+",
    re.IGNORECASE,
)
_FLAG = re.compile(
    r"(?<!\S)(--?[A-Za-z][\w-]*)(\s+)(?!-|\(not recorded\))(\"[^\"]*\"|'[^']*'|[^\s\"']+)"
)
# Nothing is lost by showing these: switches, places for a value, what is hidden already.
_HARMLESS = re.compile(
    r"(?:none|null|true|false|yes|no|on|off|\$\{?\w+\}?|<[^>]*>|\*+|\.{2,}|%[sr]|\{\w*\}|"
    r"(?:bearer\s+)?(?:token|key|secret|password|\$\{?\w+\}?)|value|missing|wrong|not|"
    r"\(not recorded\))?",
    re.IGNORECASE,
)
_PROSE = re.compile(r"\b(?:a|an|no|one|per|each|every|of|end|first|last|next)\s$")
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d+)?")

_PORT = r"\d{1,5}(?:[/?#,;)\]}\s\"']|$)"
_USER_OF_URL = re.compile(
    r"(?<=://)(?:[^/\s\"']{0,512}@"
    rf"|[^/\s\"':@]*:(?!{_PORT})(?:(?!://)[^\s\"']){{0,512}}@)"  # a slash in a password
)
_QUERY_OF_URL = re.compile(r"(://[^\s\"'?#]{0,1024})[?#][^\s\"'\]]*")
_SHAPES = re.compile(
    r"\bhf_(?=\w*(?:\d|[A-Z])|\w{16})[A-Za-z0-9]{8,}"
    r"|\bsk-[\w-]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\bxox[abprs]-[\w-]{10,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\b(?:ak|as|wk|ws)-[A-Za-z0-9]{16,}"  # Modal's
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r"|(?<=\bBearer )(?=\S*[\dA-Z_.-])(?!TOKEN\b)[\w.~+/=-]{8,}"
    r"|(?<=\bBasic )(?=\S*(?:\d|=|[a-z][A-Z]))[\w+/=-]{8,}"
)
_LEAST_SECRET = 8  # characters; a shorter value of the environment may be a common word


@functools.lru_cache(maxsize=4096)
def is_secret(name: str, surely: bool = False) -> bool:
    """Whether a name is a credential's.

    Args:
        name: of a setting, an option, a variable, a header, a key of JSON.
        surely: only where no other meaning is likely, so that it may be refused.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or name.startswith("--no-"):
        return False
    if not _SURE.isdisjoint(words) or any(_JOINED.fullmatch(word) for word in words):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ("key", "token", "keys", "tokens") and before in _OWNERS:
        return True
    if surely:
        return False
    if last == "auth":
        return True
    return last in _NO_CREDENTIAL and before not in _NO_CREDENTIAL[last]


def clean_text(text: str) -> str:
    """Text as it may be shown; the same text where it holds no credential."""
    for value in _own_values():
        text = text.replace(value, HIDDEN)
    text = _QUERY_OF_URL.sub(r"\1", _USER_OF_URL.sub("", text))
    text = _SHAPES.sub(HIDDEN, text)
    parts, done = [], 0
    for _, start, end in _assigned(text):
        if start < done:
            continue
        value = text[start:end]
        quote = re.match(r"b?\\*[\"']", value)
        around = quote[0] if quote else ""
        closing = around.removeprefix("b") if value.endswith(around.removeprefix("b")) else ""
        parts += [text[done:start], around, HIDDEN, closing]
        done = end
    text = "".join([*parts, text[done:]])
    return _FLAG.sub(_without_value, text)


def clean_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command as they may be shown: ``--api-key X``, ``a.token=X``, ``-u X:Y``."""
    shown: list[str] = []
    hide_next = after_user = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        secret = "://" not in name and ":" not in name and is_secret(name)
        if (hide_next and not argument.startswith("-")) or (after_user and ":" in argument):
            shown.append(HIDDEN)
        elif secret and equals:
            shown.append(argument if _is_harmless(name, value) else f"{name}={HIDDEN}")
        else:
            shown.append(clean_text(argument))
        hide_next = secret and not equals and argument.startswith("-")
        after_user = argument in _SWITCHES
    return shown


def clean_settings(value: Any, name: str = "") -> Any:
    """Settings as they may be written: the same structure of dicts and lists, without secrets.

    Args:
        value: of JSON or YAML.
        name: what it is the value of.
    """
    if isinstance(value, Mapping):
        if name and is_secret(name) and value:
            return HIDDEN
        return {key: clean_settings(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(inner, str) for inner in value):
            return [HIDDEN] * len(value) if name and is_secret(name) else clean_arguments(value)
        return [clean_settings(inner, name) for inner in value]
    if name and is_secret(name) and not _is_harmless(name, str(value)):
        return HIDDEN
    return clean_text(value) if isinstance(value, str) else value


def named_secrets(text: str) -> list[str]:
    """Names in a text that surely have a credential as their value; ``URL`` for a URL with one."""
    found = [name for name, _, _ in _assigned(text) if is_secret(name, surely=True)]
    return [*found, *(["URL"] if _USER_OF_URL.search(text) else [])]


def _assigned(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of each value that its name says is a secret."""
    for found in _NAME.finditer(text):
        name = found[0]
        if not is_secret(name):
            continue
        between = _BETWEEN.match(text, found.end())
        assert between is not None  # the name's pattern looked ahead
        if ":" in between[0] and (
            name.lower() == "key"
            or (name == "token" and _PROSE.search(text[max(0, found.start() - 8) : found.start()]))
        ):
            continue  # "the end token: every answer ..."
        whole_line = name.lower().endswith(("authorization", "cookie"))
        value = (_LINE if whole_line else _VALUE).match(text, between.end())
        if value is None or _is_harmless(name, value[0]):
            continue
        yield name, value.start(), value.end()


def _is_harmless(name: str, value: str) -> bool:
    bare = value.removeprefix("b").strip("\\\"' \t")
    if _HARMLESS.fullmatch(bare):
        return True
    words = [word.lower() for word in _WORD.findall(name)]
    if words[-1] == "auth" and len(words) > 1:  # proxy_auth: a switch, or user:password
        return ":" not in bare.rstrip(":")
    # A number may be a password; as a key or a token it is a count or a place.
    return _SURE.isdisjoint(words) and _NUMBER.fullmatch(bare) is not None


def _without_value(found: re.Match[str]) -> str:
    flag, space, value = found.groups()
    hide = is_secret(flag) or (flag in _SWITCHES and ":" in value)
    return f"{flag}{space}{HIDDEN}" if hide and not _is_harmless(flag, value) else found[0]


def _own_values() -> list[str]:
    """The credentials in this process's environment, the longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret(name) and not (os.path.isabs(value) and os.path.exists(value))  # PWD
    }
    return sorted((v for v in values if len(v) >= _LEAST_SECRET), key=len, reverse=True)
