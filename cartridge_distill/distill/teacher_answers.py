"""Answers that the teacher writes: the base model, the document before the prompt, no cartridge.

Before a general prompt (``data.general``) stands what the bare model begins with, and no document.

They come from the same server as the student's. A document that is missing, or too long together
with the prompt, is an error before anything is asked: an answer without its document would be the
bare model's. That the server really read the document is proven later, when the trainer compares
the answer's log-probs with its own teacher's.

A cache on disk spares later runs the writing. One file an answer, named by a hash of everything
that the answer follows from, written whole or not at all: any number of processes, also on several
machines, may share the directory. A damaged file is written anew, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.general import BARE
from cartridge_distill.data.records import Document
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import DocumentError
from cartridge_distill.util.files import replace_file

logger = logging.getLogger(__name__)

FORMAT = "cartridge-distill-answer/1"
_KEPT = ("token_ids", "logprobs", "finish_reason")  # of an answer, in its file


class AnswerCache:
    """Answers by key. A key is a mapping of plain values; equal keys mean the same answer.

    Args:
        directory: made when it is not there.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).expanduser()
        self._directory.mkdir(parents=True, exist_ok=True)

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the answer is, or would be."""
        name = _sha256({"format": FORMAT, **key})
        return self._directory / name[:2] / f"{name}.json"

    def get(self, key: Mapping[str, Any]) -> Completion | None:
        """The answer; None when there is none that is whole."""
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            return self._damaged(path, str(error))
        try:
            entry = json.loads(text)
            body, checksum = entry["answer"], entry["sha256"]
            answer = Completion(**body)
        except (ValueError, TypeError, KeyError) as error:
            return self._damaged(path, f"{type(error).__name__}: {error}")
        if entry.get("key") != dict(key) or checksum != _sha256([dict(key), body]):
            return self._damaged(path, "its checksum is another")
        return answer

    @staticmethod
    def _damaged(path: Path, problem: str) -> None:
        logger.warning("%s is damaged (%s); the answer is written anew", path, problem)

    def put(self, key: Mapping[str, Any], answer: Completion) -> None:
        """Stores an answer, in place of one that is there."""
        path = self.path(key)
        body = {name: getattr(answer, name) for name in _KEPT}
        entry = {"key": dict(key), "answer": body, "sha256": _sha256([dict(key), body])}

        def write(scratch: Path) -> None:
            scratch.write_text(json.dumps(entry), encoding="utf-8")

        # Not flushed: an answer that a crash of the machine damages fails its checksum.
        replace_file(path, write, overwrite=True, flush=False)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


Ask = Callable[[list[int], float, int], Awaitable[Completion]]
"""Asks the server: (prompt ids, temperature, seed) -> the answer."""


class TeacherWriter:
    """Writes the teacher's answers, or finds them.

    Args:
        documents: where the texts are.
        render: text -> token ids, as the trainer's teacher renders it.
        context: positions the model was made for.
        max_tokens: new tokens at most.
        temperature: of the sampling.
        base_model: stands for the model's weights, see
            :func:`cartridge_distill.model.identity.model_identity`.
        cache: None writes every answer.
        begin: what the bare model begins with, before general prompts.
    """

    def __init__(
        self,
        documents: DocumentStore,
        render: Callable[[str], list[int]],
        context: int,
        max_tokens: int,
        temperature: float,
        base_model: str,
        cache: AnswerCache | None = None,
        begin: Sequence[int] = (),
    ) -> None:
        self._documents = documents
        self._render = render
        self._context = context
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._base_model = base_model
        self._cache = cache
        self._begin = list(begin)
        self._rendered: dict[str, tuple[str, list[int]]] = {}

    def _document(self, document_id: str | None) -> tuple[str, list[int]]:
        """SHA-256 of the text, and its token ids; of no document what the bare model begins with.

        The one hash that is empty is of no text, so that a cache cannot take one for the other.
        """
        if document_id is BARE:
            return "", self._begin
        if document_id not in self._rendered:
            text = self._documents.text(document_id)
            self._rendered[document_id] = Document.of(document_id, text).sha256, self._render(text)
        return self._rendered[document_id]

    async def write(
        self, document_id: str | None, prompt_ids: Sequence[int], seed: int, ask: Ask
    ) -> tuple[Completion, bool]:
        """One answer, and whether it came from the cache.

        Args:
            document_id: of the document that stands before the prompt; ``BARE`` for none.
            prompt_ids: the prompt alone, as the student gets it.
            seed: of this answer; another one gives another answer.
            ask: called when the cache has none.

        Raises:
            DocumentError: the document is missing, or too long for the context.
        """
        sha256, document = self._document(document_id)
        total = len(document) + len(prompt_ids) + self._max_tokens
        if total > self._context:
            name = "the begin-of-text" if document_id is BARE else f"document {document_id!r}"
            raise DocumentError(
                f"{name} has {len(document)} tokens: with a prompt of "
                f"{len(prompt_ids)} and an answer of up to {self._max_tokens} that is {total}, and "
                f"the model's context is {self._context}, so the teacher cannot write the answer; "
                "fix: split the document, or let the student write (on_policy_fraction=1)"
            )
        ids = [*document, *prompt_ids]
        if self._cache is None:
            return await ask(ids, self._temperature, seed), False
        key = {
            "base_model": self._base_model,
            "document_sha256": sha256,
            "ids_sha256": _sha256(ids),
            "temperature": float(self._temperature),
            "max_tokens": self._max_tokens,
            "seed": seed,
        }
        answer = self._cache.get(key)
        if answer is not None:
            return answer, True
        answer = await ask(ids, self._temperature, seed)
        self._cache.put(key, answer)
        return answer, False
