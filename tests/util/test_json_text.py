"""JSON that people write: what is no text is refused, before it ends a command that writes it."""

from __future__ import annotations

import pytest

from cartridge_distill.util.json_text import JsonError, loads


def test_half_a_character_is_refused() -> None:
    for text in ('["\\ud800?"]', '{"a\\uDFFF": 1}', '["\\udc00\\ud800"]'):
        with pytest.raises(JsonError, match="half a character"):
            loads(text)
    assert loads('["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]
