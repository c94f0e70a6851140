"""A document to be studied: its text, sections, questions, and the parts the teacher reads.

A source comes from a LongHealth record or from a file. One that fits the teacher's context is its
own and only part. A longer one is cut into parts (chunking.py), each a document with an id of its
own, `<id>#<n>` counted from 1; a prompt then names the part it came from, and the teacher scores it
with that part in context. The cartridge is one for the whole all the same.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import httpx

from cartridge_distill.data.documents import structure
from cartridge_distill.data.documents.blocks import Form
from cartridge_distill.data.documents.chunking import chunk_text
from cartridge_distill.data.documents.reading import KINDS, ReadFile, read_documents
from cartridge_distill.data.documents.usable import usable, usable_in_record
from cartridge_distill.data.records import Document, Question, Record, parse_records, sha256_of
from cartridge_distill.data.words import normalised
from cartridge_distill.util import json_text
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.lfs import refuse_pointers
from cartridge_distill.util.secrecy import clean_text

LONGHEALTH = "https://raw.githubusercontent.com/kbressem/LongHealth/main/data/benchmark_v5.json"
# The heading of a record's text: a short beginning that ends in a colon.
_RECORD_HEADING = re.compile(r"^\W*([A-Z][\w ,/&-]{1,38}):\s")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Section:
    """What stands under a heading (None where there is none): `text[start:end]` of the source."""

    heading: str | None
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """What the teacher reads at once: `text[start:end]` of the source."""

    document: Document
    start: int
    end: int
    torn: bool = False


@dataclass(frozen=True)
class Source:
    """One document.

    Attributes:
        document_id: unique among the sources.
        title: how a prompt names it; `with_own_names` sees to it that no other has the same.
        text: all of it.
        sections: in order.
        parts: what the teacher reads, in order; together they are the text.
        questions: for the evaluation; never trained on.
        kind: a "record" has one fact a line and medical prompts; "file" is any text.
        form: which rules the structure of the text is read by.
    """

    document_id: str
    title: str
    text: str
    sections: tuple[Section, ...]
    parts: tuple[Part, ...]
    questions: tuple[Question, ...] = ()
    kind: Literal["record", "file"] = "file"
    form: Form = "plain"

    @classmethod
    def of_record(cls, record: Record) -> Source:
        text = record.document
        found: list[Section] = []
        end = len(text) - sum(len(part) + 2 for part in record.texts)
        for part in record.texts:
            start, end = end + 2, end + 2 + len(part)
            heading = _RECORD_HEADING.match(part)
            body = start + (heading.end() if heading else 0)
            found.append(Section(heading.group(1).strip() if heading else None, body, end))
        whole = Part(Document.of(record.document_id, text), 0, len(text))
        return cls(
            *(record.document_id, record.name, text, tuple(found), (whole,)),
            questions=record.questions,
            kind="record",
        )

    @classmethod
    def of_file(cls, read: ReadFile) -> Source:
        whole = Part(Document.of(read.document_id, read.text, read.title), 0, len(read.text))
        found = tuple(Section(*section) for section in structure.sections(read.text, read.form))
        return cls(read.document_id, read.title, read.text, found, (whole,), form=read.form)

    def split(self, limit: int | None, length: Callable[[str], int]) -> Source:
        """With parts of at most `limit` tokens; itself where the whole text is not longer.

        Args:
            limit: tokens the teacher reads at once; None is no limit.
            length: tokens of a text as the teacher reads it.

        Raises:
            DocumentError: the limit is too small for any text.
        """
        if limit is None or length(self.text) <= limit:
            return self
        sha256 = sha256_of(self.text)
        title = self.parts[0].document.title or self.title
        parts = []
        for number, chunk in enumerate(chunk_text(self.text, limit, length, self.form), 1):
            document = replace(
                Document.of(f"{self.document_id}#{number}", chunk.text, title),
                parent_id=self.document_id,
                parent_sha256=sha256,
            )
            parts.append(Part(document, chunk.start, chunk.end, chunk.torn))
        return replace(self, parts=tuple(parts))

    def part_at(self, offset: int) -> Part:
        """The part that holds the character at this offset of the text."""
        starts = [part.start for part in self.parts]
        return self.parts[max(0, bisect_right(starts, offset) - 1)]

    def sentences(self, section: Section, span: Part | None = None) -> list[str]:
        """The sentences of a section, or of what of it stands in one part.

        In a record a line end ends a sentence, in a file it does not.
        """
        start, end = section.start, section.end
        if span is not None:
            start, end = max(start, span.start), min(end, span.end)
        text = self.text[start:end]
        if self.kind == "record":
            return structure.shortened(structure.line_sentences(text))
        return structure.sentences(text, self.form)


def load_sources(data: str, say: Say, skip_unreadable: bool = False) -> list[Source]:
    """Reads records (a JSON file, a URL, `longhealth`) or documents (a file, a folder).

    Args:
        data: where they are.
        say: gets a line about each file that was read or skipped.
        skip_unreadable: of a folder: leave files out that cannot be read.

    Raises:
        ConfigError: records that cannot be read or are not in LongHealth's schema.
        DocumentError: documents that cannot be read.
    """
    if not data.strip():
        raise ConfigError(
            "--data is empty, and would mean this folder; fix: name the data (. is this folder)"
        )
    path = Path(data)
    remote = data == "longhealth" or data.startswith(("http://", "https://"))
    are_records = remote or path.suffix.lower() == ".json" and not path.is_dir()
    if not are_records and (path.exists() or path.suffix.lower() in KINDS):
        reading = read_documents(path, skip_unreadable)
        for line in reading.skipped:
            say(f"skipped {line}")
        for read in reading.documents:
            found = usable(read.text, read.form)
            say("; ".join([f"read {read.document_id}: {found.line()}", *read.notes]))
            for warning in found.warnings():
                say(f"warning: {read.document_id}: {warning}")
        return with_own_names([Source.of_file(read) for read in reading.documents])
    records = [Source.of_record(r) for r in parse_records(_records_text(data, say), data)]
    for source in records:
        said = (sentence for section in source.sections for sentence in source.sentences(section))
        found = usable_in_record(source.text, said)
        say(f"read {source.document_id}: {found.line()}")
        for warning in found.warnings():
            say(f"warning: {source.document_id}: {warning}")
    return with_own_names(records)


def with_own_names(sources: Sequence[Source]) -> list[Source]:
    """The same, where no two have one title: those that had get their id behind it.

    A prompt names its document by the title. Two documents of one title would be asked the same,
    and the student would be told two answers.
    """
    known = Counter(normalised(source.title) for source in sources)
    return [
        replace(source, title=f"{source.title}, {source.document_id}")
        if known[normalised(source.title)] > 1
        else source
        for source in sources
    ]


def _records_text(data: str, say: Say) -> str:
    data = LONGHEALTH if data == "longhealth" else data
    try:
        if data.startswith(("http://", "https://")):
            say(f"Downloading {clean_text(data)} ...")
            return json_text.decode(_download(data))
        refuse_pointers(Path(data))
        return json_text.decode(Path(data).read_bytes())
    except (OSError, json_text.JsonError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"{data} cannot be read: {error}; fix: give with --data a JSON file of records or its "
            f"URL, a folder of documents, or one document ({', '.join(KINDS)}). Without a network, "
            "copy LongHealth's data/benchmark_v5.json to this machine"
        ) from error


def _download(url: str) -> bytes:
    """What is behind a URL. What a redirect leads to elsewhere gets no password of the URL's.

    Raises:
        ConfigError: the URL holds a password, and the server redirects to another one.
        httpx.HTTPError: there is nothing.
    """
    asked = httpx.URL(url)

    def stay(request: httpx.Request) -> None:
        if asked.userinfo and _origin(request.url) != _origin(asked):
            raise ConfigError(
                f"{asked.host} redirects to {request.url.host}, and the URL of the data holds a "
                "user or a password, which is not for that host, port or scheme; fix: give the "
                "other one's URL"
            )

    with httpx.Client(follow_redirects=True, timeout=60, event_hooks={"request": [stay]}) as http:
        return http.get(asked).raise_for_status().content


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def choose(sources: Sequence[Source], wanted: Sequence[str] | None) -> list[Source]:
    """The sources named, in the order named; all when none is named.

    Raises:
        ConfigError: an unknown id, or one named twice.
    """
    if not wanted:
        return list(sources)
    by_id = {source.document_id: source for source in sources}
    for name in wanted:
        if name not in by_id:
            raise ConfigError(f"there is no patient {name!r}; fix: name one of {', '.join(by_id)}")
        if wanted.count(name) > 1:
            raise ConfigError(f"--patients names {name!r} twice; fix: name it once")
    return [by_id[name] for name in wanted]
