"""One document for a command that takes one: read as ``prepare`` reads it, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cartridge_distill.data.documents.source import Source, load_sources
from cartridge_distill.util.errors import DocumentError

_SHOWN = 5


def one_document(path: Path, say: Callable[[str], None] = lambda line: None) -> Source:
    """The document of a file of text, Markdown, HTML, PDF or records; or of a folder with one.

    Args:
        say: gets a line about how it was read.

    Raises:
        ConfigError: records that cannot be read.
        DocumentError: it cannot be read, or there are several.
    """
    sources = load_sources(str(path.expanduser()), say)
    if len(sources) > 1:
        names = ", ".join(source.document_id for source in sources[:_SHOWN])
        more = ", ..." if len(sources) > _SHOWN else ""
        raise DocumentError(
            f"{path} holds {len(sources)} documents ({names}{more}); fix: name a file with one"
        )
    return sources[0]
