"""Of a Markdown file, what is markup for a program or a browser is left out."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cartridge_distill.data.documents.markdown import clean_markdown


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("---\ntitle: Care\ntags: [a]\n---\n# Axle\n", "# Axle\n"),
        ("+++\ntitle = 'Care'\n+++\nText.\n", "Text.\n"),
        ("A text.\n\n---\n\nMore: yes.\n\n---\n", "A text.\n\n---\n\nMore: yes.\n\n---\n"),
        ("One <!-- a\ncomment --> two.", "One  two."),
        ("[![Build](https://a/b.svg)](https://a) Text.", " Text."),
        ('![A picture](a(1).png "Title") Text.', " Text."),
        ("![ref][pic] Text.\n\n[pic]: a.png\n", " Text.\n\n"),
        (
            "See [the pier](https://a.b/c_(d)) and [this][1].\n\n[1]: <x y>\n",
            "See the pier and this.\n\n",
        ),
        ("See <https://a.b>.", "See https://a.b."),
        ("<p align='center'>\n  <img src='a.png'>\n  Text.<br/>\n</p>", "\n  \n  Text.\n"),
        ("A vector<int> of 10<sup>5</sup>.", "A vector<int> of 10^5."),
        (
            "## Contents\n\n- [One](#one)\n  - [Two](#two)\n- [Three](#three)\n\n## One\n",
            "## One\n",
        ),
        ("- [One](a.md)\n- [Two](b.md)\n- [Three](c.md)\n", "- One\n- Two\n- Three\n"),
        ("Write `[a](b)` and ``<!-- x -->``.", "Write `[a](b)` and ``<!-- x -->``."),
        ("```\n[a](b) <!-- c --> <br>\n```\n", "```\n[a](b) <!-- c --> <br>\n```\n"),
        (
            "> It is\n> > quoted, 2 > 1.\n\n> ```\n> x = 1\n> ```\n",
            "It is\nquoted, 2 > 1.\n\n```\nx = 1\n```\n",
        ),
        ("```\n> a prompt\n```\n", "```\n> a prompt\n```\n"),
        ("The entry a[1][2] of a matrix.", "The entry a[1][2] of a matrix."),
        ("So $f[a](x)$ and \\(g[b](y)\\).", "So $f[a](x)$ and \\(g[b](y)\\)."),
        ("It costs $5 or [six](x) and $7.", "It costs $5 or six and $7."),
        ("2<sup>1</sup>/<sub>2</sub> x<sup>n+1</sup> 1<sup>st</sup>", "2 1/2 x^(n+1) 1st"),
        ("[TOC]\n\n## One {#one}\n{% include a %}Text.\n", "\n\n## One\nText.\n"),
        ("- [ ] to do\n- [x] done [1]\n", "- [ ] to do\n- [x] done [1]\n"),
        ("A note.[^1]\n\n[^1]: Its text.\n", "A note.[^1]\n\n[^1]: Its text.\n"),
        ("\\[not a link](x) a * b * c", "\\[not a link](x) a * b * c"),
    ],
)
def test_what_is_left(text: str, left: str) -> None:
    assert clean_markdown(text)[1] == left


def test_the_title_of_the_front_matter() -> None:
    assert clean_markdown("---\ntitle: 'Care: an axle'\n---\nText.")[0] == "Care: an axle"
    assert clean_markdown('+++\ntitle = "Care"\n+++\nText.')[0] == "Care"
    assert clean_markdown("---\ntags: [a]\n---\nText.")[0] is None
    assert clean_markdown("---\n{: no yaml\n---\nText.") == (None, "Text.")


def test_brackets_that_never_close_cost_no_more_than_their_length() -> None:
    text = "[" * 20_000 + "`" * 5_001 + "<!--" * 5_000
    assert clean_markdown(text)[1]


@pytest.mark.parametrize(
    "never_closed", ["<!-- ", "<script> ", "<style> ", "\\( a ", "\\[ a ", "$$ a\n", "{% a ", "$a "]
)
def test_what_never_closes_is_looked_for_once(never_closed: str) -> None:
    """It took four times as long with each doubling: of these, half an hour of a processor."""
    text = (
        "Care of the axle.\n\n" + never_closed * (1_000_000 // len(never_closed)) + "\n\nThe end."
    )
    left = clean_markdown(text)[1]
    assert left.startswith("Care of the axle.") and left.endswith("The end.")


def test_code_in_a_formula_stays_where_it_is() -> None:
    text = "It is \\(`a` + `b`\\), $x `c` y$ and `d`; \\( never closed, <!-- closed --> $$z$$."
    left = "It is \\(`a` + `b`\\), $x `c` y$ and `d`; \\( never closed,  $$z$$."
    assert clean_markdown(text)[1] == left
    # The sign that holds a place is no letter of a text.
    assert clean_markdown("One \x000\x00 two `three` \x007\x00.")[1] == "One 0 two `three` 7."


@pytest.mark.parametrize(
    ("written", "title"),
    [
        ("2026-02-30", "2026-02-30"),
        ("1.10", "1.10"),
        ("9" * 5000, "9" * 5000),
        ("null", None),
        ("[a, b]", None),
        ("[" * 1500, None),
        ("&a [*a]", None),
    ],
)
def test_front_matter_is_text_whatever_yaml_makes_of_it(written: str, title: str | None) -> None:
    found = clean_markdown(f"---\ntitle: {written}\n---\nText.")
    assert found == (title, "Text.")


def test_front_matter_that_repeats_itself_is_not_written_out() -> None:
    """A thousand letters that stand for a thousand million."""
    names = "abcdefghij"
    lists = [f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]" for one, two in pairwise(names)]
    text = "\n".join(["---", "a: &a [x]", *lists, "title: *j", "---", "Text."])
    assert clean_markdown(text) == (None, "Text.")
