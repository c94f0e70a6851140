"""What documents that nobody of this project had looked at showed: each a kind, with its rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from cartridge_distill.data.documents.blocks import Form, blocks
from cartridge_distill.data.documents.page import read_page
from cartridge_distill.data.documents.page_lines import text_of_pages
from cartridge_distill.data.documents.page_tags import with_end_tags
from cartridge_distill.data.documents.pdf import _glued_in_between, read_pdf
from cartridge_distill.data.documents.quality import measure
from cartridge_distill.data.documents.reading import read_file
from cartridge_distill.data.documents.restructured import clean_restructured, looks_restructured
from cartridge_distill.data.documents.structure import first_heading, pieces, sections, sentences
from cartridge_distill.data.documents.usable import usable, usable_in_record
from tests.data.documents.made import prose, sentence, write_pdf


def kinds(text: str, form: Form) -> list[tuple[str, str]]:
    return [(piece.kind, text[piece.start : piece.end].strip()) for piece in pieces(text, form)]


def page(body: str) -> str:
    return read_page(f"<html><body>{body}</body></html>".encode(), "a.html").text.strip()


def text_file(tmp_path: Path, text: str, name: str = "a.txt") -> str:
    (tmp_path / name).write_text(text)
    return read_file(tmp_path / name).text


# --- Markdown and pages ---------------------------------------------------------------------------


def test_the_second_paragraph_of_a_definition_is_prose_and_code_in_it_is_code() -> None:
    text = page(
        "<dl><dt>Gate</dt><dd><p>It opens at dawn.</p><p>It closes in the evening at nine.</p>"
        "<pre>close --gate\n</pre><p>Nobody passes after that.</p></dd></dl>"
    )
    assert "It closes in the evening at nine." in sentences(text, "markdown")
    assert "Nobody passes after that." in sentences(text, "markdown")
    assert [said for kind, said in kinds(text, "markdown") if kind == "code"][1] == "close --gate"


@pytest.mark.parametrize("mark", ["* ", "1. ", "10. ", ":   "])
def test_code_in_a_list_is_indented_by_four_more_than_the_items_text(mark: str) -> None:
    column = " " * len(mark)
    text = f"{mark}Do this first.\n\n{column}It is still the item.\n\n{column}    ls -la /tmp now\n"
    assert [kind for kind, _ in kinds(text, "markdown")] == ["sentence", "sentence", "code"]
    fenced = f"{mark}Do this first.\n\n{column}```\n{column}ls -la /tmp now\n{column}```\n\nEnd.\n"
    assert ("code", "ls -la /tmp now") in kinds(fenced, "markdown")


def test_the_end_of_a_sentence_in_a_table_is_inside_its_row() -> None:
    text = "| Gate | It opens at dawn. It closes at nine. |\n| Pier | None. See there. |\n"
    assert {kind for kind, _ in kinds(text, "markdown")} == {"table"}


def test_end_tags_may_be_left_out() -> None:
    items = "".join(f"<dt>Word {n}<dd>It means {n} things at once.<p>Or more." for n in range(900))
    assert page(f"<dl>{items}</dl>").count("Or more.") == 900
    assert page("<ul><li>One thing<li>Two things</ul>") == "* One thing\n* Two things"
    table = page("<table><tr><th>Ship<th>Year<tr><td>Anna<td>1880<tr><td>Berta<td>1881</table>")
    assert table.splitlines()[2:] == ["| Anna | 1880 |", "| Berta | 1881 |"]
    assert page("<p>One.<p>Two.<h2>Three</h2>") == "One.\n\nTwo.\n\n## Three"


def test_end_tags_that_stand_there_stay_where_they_are() -> None:
    html = (
        "<ul><li>One<ul><li>Inner &amp; &#955;</li></ul></li><li>Two<br/></li></ul>"
        "<table><tr><td><table><tr><td>a</td></tr></table></td></tr></table><p>x</p>"
        '<a href="b">link</a><script>if (a<b) "</li>";</script>'
    )
    assert with_end_tags(html) == html


def test_a_page_that_is_one_pre_gives_its_prose_and_keeps_its_code() -> None:
    said = "       Terminals  are  described  by  a database that programs read.\n"
    said += "       It lists what each of them can do, and how.\n\n"
    code = "\tvar i = 1\n\twhile i < 5\n\t  echo i\n\tendwhile\n\n"
    rows = "".join(f"          name_{n}          n{n}       x{n}\n" for n in range(40))
    text = page(f"<pre>{said}{code}{rows}\n{said}</pre>")
    assert sentences(text, "markdown").count("It lists what each of them can do, and how.") == 2
    assert not any("while" in said or "name_" in said for said in sentences(text, "markdown"))


def test_lines_of_code_with_breaks_between_are_code() -> None:
    text = page("<p>Write two lines:</p><p><code>Listen 80<br>\nListen 8000 all</code></p>")
    assert ("code", "Listen 8000 all") in kinds(text, "markdown")
    assert page("<p>Use <code>a</code>, then go on<br>below.</p>").startswith("Use `a`, then")


def test_only_a_line_that_begins_with_a_mark_is_escaped() -> None:
    assert page("<p>See |this| and that.</p>") == "See |this| and that."
    assert page("<p># is a sign.</p>") == "\\# is a sign."


def test_paths_and_lists_of_languages_are_navigation() -> None:
    path = '<div><a href="a">Server</a> &gt; <a href="b">Manual</a> &gt; <a href="c">2.4</a></div>'
    langs = '<div class="toplang"><p>Languages: <a href="d">de</a> | <a href="e">en</a></p></div>'
    assert page(f"{path}{langs}<p>{prose(6)}</p>") == page(f"<p>{prose(6)}</p>")


def test_html_elements_of_every_kind_leave_markdown(tmp_path: Path) -> None:
    text = 'A <dfn title="x">word</dfn>, <mark>seen</mark>. <style>p {}</style>Use <output> here.'
    assert text_file(tmp_path, text, "a.md") == "A word, seen. Use <output> here."


def test_a_heading_in_the_middle_does_not_name_the_document() -> None:
    begin = f"{prose(5)}\n\n"
    assert first_heading(f"{begin}## Sponsors\n\nNobody.\n\n## Use\n\nIt.", "markdown") is None
    assert first_heading(f"{begin}# Harbour\n\nIt.\n\n## Use\n\nIt.", "markdown") == "Harbour"
    assert first_heading("By Ann\n\n## Harbour\n\nIt.\n\n## Use\n\nIt.", "markdown") == "Harbour"


def test_headings_have_no_marks_of_emphasis() -> None:
    text = "## The **big** `gate`\n\nIt opens.\n\n**Table 2. Terms**\n\nIt lists all of them.\n"
    titles = [block.title for block in blocks(text, "markdown") if block.depth]
    assert titles == ["The big gate", "Table 2. Terms"]


@pytest.mark.parametrize(
    "line", ["-C list by columns", "-- Ann <ann@example.org>  Fri, 16 Dec 2022", "这是一句话。"]
)
def test_lines_that_title_nothing(line: str) -> None:
    assert sections(f"{line}\n\nAnd here goes what follows it.", "plain")[0][0] is None


# --- plain text -----------------------------------------------------------------------------------


def test_scripts_without_spaces_get_none_at_a_lines_end() -> None:
    assert sentences(
        "私はその本を読んで大\n学院に行きました。\nLine\nends are spaces.", "plain"
    ) == [
        "私はその本を読んで大学院に行きました。",
        "Line ends are spaces.",
    ]
    assert sentences("一つ目です．二つ目です．値は３．５です．", "plain") == [
        "一つ目です．",
        "二つ目です．",
        "値は３．５です．",
    ]


def test_numbers_of_items_and_dates_end_no_sentence() -> None:
    text = "1. Free Redistribution. It is free.\n\n2.1. Areas. There are two.\n\nAm 3. Mai war es."
    assert sentences(text, "plain") == [
        *("1. Free Redistribution.", "It is free.", "2.1. Areas.", "There are two."),
        "Am 3. Mai war es.",
    ]
    assert len(sentences("See section 12. The gate opens.", "plain")) == 2


def test_a_manual_page_has_its_name_and_no_head(tmp_path: Path) -> None:
    text = (
        "LS(1)              User Commands              LS(1)\n\nNAME\n       ls - list the direc‐\n"
        "       tory\n\n名前\n       ls - 一覧\n\nGNU coreutils     September 2022     LS(1)\n"
    )
    (tmp_path / "a.txt").write_text(text)
    read = read_file(tmp_path / "a.txt")
    assert read.title == "ls(1)"
    assert "coreutils" not in read.text and "User Commands" not in read.text
    assert "directory" in read.text
    assert [title for title, _, _ in sections(read.text, "plain")] == ["NAME", "名前"]
    assert text_file(tmp_path, "LS(1) and more\n\nA text.") == "LS(1) and more\n\nA text."


RST = """\
|Build| Harbour
===============

.. |Build| image:: https://example.org/x.svg
   :target: https://example.org
.. |Least| replace:: 3.11
.. _guide: https://example.org/guide
.. a comment that nobody
   should read

It needs |Least|, see the `guide`_ and `others <https://example.org>`__ or :ref:`this <that>`.

.. contents::
   :depth: 2

.. note:: Mind the tide.

   It comes twice a day.

Run it::

    make all the things

.. code-block:: python
   :linenos:

   import harbour
"""


def test_restructured_text_loses_its_markup_and_keeps_its_code(tmp_path: Path) -> None:
    assert looks_restructured(RST) and not looks_restructured(prose(20))
    for name in ("a.rst", "a.txt"):
        text = text_file(tmp_path, RST, name)
        assert "It needs 3.11, see the guide and others or this." in sentences(text, "plain")
        assert "Mind the tide." in text and "It comes twice a day." in sentences(text, "plain")
        code = [said for kind, said in kinds(text, "plain") if kind == "code"]
        assert code == ["make all the things", "import harbour"]
        for gone in ("image", "comment", "contents", "https", "linenos"):
            assert gone not in text


def test_footnotes_and_literals_of_restructured_text_stay() -> None:
    text = "Use ``|a|`` and ``b_`` [1]_.\n\n.. [1] A note of some words.\n"
    assert clean_restructured(text).splitlines() == [
        "Use ``|a|`` and ``b_`` [1]_.",
        "",
        "A note of some words.",
    ]


# --- PDFs -----------------------------------------------------------------------------------------

BOOK = """\
1.1 What is a harbour?
A harbour is a place for ships. It
has a pier of 3.2 metres and more.
3.2 metres were measured in spring.
1.2 Gates
They open at dawn.
1.2.1 Small gates
They close at nine.
2.1 Piers
They are long.
"""


def test_numbered_lines_whose_numbers_go_on_are_headings() -> None:
    found = [(block.depth, block.title) for block in blocks(BOOK, "plain") if block.depth]
    assert found == [
        *((2, "1.1 What is a harbour?"), (2, "1.2 Gates"), (3, "1.2.1 Small gates")),
        (2, "2.1 Piers"),
    ]
    assert "3.2 metres were measured in spring." in " ".join(sentences(BOOK, "plain"))


@pytest.mark.parametrize(
    "contents",
    [
        "1.1 What is a harbour?\n1.2 Gates\n1.2.1 Small gates\n2.1 Piers\n\n",
        "1.1 What is a harbour? 3\nand what is none\n1.2 Gates 4\nand fences of them\n\n",
    ],
)
def test_contents_are_no_headings(contents: str) -> None:
    titles = [block.title for block in blocks(contents + BOOK, "plain") if block.depth]
    assert titles == [block.title for block in blocks(BOOK, "plain") if block.depth]


def test_numbers_that_do_not_go_on_are_no_headings() -> None:
    text = "3.5 Volts were found.\nThen more.\n1.9 Amperes came.\nThen less.\n7.1 Ohms.\nEnd it."
    assert not any(block.depth for block in blocks(text, "plain"))


def test_heads_of_a_book_and_heads_with_two_numbers_go() -> None:
    pages = [
        f"CHAPTER {n}. GATE OF KIND {n}\n{n}.{n}. MORE OF IT {n}\n{prose(6, 10 * n)}\n"
        f"Body of part {n} goes on.\nThe Guide {n} / 8"
        for n in range(1, 9)
    ]
    text = text_of_pages(pages)
    assert not any(gone in text for gone in ("CHAPTER", "MORE OF IT", "The Guide"))
    assert text.count("Body") == 8


def test_torn_words_are_seen() -> None:
    good = " ".join(sentence(number) for number in range(60))
    torn = [
        word[:2] + " " + word[2:] if n % 29 == 0 else word for n, word in enumerate(good.split())
    ]
    assert measure(good).torn == 0
    assert measure(" ".join(torn)).torn > 0.004 and measure(" ".join(torn)).badness > 0.05


def test_latin_words_that_are_glued_in_chinese_are_seen() -> None:
    glued = "依赖是否合适，避免 FTBFS(FailsToBuildFromSource)，见 LintianUserManual。" * 5
    apart = "依赖是否合适，避免 FTBFS (Fails To Build From Source)，见 Lintian User Manual。" * 5
    assert _glued_in_between(glued, apart)
    assert not _glued_in_between(apart, glued) and not _glued_in_between(apart, apart[:-40])


def test_a_pdf_that_reads_well_is_read_once(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [prose(10)])
    assert read_pdf((tmp_path / "a.pdf").read_bytes(), "a.pdf").notes == ("1 pages",)


# --- records --------------------------------------------------------------------------------------


def test_a_records_share_counts_its_short_lines() -> None:
    found = usable_in_record("Ann\n\nLab: Hb 12.1\nNa 140\n", ["Hb 12.1", "Na 140"])
    assert (round(found.share, 2), round(found.rest["head"], 2)) == (0.61, 0.39)
    assert usable("Ann\n\nNa 140\n", "plain").share == 0
