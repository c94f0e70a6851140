"""Tokens as OpenAI shows them: a string, and the bytes that it stands for.

A token of a byte-level vocabulary may be a part of a character. Its bytes are known, its string is
not: ``bytes:\\xe2\\x82`` is shown. Bytes put together and decoded give the answer's text.

Read are vocabularies of bytes (GPT-2's alphabet: Llama 3, Qwen, SmolLM) and of SentencePiece with
bytes as a fallback (Llama 2, Gemma, Mistral). For any other the token is decoded by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 are their own letters; the others take the letters from 256 on.
    """
    letters, others = {}, 0
    for byte in range(256):
        if chr(byte).isprintable() and not chr(byte).isspace():
            letters[chr(byte)] = byte
        else:
            letters[chr(256 + others)] = byte
            others += 1
    return letters


class TokenStrings:
    """Strings and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Decoding leaves out what is marked so, whether or not the tokenizer has a use for it.
        marked = (id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._special = frozenset([*tokenizer.all_special_ids, *marked])

    def is_special(self, token: int) -> bool:
        """Whether the token is left out of texts."""
        return token in self._special

    def shown(self, token: int, first: bool) -> tuple[str, list[int] | None]:
        """The string and the bytes of a token; the bytes are None where nobody knows them.

        Args:
            first: whether it begins the answer; some vocabularies leave its space out there.
        """
        if self.is_special(token):
            return str(self._tokenizer.convert_ids_to_tokens(token)), None
        raw = self._bytes(token)
        if raw is None:
            return str(self._tokenizer.convert_ids_to_tokens(token) or f"<{token}>"), None
        if first and self._drops_first_space:
            raw = raw.removeprefix(b" ")
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def _bytes(self, token: int) -> bytes | None:
        added = self._added.get(token)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None  # models have more logits than their tokenizers have tokens
        piece = str(piece)
        kinds = {part["type"] for part in self._decoder}
        if "ByteLevel" in kinds and all(letter in self._alphabet for letter in piece):
            return bytes(self._alphabet[letter] for letter in piece)
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if self._has_space_letter:
            return piece.replace(_SPACE, " ").encode()
        text = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return None if "\ufffd" in text else text.encode()

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        return _byte_alphabet()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {id_: str(token) for id_, token in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _decoder(self) -> list[dict[str, Any]]:
        """The steps that make text of pieces."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        return [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))

    @cached_property
    def _has_space_letter(self) -> bool:
        return any(
            step["type"] == "Metaspace"
            or step["type"] == "Replace"
            and step["pattern"] == {"String": _SPACE}
            for step in self._decoder
        )

    @cached_property
    def _drops_first_space(self) -> bool:
        return any(
            step["type"] == "Strip"
            and step["start"]
            or step["type"] == "Metaspace"
            and step.get("prepend_scheme") != "never"
            for step in self._decoder
        )


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder
