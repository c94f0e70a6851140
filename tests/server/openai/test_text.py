"""Tokens as strings and bytes, and text that is never taken back, for vocabularies of all kinds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cartridge_distill.server.openai.answers import TokenLogprob
from cartridge_distill.server.openai.text import NO_PROBABILITY, AnswerText
from cartridge_distill.server.openai.tokens import TokenStrings
from cartridge_distill.server.rows import NewToken
from tests.tiny import byte_tokenizer

TEXTS = [
    "Plain words, and a full stop.",
    " a space first, two  in the middle, one at the end ",
    "Grüße, 漢字, und 👩‍👩‍👧 dann weiter",
    "\n\tlines\n\n and tabs",
    "😀",
    "don 't , clean . this ?",
]
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?'\u2581\u00fc\u6f22"


def sentencepiece(strips: bool, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Pieces with a letter for the space, and bytes for what is not in the vocabulary.

    Args:
        strips: a space is put before a text, and taken off again (Llama 2); else not (Gemma).
        metaspace: the same in one step, as newer files of SentencePiece models have it.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS]
    vocabulary = {name: number for number, name in enumerate(names)}
    for merged in ("\u2581a", "\u2581w", "wo", "\u2581\u2581"):
        vocabulary[merged] = len(vocabulary)
    merges = [(merged[0], merged[1]) for merged in ("\u2581a", "\u2581w", "wo", "\u2581\u2581")]
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "\u2581")
    if metaspace:
        scheme = "always" if strips else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        last: list[decoders.Decoder] = [decoders.Metaspace(prepend_scheme=scheme)]
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), *last])
    else:
        before = [normalizers.Prepend("\u2581"), spaces] if strips else [spaces]
        inner.normalizer = normalizers.Sequence(before)
        last = [decoders.Strip(" ", 1, 0)] if strips else []
        first = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence([*first, *last])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_pairs() -> PreTrainedTokenizerFast:
    """The byte-level vocabulary with a word added, and a mark that is special and has no role."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("weiter", normalized=False)])
    tokenizer.add_tokens([AddedToken("<mark>", special=True)])
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_tokenizer,
    "bytes, one added": byte_pairs,
    "sentencepiece that strips": lambda: sentencepiece(True),
    "sentencepiece": lambda: sentencepiece(False),
    "metaspace that strips": lambda: sentencepiece(True, metaspace=True),
    "metaspace": lambda: sentencepiece(False, metaspace=True),
}


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def shown(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], *stops: str, reason: str = "length"
) -> tuple[list[str], list[TokenLogprob], str]:
    """Pieces, log-probs and the reason of an answer of these tokens."""
    ends = frozenset([tokenizer.eos_token_id])
    text = AnswerText(tokenizer, TokenStrings(tokenizer), ends, stops)
    pieces = [piece for id_ in ids if (piece := text.add(NewToken(id_, -1.0, []))) is not None]
    assert all(piece.text for piece in pieces)
    last, why = text.finish(reason)
    pieces.append(last)
    return [p.text for p in pieces], [entry for p in pieces for entry in p.logprobs], why


def raw(entries: list[TokenLogprob]) -> bytes:
    return bytes(byte for entry in entries for byte in entry.bytes or ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_and_bytes_add_up_to_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    pieces, entries, _ = shown(tokenizer, ids)
    found = "".join(pieces)
    assert found == decoded(tokenizer, ids)
    assert found.strip() == text.strip()  # what a vocabulary makes of spaces is its own
    assert raw(entries).decode() == found
    assert len(entries) == len(ids)
    for entry in entries:
        assert entry.bytes is not None
        if entry.token.startswith("bytes:"):
            assert entry.token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
        else:
            assert entry.token.encode() == bytes(entry.bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_model_writes(kind: str) -> None:
    """Random tokens, broken characters among them: pieces add up to the text, and bytes to both."""
    tokenizer = KINDS[kind]()
    draw = random.Random(kind)
    ordinary = [id_ for id_ in range(len(tokenizer)) if decoded(tokenizer, [id_])]
    for length in (1, 2, 3, 5, 8, 40):
        for _ in range(20):
            ids = draw.choices(ordinary, k=length)
            pieces, entries, _ = shown(tokenizer, ids)
            text = "".join(pieces)
            assert len(entries) == length
            if "\ufffd" not in text:
                assert text == decoded(tokenizer, ids)
                assert raw(entries).decode() == text
            if kind.startswith("bytes"):
                assert text == decoded(tokenizer, ids) == raw(entries).decode(errors="replace")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_cuts_text_and_tokens_alike(kind: str) -> None:
    tokenizer = KINDS[kind]()
    text = "Grüße 漢字 und dann weiter"
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    for begin in range(1, len(text)):
        for end in (begin + 1, begin + 3):
            stop = text[begin:end]
            place = text.find(stop)
            pieces, entries, why = shown(tokenizer, ids, "never", stop)
            assert ("".join(pieces), why) == (text[:place], "stop")
            covered = raw(entries)
            assert covered.startswith(text[:place].encode())
            # No token more than the one in which the text ends.
            assert len(raw(entries[:-1])) < max(1, len(text[:place].encode()))


def test_what_may_begin_a_stop_string_is_held_back_and_given_when_it_is_none() -> None:
    tokenizer = byte_tokenizer()
    ids = list(tokenizer("aXaXYb", add_special_tokens=False).input_ids)
    pieces, _, why = shown(tokenizer, ids, "XYZ", reason="length")
    assert pieces == ["a", "Xa", "XYb", ""] and why == "length"
    pieces, _, _ = shown(tokenizer, ids[:5], "XYZ")
    assert pieces == ["a", "Xa", "XY"]  # at the end it is text


def test_half_a_character_is_held_back_until_it_is_whole_or_broken() -> None:
    tokenizer = byte_tokenizer()
    ids = list(tokenizer("a😀b", add_special_tokens=False).input_ids)
    pieces, entries, _ = shown(tokenizer, ids)
    assert pieces == ["a", "😀", "b", ""]
    assert [entry.token for entry in entries] == [
        "a",
        *("bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"),
        "b",
    ]
    pieces, entries, _ = shown(tokenizer, [*ids[:3], ids[0]])
    assert "".join(pieces) == "a\ufffda" and len(entries) == 4
    pieces, entries, _ = shown(tokenizer, ids[:3])
    assert "".join(pieces) == "a\ufffd" and len(entries) == 3
    # A stop string behind a broken character: the broken one is text, and the stop's token is not.
    pieces, entries, _ = shown(tokenizer, [*ids[:3], ids[-1]], "b")
    assert "".join(pieces) == "a\ufffd" and len(entries) == 3


def test_special_tokens_are_no_text_and_an_end_is_an_end() -> None:
    tokenizer = byte_pairs()
    a, b, mark = tokenizer("ab<mark>", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces, entries, why = shown(tokenizer, [a, bos, mark, b, eos, a])
    assert ("".join(pieces), why) == ("ab", "stop")
    assert [entry.token for entry in entries] == ["a", "b"]


def test_tokens_that_are_no_text_have_no_bytes() -> None:
    tokenizer = byte_tokenizer()
    strings = TokenStrings(tokenizer)
    assert strings.shown(tokenizer.eos_token_id, first=False) == ("<eos>", None)
    assert strings.shown(len(tokenizer) + 5, first=False) == ("<264>", None)
    text = AnswerText(tokenizer, strings, frozenset(), [])
    piece = text.add(NewToken(10, -2.0, [(10, -2.0), (257, float("-inf"))]))
    assert piece is not None
    never = piece.logprobs[0].top_logprobs[1]
    assert (never.token, never.bytes, never.logprob) == ("<eos>", None, NO_PROBABILITY)


def test_a_vocabulary_of_whole_words_is_decoded_token_by_token() -> None:
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "good": 1, "##ness": 2}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    assert TokenStrings(tokenizer).shown(1, first=True) == ("good", list(b"good"))
