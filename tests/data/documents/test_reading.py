"""Files of every kind give their text, or an error that names the file and the fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cartridge_distill.data.documents.reading import read_documents, read_file
from cartridge_distill.data.documents.source import Source, load_sources
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.data.documents.made import encrypted, prose, sentence, write_pdf, write_typeset_pdf

PAGE = """<!doctype html><html><head><title> The  harbour </title>
<style>p { color: red }</style></head>
<body><nav><a href="/">Home</a></nav>
<main><h1>Harbour</h1><p>It opened in <b>1871</b>. See <a href="x.html">the pier</a>.</p>
<h2>Ships</h2><ul><li>Anna</li><li>Berta_2</li></ul>
<table><tr><th>ship</th><th>year</th></tr><tr><td>Anna</td><td>1880</td></tr></table>
<script>track("visitor")</script></main>
<footer>Imprint</footer></body></html>"""


def words(text: str) -> str:
    return " ".join(text.split())


def test_text_and_markdown_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Plain text.\n\nSecond paragraph.\n")
    (tmp_path / "b.md").write_text("# The title\n\n*Marked* text, [linked](x).\n")
    plain, marked = read_documents(tmp_path).documents
    assert (plain.document_id, plain.title) == ("a.txt", "a")
    assert plain.text == "Plain text.\n\nSecond paragraph."
    assert (marked.document_id, marked.title) == ("b.md", "The title")
    assert marked.text == "# The title\n\n*Marked* text, linked."


def test_a_page_gives_its_main_text_with_its_structure(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    read = read_file(tmp_path / "page.html")
    assert read.title == "The harbour"
    assert "# Harbour\n" in read.text and "## Ships\n" in read.text
    assert "It opened in **1871**. See the pier." in read.text
    assert "* Anna\n* Berta_2" in read.text
    assert "| Anna | 1880 |" in read.text
    for noise in ("Home", "Imprint", "track", "color", "x.html"):
        assert noise not in read.text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("Grüße aus Århus.".encode(), "Grüße aus Århus."),
        ("Grüße aus Århus.".encode("utf-8-sig"), "Grüße aus Århus."),
        ("Grüße aus Århus.".encode("utf-16"), "Grüße aus Århus."),
        (b"One line.\r\nAnother.\rThird.", "One line.\nAnother.\nThird."),
    ],
)
def test_certain_encodings(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    read = read_file(tmp_path / "a.txt")
    assert (read.text, read.notes) == (expected, ())


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    text = "Die Prüfung der Brücke über den Fluß dauerte länger, als die Behörde gewünscht hätte. "
    (tmp_path / "a.txt").write_bytes((text * 5).encode("cp1252"))
    read = read_file(tmp_path / "a.txt")
    assert read.text == (text * 5).strip()
    assert "a guess" in read.notes[0]


def test_what_a_page_declares_is_believed_when_it_is_true(tmp_path: Path) -> None:
    page = '<html><head><meta charset="koi8-r"></head><body><p>Мост открыт.</p></body></html>'
    (tmp_path / "a.html").write_bytes(page.encode("koi8-r"))
    read = read_file(tmp_path / "a.html")
    assert (read.text, read.notes) == ("Мост открыт.", ())
    wrong = page.replace("koi8-r", "no-such-encoding")
    (tmp_path / "b.html").write_text(wrong)
    assert read_file(tmp_path / "b.html").text == "Мост открыт."


def test_a_pdf_of_200_pages(tmp_path: Path) -> None:
    pages = [" ".join(sentence(page * 20 + line) for line in range(20)) for page in range(200)]
    write_pdf(tmp_path / "long.pdf", pages, title="All districts")
    read = read_file(tmp_path / "long.pdf")
    assert (read.title, read.notes) == ("All districts", ("200 pages",))
    assert words(read.text) == " ".join(pages)


def test_a_sentence_goes_on_over_the_page(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["It began here and", "ended there.", "A new one."])
    assert read_file(tmp_path / "a.pdf").text == "It began here and\nended there.\n\nA new one."


def test_a_typeset_pdf(tmp_path: Path) -> None:
    paragraphs = prose(60).split("\n\n")
    write_typeset_pdf(tmp_path / "a.pdf", paragraphs)
    assert words(read_file(tmp_path / "a.pdf").text) == " ".join(paragraphs)


def test_pages_without_text_are_named(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["First.", "", "Third.", ""])
    read = read_file(tmp_path / "a.pdf")
    assert read.text == "First.\n\nThird."
    assert "no text on 2 of them (2, 4)" in read.notes[1]


def test_an_encrypted_pdf_that_opens_without_a_password_is_read(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["Open to all."])
    (tmp_path / "a.pdf").write_bytes(encrypted(tmp_path / "a.pdf", ""))
    assert read_file(tmp_path / "a.pdf").text == "Open to all."


def bad_files(folder: Path) -> dict[str, str]:
    """Makes a file of each kind that cannot be read; the name and what the error must say."""
    write_pdf(folder / "scan.pdf", ["", "", ""])
    write_pdf(folder / "locked.pdf", ["Secret."])
    (folder / "locked.pdf").write_bytes(encrypted(folder / "locked.pdf", "word"))
    write_pdf(folder / "cut.pdf", ["A page."])
    (folder / "cut.pdf").write_bytes((folder / "cut.pdf").read_bytes()[:300])
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.md").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (folder / "photo.pdf").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "script.html").write_text("<html><body><script>show()</script></body></html>")
    (folder / "half.txt").write_bytes("Text".encode("utf-16") + b"\x00")
    (folder / "deep.html").write_text("<div>" * 5000 + "x" + "</div>" * 5000)
    return {
        "scan.pdf": "no text on any of its 3 pages: a scan; fix: run OCR",
        "locked.pdf": "is encrypted, and opens with a password only",
        "cut.pdf": "is no PDF that can be read",
        "empty.txt": "is empty; fix: put text in",
        "blank.md": "is empty; fix: put text in",
        "binary.txt": "is a binary file",
        "photo.pdf": "is no PDF that can be read",
        "script.html": "is a page without text",
        "half.txt": "begins as utf-16 text, but not all of it is",
        "deep.html": "nests its tags too deeply",
    }


def test_what_cannot_be_read_says_why_and_how_to_fix_it(tmp_path: Path) -> None:
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(DocumentError) as caught:
            read_file(tmp_path / name)
        assert f"{tmp_path / name} " in str(caught.value) and says in str(caught.value), name


def test_a_folder_with_unreadable_files_is_refused_naming_all_of_them(tmp_path: Path) -> None:
    bad = bad_files(tmp_path)
    (tmp_path / "good.txt").write_text("A good one.")
    with pytest.raises(DocumentError) as caught:
        read_documents(tmp_path)
    assert f"{len(bad)} of {len(bad) + 1} files" in str(caught.value)
    assert all(name in str(caught.value) for name in bad)
    assert "--skip-unreadable" in str(caught.value)
    reading = read_documents(tmp_path, skip_unreadable=True)
    assert [document.document_id for document in reading.documents] == ["good.txt"]
    assert len(reading.skipped) == len(bad)


def test_folders_below_other_kinds_copies_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "b.md").write_text("Text of b.")
    (tmp_path / "a.txt").write_text("Text of a.")
    (tmp_path / "copy.txt").write_text("Text of a.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("Not this.")
    reading = read_documents(tmp_path)
    assert [document.document_id for document in reading.documents] == ["a.txt", "part/b.md"]
    same, unknown = sorted(reading.skipped)
    assert same == "copy.txt: the same text as a.txt"
    assert unknown.startswith("picture.png: not a kind that is read (.png; known: .txt")


def test_links_and_pipes_are_not_left_out_in_silence(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("Text of b.")
    (folder / "a.txt").write_text("Text of a.")
    (folder / "b.txt").symlink_to(elsewhere / "b.txt")
    (folder / "more").symlink_to(elsewhere)
    (folder / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    reading = read_documents(folder)
    assert [document.document_id for document in reading.documents] == ["a.txt", "b.txt"]
    assert sorted(reading.skipped) == [
        "gone.txt: a link to nowhere.txt, which does not exist",
        "more: a link to a folder, which is not followed",
        "pipe.txt: no file (a pipe, a socket or a device)",
    ]
    with pytest.raises(DocumentError, match="pipe.txt is no file"):
        read_documents(folder / "pipe.txt")


def test_many_files_of_a_kind_that_is_not_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text of a.")
    for number in range(9):
        (tmp_path / f"{number}.gif").write_bytes(b"GIF")
    (tmp_path / "b.docx").write_bytes(b"PK")
    pictures, letter = sorted(read_documents(tmp_path).skipped)
    assert pictures.startswith("0.gif, 1.gif, 2.gif and 6 more files like them: not a kind")
    assert letter.endswith(
        "convert it first: pandoc FILE.docx -o FILE.md, or save it as PDF or HTML"
    )


def test_no_name_is_not_this_folder() -> None:
    for name in ("", " "):
        with pytest.raises(ConfigError, match="--data is empty"):
            load_sources(name, print)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(
        DocumentError, match="no document in it; fix: name one with a readable .txt"
    ):
        read_documents(tmp_path)
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    with pytest.raises(DocumentError, match="sheet.xlsx: not a kind that is read"):
        read_documents(tmp_path)
    with pytest.raises(DocumentError, match="sheet.xlsx: not a kind that is read"):
        read_documents(tmp_path / "sheet.xlsx")
    with pytest.raises(DocumentError, match="absent does not exist"):
        read_documents(tmp_path / "absent")


def test_each_kind_is_read_by_its_own_rules(tmp_path: Path) -> None:
    (tmp_path / "care.txt").write_text("Care\n~~~~\n\nOil the axle each spring.\n")
    (tmp_path / "care.md").write_text("---\ntitle: All care\n---\n# Care\n\nOil the axle.\n")
    (tmp_path / "care.html").write_text("<title>Axles</title><h2>Care</h2><p>Oil the axle.</p>")
    write_pdf(tmp_path / "care.pdf", ["# Care is taken. Oil the axle."])
    found = {Path(read.document_id).suffix: read for read in read_documents(tmp_path).documents}
    assert {kind: read.form for kind, read in found.items()} == {
        ".txt": "plain",
        ".pdf": "plain",
        ".md": "markdown",
        ".html": "markdown",
    }
    assert {kind: read.title for kind, read in found.items()} == {
        ".txt": "Care",
        ".pdf": "care",
        ".md": "All care",
        ".html": "Axles",
    }
    source = Source.of_file(found[".txt"])
    assert [source.sentences(section) for section in source.sections] == [
        ["Oil the axle each spring."]
    ]
    assert found[".md"].text == "# Care\n\nOil the axle."


def test_a_text_with_form_feeds_has_pages(tmp_path: Path) -> None:
    pages = [
        f"Request 7        Notes\n\n{sentence(n)}\n\nAnn Other   [Page {n}]" for n in range(1, 6)
    ]
    (tmp_path / "a.txt").write_text("\f".join(pages))
    expected = [sentence(n) for n in range(1, 6)]
    assert read_file(tmp_path / "a.txt").text.split("\n\n") == expected
