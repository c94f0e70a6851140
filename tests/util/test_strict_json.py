"""JSON that has one meaning is read as Python reads it; everything else is refused, and quickly."""

from __future__ import annotations

import json

import pytest

from cartridge_distill.util.strict_json import MAX_DEPTH, MAX_NAMES, MAX_PARTS, BadJson, loads

GOOD = [
    b"{}",
    b'{"a": [1, 2.5, -3e10, null, true, "x"]}',
    '"\U0001f600 ä"'.encode(),
    b'"\\ud83d\\ude00"',  # a whole character, written as two halves
    b'"\\\\ud800"',  # a backslash and letters
    b'{"a": {"a": 1}, "b": {"a": 2}}',  # one name in two objects
    b'"' + b"[{:" * 100_000 + b'"',  # marks within a string
    b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
    b"[" + b",".join([b"7"] * 500_000) + b"]",
    b"1" * 4000,
]
BAD = {
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "Infinity": (b"[Infinity]", "Infinity"),
    "-Infinity": (b"[-Infinity]", "-Infinity"),
    "overflow": (b"[1e400]", "too large"),
    "negative overflow": (b"[-1e400]", "too large"),
    "many digits": (b"9" * 5000, "too many digits"),
    "half a character": (b'{"a": ["\\ud800"]}', "lone surrogate"),
    "the other half": (b'"x\\uDFFF"', "lone surrogate"),
    "half a character in a name": (b'{"\\ud800": 1}', "lone surrogate"),
    "half a character as it is": (b'"\xed\xa0\x80"', "no UTF-8"),
    "Latin-1": (b'"\xe4"', "no UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "no UTF-8"),
    "a mark of byte order": (b"\xef\xbb\xbf{}", "BOM"),
    "a name twice": (b'{"n": 1, "n": 100000}', "the name 'n' stands twice"),
    "a name twice, written otherwise": (b'{"n": 1, "\\u006e": 2}', "stands twice"),
    "a name twice, deeper": (b'[{"a": {"b": 1, "b": 1}}]', "stands twice"),
    "deep": (b"[" * 1_000_000, "nested too deep"),
    "deep, and whole": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "one level more": (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deep"),
    "many names": (json.dumps({str(n): 1 for n in range(MAX_NAMES + 1)}).encode(), "names"),
    "many lists": (b"[" + b",".join([b"[]"] * (MAX_PARTS + 1)) + b"]", "more than"),
    "nothing": (b"", "Expecting value"),
    "half of it": (b'{"a": ', "Expecting value"),
    "two of them": (b"{} {}", "Extra data"),
    "a control character": (b'"\x00"', "control character"),
}


@pytest.mark.parametrize("text", GOOD, ids=[text[:20].decode() for text in GOOD])
def test_what_json_is_is_read(text: bytes) -> None:
    assert loads(text) == json.loads(text)


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_meaning_or_two_is_refused_in_few_words(case: str) -> None:
    text, words = BAD[case]
    with pytest.raises(BadJson, match=words) as caught:
        loads(text)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()  # and can be sent back


def test_a_file_of_many_tensors_has_more_names() -> None:
    text = json.dumps({str(n): 1 for n in range(5000)}).encode()
    assert len(loads(text, MAX_PARTS)) == 5000
