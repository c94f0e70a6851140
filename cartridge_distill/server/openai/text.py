"""From tokens to text that is never taken back, and the log-probs that belong to it.

Held back are characters of which only some bytes have come, and what may turn out to be the
beginning of a stop string. Whole answers are made of the same pieces as streams, so the two are
equal.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cartridge_distill.server.openai.answers import Finish, TokenLogprob, TopLogprob
from cartridge_distill.server.openai.tokens import TokenStrings
from cartridge_distill.server.rows import NewToken

# What OpenAI's documentation has for a token that is next to impossible; JSON has no infinity.
NO_PROBABILITY = -9999.0
_HALF = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """What can be shown: text, and the tokens that begin in it."""

    text: str
    logprobs: list[TokenLogprob]


class AnswerText:
    """The text of one choice.

    Args:
        tokenizer: the model's.
        strings: of the same tokenizer, where log-probs are asked for.
        end_ids: tokens that end an answer; they are no part of its text.
        stops: strings, none empty, of which the first that comes ends the text before itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        strings: TokenStrings | None,
        end_ids: frozenset[int],
        stops: Sequence[str],
    ) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._end_ids, self._stops = end_ids, stops
        self._longest = max((len(stop) for stop in stops), default=1)
        self._ids: list[int] = []
        # Decoded are a few tokens at a time: those from _context on, of which all before _read
        # have become text already.
        self._context = self._read = 0
        self._text = ""
        self._unread = ""
        self._sent = 0
        self._searched = 0
        self._cut: int | None = None
        self._ended = False
        self._pending: deque[tuple[int, TokenLogprob]] = deque()

    def add(self, new: NewToken) -> Piece | None:
        """What can be shown now that this token has come."""
        if self._ended or self._cut is not None:
            return None
        if new.id in self._end_ids:
            self._ended = True
            return None
        self._ids.append(new.id)
        before, fresh = self._unread, self._fresh()
        if self._strings is not None and not self._strings.is_special(new.id):
            self._note(self._logprob(new), before, fresh)
        self._unread = fresh
        if not fresh or fresh.endswith(_HALF):
            return None
        self._context, self._read = self._read, len(self._ids)
        self._text += fresh
        self._unread = ""
        self._search()
        end = len(self._text) - self._held_back() if self._cut is None else self._cut
        return self._release(end) if end > self._sent else None

    def finish(self, reason: str) -> tuple[Piece, Finish]:
        """What is left when no more tokens come, and why the answer ends.

        Args:
            reason: the engine's, "stop" or "length". It calls an answer too long that ends with the
                very last token allowed; one that ended by itself there has stopped.
        """
        if self._cut is None:
            self._text += self._fresh()
            self._search()
        if self._cut is not None:
            return self._release(self._cut), "stop"
        piece = self._release(len(self._text))
        piece.logprobs.extend(entry for _, entry in self._pending)
        return piece, "length" if reason == "length" and not self._ended else "stop"

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _fresh(self) -> str:
        """The text of what has come since the last piece."""
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _note(self, entry: TokenLogprob, before: str, fresh: str) -> None:
        """Keeps a token's log-probs with the place in the text at which it begins.

        Args:
            before, fresh: the text behind that of the pieces, without and with the token.
        """
        # A token that completes a character begins where that character does.
        same = min(len(os.path.commonprefix([before, fresh])), max(0, len(fresh) - 1))
        place = len(self._text) + same
        for number in range(len(self._pending) - 1, -1, -1):
            if self._pending[number][0] <= place:
                break
            self._pending[number] = (place, self._pending[number][1])
        self._pending.append((place, entry))

    def _search(self) -> None:
        """Looks for the first place of a stop string."""
        begin = max(0, self._searched - self._longest + 1)
        found = [place for stop in self._stops if (place := self._text.find(stop, begin)) >= 0]
        self._searched = len(self._text)
        if found:
            self._cut = min(found)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), len(self._text) + 1))
                if self._text.endswith(stop[:length])
            ),
            default=0,
        )

    def _release(self, end: int) -> Piece:
        entries = []
        while self._pending and self._pending[0][0] < end:
            entries.append(self._pending.popleft()[1])
        text = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return Piece(text, entries)

    def _logprob(self, new: NewToken) -> TokenLogprob:
        first = len(self._ids) == 1
        top = [self._shown(token, logprob, first) for token, logprob in new.likeliest]
        shown = self._shown(new.id, new.logprob, first)
        return TokenLogprob(**dict(shown), top_logprobs=top)

    def _shown(self, token: int, logprob: float, first: bool) -> TopLogprob:
        assert self._strings is not None
        string, raw = self._strings.shown(token, first)
        return TopLogprob(token=string, bytes=raw, logprob=max(logprob, NO_PROBABILITY))
