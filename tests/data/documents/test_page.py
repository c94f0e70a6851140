"""A page gives what one would read of it, and says how much of the visible text that is."""

from __future__ import annotations

import pytest

from cartridge_distill.data.documents.page import read_page
from cartridge_distill.data.documents.structure import sections, sentences
from cartridge_distill.util.errors import DocumentError
from tests.data.documents.made import prose

LONG = " ".join(prose(8).split())


def text_of(body: str) -> str:
    return read_page(f"<html><body>{body}</body></html>".encode(), "a.html").text.strip()


def test_a_page_inside_one_form_is_kept_without_its_controls() -> None:
    controls = "<input value='x'><button>Send</button><select><option>One</option></select>"
    page = f"<form><p>{LONG}</p>{controls}</form><footer>Imprint</footer>"
    assert text_of(page) == LONG


@pytest.mark.parametrize("tag", ["article", "main"])
def test_a_teaser_does_not_replace_the_page(tag: str) -> None:
    assert LONG in text_of(f"<{tag}>Read our news.</{tag}><div><p>{LONG}</p></div>")
    assert text_of(f"<{tag}><p>{LONG}</p></{tag}><div>More.</div>") == LONG


@pytest.mark.parametrize(
    "hiding",
    [
        "hidden",
        "style='color:red; display: none'",
        "style='visibility:hidden'",
        "aria-hidden=true",
        "class='a sr-only'",
    ],
)
def test_hidden_text_is_not_read(hiding: str) -> None:
    assert text_of(f"<p>Seen.</p><div {hiding}>Not <b>seen</b>.</div>") == "Seen."


def test_prose_in_pre_gives_sentences_and_code_stays_code() -> None:
    page = text_of(f"<pre>{prose(6, per_paragraph=2)}\n\n  An indented line of four words.</pre>")
    assert sentences(page, "markdown") == [
        *sentences(prose(6), "markdown"),
        "An indented line of four words.",
    ]
    assert "```" in text_of("<pre>$ make all\nx = y(1);\nfor (;;) {\n}</pre>")
    assert "```" in text_of("<pre><code>the words of a line\nand of another one</code></pre>")


def test_layout_tables_are_no_tables_and_tables_of_data_are() -> None:
    cell = f"<p>{LONG}</p><p>Second one.</p>"
    layout = text_of(f"<table><tr><td>Left</td><td>{cell}</td></tr></table>")
    assert "|" not in layout and sentences(layout, "markdown")[-1] == "Second one."
    note = text_of(
        f"<table><tr><td></td><td>Note</td></tr><tr><td></td><td>{LONG}</td></tr></table>"
    )
    assert "|" not in note
    data = "<table><tr><th>ship</th><th>year</th></tr><tr><td>Anna</td><td>1880</td></tr></table>"
    assert "| Anna | 1880 |" in text_of(f"<p>{LONG}</p>{data}")


LINKS = (
    "<li><a href='#a'>One part</a></li><li><a href='#b'>Two</a></li><li><a href=c>Three</a></li>"
)


@pytest.mark.parametrize(
    "noise",
    [
        f"<nav>{LINKS}</nav>",
        f"<div role='navigation'>{LINKS}</div>",
        f"<div class='toc'><p>Contents</p><ul>{LINKS}</ul></div>",
        f"<ul>{LINKS}</ul>",
        "<div class='breadcrumb'>Home &gt; Docs</div>",
        "<div id='sidebar'>Latest news</div>",
        "<footer>Imprint</footer>",
        "<!-- a comment -->",
        "<noscript>Turn it on</noscript>",
    ],
)
def test_what_is_not_text_is_left_out(noise: str) -> None:
    assert text_of(f"{noise}<p>{LONG}</p>") == LONG


@pytest.mark.parametrize("mark", ["¶", "#", "§", "&#x1f517;", ""])
def test_marks_behind_headings_are_left_out(mark: str) -> None:
    link = f"<a class='headerlink' href='#care'>{mark}</a>"
    page = text_of(f"<h2>Care{link}</h2><p>{LONG}</p>")
    assert page.startswith("## Care\n")
    assert sections(page, "markdown")[0][0] == "Care"


def test_an_index_of_links_is_a_page_all_the_same() -> None:
    read = read_page(f"<body><ul>{LINKS}</ul><p>End.</p></body>".encode(), "a.html")
    assert "One part" in read.text


def test_how_much_was_kept_is_said() -> None:
    read = read_page(
        f"<body><main><p>{LONG}</p></main><div>{prose(4, 50)}</div></body>".encode(), "a"
    )
    assert read.text.strip() == LONG
    assert read.notes[0].endswith("% of the visible text kept")
    # Contents that are longer than the page they lead through are contents all the same.
    read = read_page(f"<body><nav>{LINKS * 60}</nav><p>{LONG}</p></body>".encode(), "a.html")
    assert read.text.strip() == LONG and read.notes[0].startswith("30 % of the visible")
    # Text that is taken for navigation, and is most of the page, is not.
    aside = "".join(f"<div class='related'>{prose(3, n)}</div>" for n in range(0, 30, 3))
    read = read_page(f"<body><p>Short.</p>{aside}</body>".encode(), "a.html")
    assert "all of it was taken" in read.notes[0] and prose(3, 27) in read.text
    rest = f"<ul>{LINKS * 30}</ul><ol>{LINKS * 30}</ol>"
    read = read_page(f"<body><p>Short.</p>{rest}</body>".encode(), "a.html")
    assert "all of it was taken" in read.notes[0] and "One part" in read.text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("10<sup>5</sup> litres", "10^5 litres"),
        ("3×10<sup>−4</sup> mol/m<sup>2</sup>", "3×10^−4 mol/m^2"),
        ("x<sup>n+1</sup>", "x^(n+1)"),
        ("log<sub>2</sub> 8 and H<sub>2</sub>O", "log_2 8 and H_2O"),
        ("the 1<sup>st</sup> and 2<sup>e</sup>", "the 1st and 2e"),
        ("Said so.<sup><a href='#n1'>[1]</a></sup> Yes.", "Said so. Yes."),
        ("2<sup>1</sup>⁄<sub>2</sub> cups and <sup>3</sup>/<sub>4</sub>", "2 1/2 cups and 3/4"),
        ("2½ cups at −5 °C", "2½ cups at −5 °C"),
        ("<math><mfrac><mn>1</mn><mn>2</mn></mfrac></math> cup", "(1)/(2) cup"),
        (
            "<math><msup><mi>x</mi><mn>2</mn></msup><mo>=</mo><msqrt><mn>9</mn></msqrt></math>",
            "x^2 = sqrt(9)",
        ),
        (
            "<math><semantics><mi>x</mi><annotation encoding='application/x-tex'>\\frac{a}{b}"
            "</annotation></semantics></math>",
            "$\\frac{a}{b}$",
        ),
        ("<img class='math' alt='a^2 + b^2' src='1.png'>", "$a^2 + b^2$"),
        ("so <script type='math/tex'>x^2</script> is", "so $x^2$ is"),
        ("<img alt='A harbour' src='1.png'>Text.", "Text."),
    ],
)
def test_numbers_and_formulas_keep_their_meaning(html: str, text: str) -> None:
    assert text_of(f"<p>{html}</p>") == text


def test_text_that_looks_like_markdown_is_not_read_as_such() -> None:
    page = text_of("<p># make it</p><p>~~~~</p><p>It goes on for some words.</p><p>| a line</p>")
    assert sections(page, "markdown")[0][0] is None
    assert "It goes on for some words." in sentences(page, "markdown")


def test_quotations_have_no_mark_in_every_line() -> None:
    page = text_of(f"<blockquote><p>{LONG}</p><blockquote>Second one.</blockquote></blockquote>")
    assert page == f"{LONG}\n\nSecond one."


def test_the_title_of_a_page() -> None:
    page = "<html><head><title> </title></head><body><h1>Care</h1><p>Text.</p></body></html>"
    assert read_page(page.encode(), "a.html").title == "Care"


def test_a_page_without_text_is_refused() -> None:
    with pytest.raises(DocumentError, match="is a page without text"):
        read_page(b"<body><div hidden>x</div></body>", "a.html")


@pytest.mark.parametrize(
    "page",
    [
        "<html><head><title>The axle</title></head><body><p>{}</p></body></html>",
        "<html><head><title>The axle</title><body><p>{}</p></body></html>",
        "<html><head><meta charset=utf-8><title>The axle</title><p>{}</html>",
        "<!doctype html><title>The axle</title><p>{}",
        "<head><title>The axle</title>{}",
    ],
)
def test_a_head_may_be_left_open_or_out(page: str) -> None:
    found = read_page(page.format(LONG).encode(), "a.html")
    assert (found.title, found.text.strip()) == ("The axle", LONG)


@pytest.mark.parametrize("tag", ["div", "b", "ul><li", "table><tr><td"])
def test_tags_that_never_close_are_refused_by_their_number(tag: str) -> None:
    """Each looked through all that are open: of so many, an hour of a processor."""
    with pytest.raises(DocumentError, match="nests its tags too deeply"):
        read_page(f"<p>{LONG}</p>{f'<{tag}>' * 200_000}".encode(), "a.html")
