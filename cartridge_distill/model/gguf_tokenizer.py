"""A tokenizer out of a GGUF file's own vocabulary, and the proof that a tokenizer survives saving.

A SentencePiece vocabulary (`tokenizer.ggml.model` "llama": Gemma, older Llama) stands in the file
as pieces with scores and kinds. SentencePiece joins neighbours whose union is a piece, the union
with the best score first. The same as a list of merges is what the `tokenizers` library runs.

transformers reads these vocabularies, too, but what it makes of Gemma's falls apart into letters
when it is saved and loaded again. `check_survives` is for any tokenizer that is saved.

Not done here: byte-level vocabularies ("gpt2"); transformers reads them right, which is checked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cartridge_distill.model.decode_gguf import Gguf, field, file_name, opened
from cartridge_distill.util.errors import ConfigError

_SPACE = "\u2581"
# Several scripts, numbers, code, white space: a tokenizer that loses one of them shows.
SAMPLES = (
    "The director of the museum, Dr. Ines Ostrander, opened it on 14 May 1987 with 2,310 exhibits.",
    "Die Brücke über den Fluß wurde größtenteils 1903 erneuert; «c'était déjà l'été à Nîmes».",
    "Директор музея открыл выставку. Ο διευθυντής άνοιξε την έκθεση. القط جالس على السجادة.",
    "博物館の館長は新しい展示を開きました。猫坐在垫子上。 박물관이 문을 열었다.",
    "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # m²\n\n\n\tprint(area(2))\n",
    "  two spaces,   three, a tab\tand emoji 🐈‍⬛ ☂, maths ∑ x² ≤ 10⁻³ µg/ml",
)
_OWN_PIECES, _WHOLE = 400, 0.9


class Kind(IntEnum):
    """What a piece is, in `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def sentencepiece_tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """The tokenizer of a file with a SentencePiece vocabulary; begin-of-text as the file says.

    Raises:
        ConfigError: another kind of vocabulary, or one that is not whole.
    """
    reader = opened(gguf)
    name = file_name(reader)

    def of(key: str, default: Any = None) -> Any:
        found = field(reader, f"tokenizer.ggml.{key}")
        return default if found is None else found

    if (model := of("model")) != "llama":
        raise ConfigError(
            f"{name}: its vocabulary is of the kind {model!r}, not SentencePiece's ('llama'); "
            "fix: take the model's folder from the Hub"
        )
    pieces, scores, kinds = of("tokens"), of("scores"), of("token_type")
    if not pieces or not scores or not kinds or not len(pieces) == len(scores) == len(kinds):
        raise ConfigError(
            f"{name}: tokens, scores and kinds of its vocabulary are not as many; the file is "
            "damaged, or was written without them; fix: take another copy of it"
        )
    unknown = of("unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: place for place, piece in enumerate(pieces)},
            merges=_merges(pieces, scores, kinds),
            unk_token=None if unknown is None else pieces[unknown],
            fuse_unk=True,
            byte_fallback=Kind.BYTE in kinds,
        )
    )
    prefix = bool(of("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    for kind, special in ((Kind.UNKNOWN, True), (Kind.CONTROL, True), (Kind.USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(piece, normalized=False, special=special)
                for piece in _of_kind(pieces, kinds, kind)
            ]
        )
    named = {
        f"{short}_token": pieces[place]
        for short, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (place := of(f"{key}_token_id")) is not None
    }
    if of("add_bos_token", True) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, of("bos_token_id"))],
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )
    made.chat_template = field(reader, "tokenizer.chat_template")
    return made


def _of_kind(pieces: Sequence[str], kinds: Sequence[int], kind: Kind) -> list[str]:
    return [piece for piece, found in zip(pieces, kinds, strict=True) if found == kind]


def _merges(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece, the pairs of the best piece first."""
    places = {piece: place for place, piece in enumerate(pieces) if kinds[place] == Kind.NORMAL}
    found = []
    for piece, place in places.items():
        for cut in range(1, len(piece)):
            left, right = places.get(piece[:cut]), places.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[place], place, left, right))
    found.sort()
    return [(pieces[left], pieces[right]) for _, _, left, right in found]


def check_survives(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Holds a tokenizer against what is loaded from the folder that it was saved in.

    Raises:
        ConfigError: text does not come back from its ids, the loaded one gives other ids, or words
            that are in the vocabulary come apart.
    """
    loaded = AutoTokenizer.from_pretrained(folder)
    fix = (
        "The folder is of no use. Put the tokenizer files of the model's publisher into it "
        "(tokenizer.json, tokenizer_config.json; --tokenizer FOLDER does so), or use another "
        "version of transformers."
    )
    for text in SAMPLES:
        before, after = (
            one(text, add_special_tokens=False).input_ids for one in (tokenizer, loaded)
        )
        if list(before) != list(after):
            raise ConfigError(
                f"The tokenizer does not survive saving: {text[:40]!r} has {len(before)} tokens "
                f"before and {len(after)} after it; fix: {fix}"
            )
        back = loaded.decode(after, clean_up_tokenization_spaces=False)
        if back != text:
            raise ConfigError(
                f"The tokenizer loses text: {text[:40]!r} comes back as {back[:40]!r}; fix: {fix}"
            )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        if getattr(tokenizer, name) != getattr(loaded, name):
            raise ConfigError(
                f"The tokenizer does not survive saving: its {name} is "
                f"{getattr(tokenizer, name)!r} before and {getattr(loaded, name)!r} after it; fix: "
                f"{fix}"
            )
    whole = share_of_whole_words(loaded)
    if whole < _WHOLE:
        raise ConfigError(
            f"The tokenizer takes words apart that are in its vocabulary: only {whole:.0%} of a "
            f"sample of them are one token; fix: {fix}"
        )


def share_of_whole_words(tokenizer: PreTrainedTokenizerBase) -> float:
    """Of words in the vocabulary, how many the tokenizer gives as one token; 0.97 to 1 is usual."""
    words = sorted(
        text
        for token in tokenizer.get_vocab().values()
        if (text := str(tokenizer.decode([token]))).isascii() and len(text) > 3 and text.isalpha()
    )
    picked = random.Random(0).sample(words, min(_OWN_PIECES, len(words)))
    if not picked:
        return 1.0
    one = sum(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in picked)
    return one / len(picked)
