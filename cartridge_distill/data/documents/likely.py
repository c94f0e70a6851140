"""Which encoding gives the likeliest text, among those of the web (WHATWG) and older Macs.

Each character that is not ASCII costs by its neighbours: nothing for a letter that goes on in the
script and the case of the word around it; something for a letter that is rare in its script, or, in
Latin, of another language than the text's other letters; much for a sign inside a word (the `³` of
`Br³cke`), a capital behind a small letter, or a letter of another script than its neighbours. The
mean over the characters is the text's unlikeliness.

The frequencies of whole languages are not looked at: a text of some words must do.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

_LOOKED_AT = 4_000  # characters that are not ASCII

# Python's codecs, the commonest first. DOS code pages are not the web's, but for cp866.
_ENCODINGS = (
    *("cp1252", "cp1251", "cp1250", "euc_kr", "shift_jis", "euc_jp", "gb18030", "big5"),
    *("koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp874", "iso8859_2"),
    *("iso8859_5", "iso8859_7", "cp866", "mac_roman", "koi8_u"),
)
# The standard, and the first bytes of its commonest characters.
_FIRST_LEVELS = {
    "gb18030": ("gb2312", 0xB0, 0xD7),
    "gbk": ("gb2312", 0xB0, 0xD7),
    "big5": ("big5", 0xA4, 0xC6),
    "shift_jis": ("shift_jis", 0x88, 0x97),
    "euc_jp": ("shift_jis", 0x88, 0x97),
    "euc_kr": ("euc_kr", 0xB0, 0xC8),
    # as Python calls what the web means by some of these names
    "cp932": ("shift_jis", 0x88, 0x97),
    "cp949": ("euc_kr", 0xB0, 0xC8),
    "big5hkscs": ("big5", 0xA4, 0xC6),
}
_WEB_NAMES = {
    **{f"cp125{n}": f"windows-125{n}" for n in range(9)},
    "cp874": "windows-874",
    "iso8859_2": "iso-8859-2",
    "iso8859_5": "iso-8859-5",
    "iso8859_7": "iso-8859-7",
    "koi8_r": "koi8-r",
    "koi8_u": "koi8-u",
    "cp866": "ibm866",
    "mac_roman": "macintosh",
    "euc_jp": "euc-jp",
    "euc_kr": "euc-kr",
}
# The letters beyond a to z of languages that are written together: a text keeps to one of these.
_FAMILIES = tuple(
    frozenset(letters)
    for letters in (
        "äöüßéèêëàâæçùûîïíìóòôõœñáúãåøÿ",  # western Europe
        "áéíóúýþæöð",
        "áčďéěíňóřšťúůýžöü",
        "áäčďéíĺľňóôŕšťúýž",
        "ąćęłńóśźżéöü",
        "áéíóöőúüű",
        "ăâîșşţțé",
        "čćđšžëç",
        "çğıöşüâîû",
        "āčēģīķļņšūžõąęėįųäöü",
        "ĉĝĥĵŝŭéœ",
    )
)
_SELDOM = frozenset("фщъэцюшёѓќћљњџўҐѕ" + "ψ")
_PUNCTUATION = frozenset("«»„“”‘’‚–—…·•§©®°€£¿¡№、。，：；？！（）「」『』《》【】・ー～　\u00a0")
_SIGNS = frozenset("±×÷²³¹½¼¾µ°™→←≤≥≈−")
_RARE, _ODD = 0.3, 2.0


@dataclass(frozen=True)
class Likely:
    """The whole text, the encoding under its name on the web, and how unlikely the text is."""

    text: str
    encoding: str
    cost: float


def likeliest(data: bytes) -> Likely | None:
    """The best of the encodings in which all of the bytes mean something; None without any."""
    texts: dict[str, str] = {}
    for encoding in _ENCODINGS:
        try:
            texts[encoding] = data.decode(encoding)
        except UnicodeDecodeError:
            continue
    costs = {encoding: unlikeliness(text, encoding) for encoding, text in texts.items()}
    best = min(costs, key=lambda encoding: costs[encoding], default=None)  # the first of equals
    if best is None or costs[best] >= _ODD:
        return None
    return Likely(texts[best], _WEB_NAMES.get(best, best), costs[best])


def unlikeliness(text: str, encoding: str) -> float:
    """The mean cost of the characters that are not ASCII; 0 is likely, above 1 is no text.

    Args:
        text: the text.
        encoding: Python's name of the one it was read with: which characters are common is
            another matter in each of those for Chinese, Japanese and Korean.
    """
    cost, count = 0.0, 0
    latin: Counter[str] = Counter()
    before = " "
    for place, char in enumerate(text):
        if not char.isascii():
            after = text[place + 1] if place + 1 < len(text) else " "
            cost += _cost(before, char, after, encoding)
            latin[char.lower()] += _script(char) == "latin"
            count += 1
            if count == _LOOKED_AT:
                break
        before = char
    strange = min(sum(latin[char] for char in latin if char not in f) for f in _FAMILIES)
    return (cost + _RARE * strange) / count if count else 0.0


def _cost(before: str, char: str, after: str, encoding: str) -> float:
    script = _script(char)
    if script == "control":
        return 2 * _ODD
    around = [neighbour for neighbour in (before, after) if neighbour.isalpha()]
    if script == "sign":
        if char in _PUNCTUATION:
            # An apostrophe or a dot may stand inside a word, and in Chinese anything does.
            inside = len(around) == 2 and all(_script(one) != "han" for one in around)
            return _ODD / 2 if inside and char not in "’·–—-" else 0.0
        if char in _SIGNS and len(around) < 2:
            return 0.0
        return _ODD if len(around) == 2 else _ODD / 2
    if script == "han":
        return 0.0 if _is_common(char, encoding) else _ODD / 2
    if any(_script(one) not in (script, "han") for one in around):
        return _ODD
    if char.isupper() and before.isalpha() and before.islower():
        return _ODD
    if char.islower() and before.isupper() and after.isupper():
        return _ODD
    if char.isupper() and (before.isupper() or after.isupper()):
        return _RARE / 3
    if script == "latin":  # never a whole word of accents
        between = len(around) == 2 and not any(neighbour.isascii() for neighbour in around)
        return _RARE if between else 0.0
    return _RARE if char.lower() in _SELDOM else 0.0


@lru_cache(maxsize=8192)
def _script(char: str) -> str:
    """latin, cyrillic, han (with kana and Hangul), ...; "sign" for what is no letter."""
    category = unicodedata.category(char)
    if category in ("Cc", "Co", "Cn"):
        return "control"
    if category[0] not in "LM":
        return "sign"
    name = unicodedata.name(char, "").split(" ")[0].split("-")[0].lower()
    if name in ("cjk", "hiragana", "katakana", "hangul"):
        return "han"
    return name


@lru_cache(maxsize=8192)
def _is_common(char: str, encoding: str) -> bool:
    """A character of the first level of the encoding's standard; kana in a Japanese one."""
    standard, first, last = _FIRST_LEVELS.get(encoding, ("", 0, 0))
    if "\u3040" <= char <= "\u30ff":
        return standard == "shift_jis"
    try:
        return bool(standard) and first <= char.encode(standard)[0] <= last
    except UnicodeEncodeError:
        return False
