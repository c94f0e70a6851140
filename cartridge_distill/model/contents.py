"""What users wrote, as token ids: text that names a control token is not that token.

A document about chat formats may say `<|im_end|>`. A tokenizer reads these letters as its control
token, and the turn that the document stands in would end there. Here the control tokens of a
rendered conversation are the chat template's own; in contents the same letters are tokenised as the
letters that they are. Contents without such letters get the ids that the tokenizer gives them.

How: a mark that no content holds is put inside each control token's name in the contents, before
the template is rendered. What is whole after that is the template's. Text with marks goes to a copy
of the tokenizer that knows the template's tokens under other names, and those in the contents not.

Control tokens are the tokenizer's special tokens, and the tags that its chat template names
(`<think>`, `<tool_call>`), which some tokenizers do not call special.

Not done here: prompts that a caller has rendered (`POST /v1/completions`); there the caller says
which tokens are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from cartridge_distill.util.errors import ConfigError

# Unicode's noncharacters, which no text should hold; a second pair for one that does.
_MARKS = tuple((chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2))
_TAG = re.compile(r"[<\[{|].+[>\]}|]", re.DOTALL)


class Contents:
    """The contents of one conversation, or one document, on their way through a template.

    Args:
        tokenizer: of transformers.
        texts: everything that users wrote.

    Raises:
        ConfigError: the texts hold every mark that there is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._control = _control_tokens(tokenizer)
        for inside, around in _MARKS:
            if not any(inside in text or around in text for text in texts):
                self._inside, self._around = inside, around
                return
        raise ConfigError(
            "the text holds all of U+FDD0 to U+FDEF, which Unicode keeps out of texts; fix: remove "
            "them"
        )

    @property
    def mark_character(self) -> str:
        """A character that stands in none of the texts."""
        return self._around

    def mark(self, text: str, thoughts_too: bool = True) -> str:
        """The text for the template: no control token's name is whole in it.

        Args:
            text: one of the texts.
            thoughts_too: False leaves tags that the tokenizer does not call special, as a model
                writes them: templates take the thoughts out of earlier answers.

        Raises:
            ConfigError: a control token of a single character stands in the text.
        """
        pattern = self._control.all_names if thoughts_too else self._control.special_names
        if pattern is None:
            return text
        parts, done = [], 0
        for found in re.finditer(f"(?={pattern.pattern})", text):
            if len(self._control.name_at(text, found.start())) < 2:
                raise self._cannot(text[found.start()])
            parts.append(text[done : found.start() + 1])
            done = found.start() + 1
        return self._inside.join([*parts, text[done:]])

    def unmarked(self, rendered: str) -> str:
        """A rendered text as people read it."""
        return rendered.replace(self._inside, "")

    def ids(self, rendered: str) -> list[int]:
        """Token ids of a text that was rendered from marked contents, no token added.

        Raises:
            ConfigError: the tokenizer cannot tell a control token from its name.
        """
        names = self._control.all_names
        if self._inside not in rendered:
            found = list(
                self._tokenizer(
                    rendered, add_special_tokens=False, split_special_tokens=False
                ).input_ids
            )
            # A normaliser may make a control token of letters that are none ("＜|im_end|＞").
            whole = len(names.findall(rendered)) if names is not None else 0
            if sum(token in self._control.ids for token in found) <= whole:
                return found
        return self._split(rendered)

    def _split(self, rendered: str) -> list[int]:
        copy, originals = self._control.copy(self._tokenizer, self._around)
        if copy is None or self._control.all_names is None:
            raise self._cannot(self._first_name(rendered))
        text = self._control.all_names.sub(
            lambda name: _alias(self._control.places[name[0]], self._around), rendered
        )
        ids = copy.encode(self.unmarked(text), add_special_tokens=False).ids
        for token in ids:
            if token in self._control.ids and token not in originals:
                raise self._cannot(str(self._tokenizer.convert_ids_to_tokens(token)))
        return [originals.get(token, token) for token in ids]

    def _first_name(self, rendered: str) -> str:
        names = self._control.all_names
        place = rendered.find(self._inside)
        if names is None or place < 1:
            return "a control token"
        return self._control.name_at(self.unmarked(rendered[place - 1 :]), 0)

    def _cannot(self, name: str) -> ConfigError:
        return ConfigError(
            f"The text holds {name!r}, which {type(self._tokenizer).__name__} of "
            f"{self._tokenizer.name_or_path or 'this model'!r} can only read as its control token: "
            "in a document or a message it would end or open a turn. Take it out of the text, or "
            "use the model's fast tokenizer (tokenizer.json)."
        )


def content_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that users wrote, with no template around it and no token added.

    Raises:
        ConfigError: the tokenizer cannot tell a control token from its name in the text.
    """
    contents = Contents(tokenizer, [text])
    return contents.ids(contents.mark(text))


class _ControlTokens:
    """The control tokens of a tokenizer, and copies of it that know them under other names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added: dict[int, AddedToken] = dict(tokenizer.added_tokens_decoder)
        special = set(tokenizer.all_special_tokens)
        special |= {token.content for token in added.values() if token.special}
        template = str(tokenizer.chat_template or "")
        named = {
            token.content
            for token in added.values()
            if _TAG.fullmatch(token.content) and token.content in template
        }
        self._added = added
        self.places = {name: place for place, name in enumerate(sorted(special | named))}
        self.all_names = _any_of(special | named)
        self.special_names = _any_of(special)
        # A text with letters outside the vocabulary has the unknown token without naming it.
        unknown = {tokenizer.unk_token, getattr(_model(tokenizer), "unk_token", None)}
        known = (tokenizer.convert_tokens_to_ids(name) for name in set(self.places) - unknown)
        self.ids = frozenset(token for token in known if token is not None)
        self._copies: dict[str, tuple[Tokenizer | None, dict[int, int]]] = {}

    def name_at(self, text: str, place: int) -> str:
        """The longest control token's name that begins at a place."""
        assert self.all_names is not None
        found = self.all_names.match(text, place)
        return found[0] if found else ""

    def copy(
        self, tokenizer: PreTrainedTokenizerBase, around: str
    ) -> tuple[Tokenizer | None, dict[int, int]]:
        """A tokenizer with aliases of the control tokens, and the real id of each added token.

        None for a tokenizer that is not one of the `tokenizers` library.
        """
        if around not in self._copies:
            self._copies[around] = self._copied(tokenizer, around)
        return self._copies[around]

    def _copied(
        self, tokenizer: PreTrainedTokenizerBase, around: str
    ) -> tuple[Tokenizer | None, dict[int, int]]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None, {}
        copy = Tokenizer(backend.model)
        if backend.normalizer is not None:
            copy.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            copy.pre_tokenizer = backend.pre_tokenizer
        names, added = {}, []
        for real, token in sorted(self._added.items()):
            place = self.places.get(token.content)
            name = token.content if place is None else _alias(place, around)
            names[name] = real
            # Stripping, whole words, normalising: as the template's own tokens have it.
            added.append(
                AddedToken(
                    name,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
            )
        copy.add_tokens(added)  # at once: after each call the library builds its search anew
        return copy, {copy.token_to_id(name): real for name, real in names.items()}


_known: WeakKeyDictionary[Any, tuple[Any, _ControlTokens]] = WeakKeyDictionary()


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    """As the tokenizer is now: special tokens and templates can be set later."""
    state = (tokenizer.chat_template, tuple(tokenizer.all_special_tokens))
    kept = _known.get(tokenizer)
    if kept is None or kept[0] != state:
        kept = state, _ControlTokens(tokenizer)
        _known[tokenizer] = kept
    return kept[1]


def _model(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """One of the names, the longest first, as tokenizers take them."""
    longest = sorted((name for name in names if name), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest))) if longest else None


def _alias(place: int, around: str) -> str:
    return f"{around}{place}{around}"
