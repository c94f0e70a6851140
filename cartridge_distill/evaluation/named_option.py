r"""Which option a generated answer names: none where it names none, and none where it names two.

An option is named by its letter or by its text.

* A *letter* counts where it stands for an option: at the beginning of a sentence and followed by a
  stop ("C", "(C)", "**C**", "C: 12 mg", "C because ..."), behind a colon or a word that points to
  it ("Answer: C", "option C is correct", "I choose C", ``\boxed{C}``). It does not count as a word
  of the text: "A bakery", "vitamin C deficiency", "E. coli" where an option says so.
* A *text* counts where all its words stand one after the other. Case, punctuation, articles and a
  plural s make no difference; numbers do ("12,5" and "12.5" are one number).
* What is ruled out is not named: "not C", "C is wrong", "rather than C".

The sentence that decides is the last with a verdict in it ("answer", "correct", "therefore", ...)
that names an option; without one the last line; without that, all of the text. Within
``<answer>`` and ``</answer>`` only what stands there counts, the last of several. A letter and
another option's text behind it contradict each other, and several options in the sentence that
decides are none. A list of the options, as the question shows them, is no answer.

Not done here: guessing. How close a text is to an option is :func:`.answers.closest_option`'s
question.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_ARTICLES = frozenset({"a", "an", "the"})
_NO_OPTION = -1

# --- what is markup, and not words ---------------------------------------------------------------
_IN_BRACES = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|boldsymbol|mbox|emph)\s*\{([^{}]*)\}"
)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"\*+|(?<!\w)_+|_+(?!\w)|`+|^\s*(?:#+|>+|[-+•](?=\s))|\\[()\[\]]|\$", re.M)
_TAGS = re.compile(r"</?[A-Za-z][^<>\n]{0,40}>")
_QUOTES = re.compile(r"[\"“”„«»{}]|(?<!\w)['‘’]|['’](?!\w)")

# --- words and options' texts --------------------------------------------------------------------
_WORD = re.compile(r"[<>≤≥=±]*\s*[-−+]?\d+(?:[.,]\d+)*\s*%?|[^\W\d_]+")
_MARK = "⟦{}⟧"
_MARKED = re.compile(r"⟦(\d+)⟧")
_LISTED = re.compile(r"^\W*([A-Z])\s*[).:\-–]*\s*⟦(\d+)⟧\W*$")
_SENTENCE = re.compile(r"\n+|(?<=[.!?;])\s+(?=[A-Z⟦(\[])")

# --- letters -------------------------------------------------------------------------------------
_POINTING = (
    r"is|be|it[’']?s|was|means|choose|chose|pick|select|say|with|therefore|thus|hence|so|think|"
    r"believe|guess|answer|but|then|actually|ist|est|es|antwort|réponse|respuesta|risposta"
)
_SURELY = (
    r"(?:(?i:most|very|quite)\s+)?(?:(?i:definitely|clearly|probably|likely|certainly|obviously|"
    r"indeed|simply|surely|therefore|thus)\s+)?"
)
_NOUN = r"(?i:options?|choices?|letters?|alternatives?)"
_STOP = (
    r"(?=\s*$|\s*[)\],;!?/|…。、]|\s*:|\s*\.(?=\s|$|⟦)|\s*⟦|\s+[-–—=(&]|\s+(?:is|was|are|because|since|as|seems"
    r"|looks|would|must|being|for|and|or|but|not)\b)"
)
_LETTER = re.compile(
    rf"(?:^\W*|[:=>→⇒–—(\[是为選选]\s*|\b(?i:{_POINTING})\s*[,:–-]?\s*{_SURELY})[(\[]?([A-Z]){_STOP}"
    rf"|\b{_NOUN}\s*(?:is\s*)?[:(\[-]?\s*([A-Z])\b(?![’'])",
)
_MORE = re.compile(
    rf"[)\]]?\s*(?:,|/|&|\+|\band\b|\bor\b|\bund\b|\boder\b)\s*(?:and|or)?\s*(?:{_NOUN}\s*)?"
    rf"[(\[]?([A-Z]){_STOP}"
)
_SMALL = re.compile(
    rf"^\W*([a-z])\W*$|^\W*([a-z])[):](?=\s|$|⟦)"
    rf"|\b(?:{_NOUN}|(?i:answer))\b\W*(?:is\b\W*)?\(?([b-z])(?=\W*$|[).:,])"
    rf"|\b{_NOUN}\W*([a-z])(?=\W*$)",
)

# --- verdicts and what is ruled out --------------------------------------------------------------
_VERDICT = re.compile(
    r"\b(?:answers?|antwort|lösung|réponse|respuesta|risposta|correct|right|true|therefore|thus|hence|"
    r"final|finally|conclu\w+|choose|pick|select|wait|actually|correction|sorry)\b",
    re.IGNORECASE,
)
_RULED_OUT_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|than|instead of|except|exclud\w+|eliminat\w+|"
    r"rul\w+ out|unlike|against|wrong|incorrect)\b|n[’']t\b)[^.,;:!?]*$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[.,;:!?]|\bbut\b", re.IGNORECASE)
_RULED_OUT_AFTER = re.compile(
    r"^[)\]]?(?:\s*(?:,|/|&|and|or)\s*(?:options?\s*)?[(\[]?(?:[A-Z]\b|⟦\d+⟧)[)\]]?)*\s+"
    r"(?:(?:is|are|was|were|would be|can be|seems?|looks?)\s+)?"
    r"(?:not\b(?!\s+(?:option\s+)?(?:\(?[A-Z]\b|⟦))|wrong|incorrect|false|unlikely|less likely|"
    r"ruled|excluded|eliminated|cannot|can[’']t|isn[’']t|wasn[’']t|aren[’']t|doesn[’']t|does not|"
    r"impossible)",
    re.IGNORECASE,
)


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """The place of the one option that an answer names; None where it names none, or several."""
    if tagged := ANSWER_TAG.findall(text):
        text = tagged[-1]
    for place, option in enumerate(options):  # also what is nothing but markup: "$", "C"
        if text.strip() == option.strip() and list(options).count(option) == 1:
            return place
    marked = _mark_texts(_plain(text), options)
    lines = [line for line in marked.splitlines() if line.strip()]
    lines = _without_listing(lines)
    sentences = [part for line in lines for part in _SENTENCE.split(line) if part.strip()]
    for sentence in reversed(sentences):
        if _VERDICT.search(sentence) and (named := _named(sentence, len(options))):
            return _one(named)
    last = _SENTENCE.split(lines[-1]) if lines else []
    return _one(_all_named(last, len(options)) or _all_named(sentences, len(options)))


def _one(named: set[int]) -> int | None:
    return named.copy().pop() if len(named) == 1 and _NO_OPTION not in named else None


def _all_named(sentences: Sequence[str], count: int) -> set[int]:
    return set[int]().union(*(_named(sentence, count) for sentence in sentences))


def _plain(text: str) -> str:
    """Without Markdown, LaTeX, HTML and quotation marks; a box becomes "answer: ..."."""
    text = unicodedata.normalize("NFKC", text).replace("\r", "\n")
    before = None
    while before != text:
        before, text = text, _IN_BRACES.sub(r"\1", text)
    text = _BOXED.sub(r"\nanswer: \1\n", text)
    return _QUOTES.sub("", _MARKUP.sub("", _TAGS.sub(" ", text)))


def _words(text: str) -> list[tuple[str, int, int]]:
    """(a word as it is compared, its begin, its end); articles among them."""
    return [(_word(found[0]), found.start(), found.end()) for found in _WORD.finditer(text)]


def compared_words(text: str, articles: bool = False) -> list[str]:
    """The words of a text as options' texts are compared: without articles, but for lone ones.

    Args:
        articles: keep them.
    """
    found = [word for word, _, _ in _words(_plain(text))]
    return (not articles and [word for word in found if word not in _ARTICLES]) or found


def ends_in_article(text: str) -> bool:
    """Is the last word of several one that is spelt like an article, as in "zone A"?"""
    found = compared_words(text, articles=True)
    return len(found) > 1 and found[-1] in _ARTICLES


def _word(text: str) -> str:
    text = re.sub(r"\s", "", text).replace("−", "-").casefold()
    if any(letter.isdigit() for letter in text):
        text = re.sub(r",(?=\d{3}\b)", "", text)
        return text.replace(",", ".")
    return text.removesuffix("s") if len(text) > 3 else text


def _mark_texts(text: str, options: Sequence[str]) -> str:
    """The text with each option's own text replaced by a mark of its place, the longest first."""
    wanted: dict[tuple[str, ...], int] = {}
    for place, option in enumerate(options):
        words = [word for word, _, _ in _words(_plain(option))]
        bare = words[1:] if words[:1] and words[0] in _ARTICLES else words
        for form in (tuple(words), tuple(bare)):
            if form:  # two options of the same words cannot be told apart by them
                wanted[form] = _NO_OPTION if wanted.get(form, place) != place else place
    found = _words(text)
    taken: dict[int, tuple[int, int, int]] = {}
    for form in sorted(wanted, key=len, reverse=True):
        for first in range(len(found) - len(form) + 1):
            span = range(first, first + len(form))
            if any(place in taken for place in span) or wanted[form] == _NO_OPTION:
                continue
            if tuple(found[place][0] for place in span) == form and not _is_letter(found, span):
                mark = (found[span[0]][1], found[span[-1]][2], wanted[form])
                taken.update(dict.fromkeys(span, mark))
    for start, end, place in sorted(set(taken.values()), reverse=True):
        if (article := re.search(r"(?<![A-Za-z])(?:an?|the|An|The)\s+$", text[:start])) is not None:
            start = article.start()
        text = text[:start] + _MARK.format(place) + text[end:]
    return text


def _is_letter(found: Sequence[tuple[str, int, int]], span: range) -> bool:
    """A word of one letter, as an option's whole text, is read as a letter."""
    return len(span) == 1 and len(found[span[0]][0]) == 1 and found[span[0]][0].isalpha()


def _without_listing(lines: Sequence[str]) -> list[str]:
    """Without two or more lines that repeat options with their own letters."""
    listed = [
        number
        for number, line in enumerate(lines)
        if (match := _LISTED.match(line)) and ascii_uppercase.index(match[1]) == int(match[2])
    ]
    if len(listed) < 2:
        return list(lines)
    return [line for number, line in enumerate(lines) if number not in listed]


def _named(sentence: str, count: int) -> set[int]:
    """The options that a sentence names; :data:`_NO_OPTION` for a letter that is none."""
    letters: set[int] = set()
    for match in _LETTER.finditer(sentence):
        group = 1 if match[1] else 2
        letters |= _letters_from(sentence, match.start(group), count)
    if not letters and (small := _SMALL.search(sentence)):
        group = next(number for number in (1, 2, 3, 4) if small[number])
        letters |= _letters_from(sentence, small.start(group), count)
    if letters:
        return letters
    return {
        int(mark[1])
        for mark in _MARKED.finditer(sentence)
        if not _ruled_out(sentence, mark.start(), mark.end())
    }


def _letters_from(sentence: str, at: int, count: int) -> set[int]:
    """The letter there and those that "or", "and" or a comma add to it."""
    named: set[int] = set()
    while True:
        place = ascii_uppercase.index(sentence[at].upper())
        if not _ruled_out(sentence, at, at + 1):
            named.add(place if place < count else _NO_OPTION)
            text = re.match(r"[)\]]?\s*[.:,=–—-]*\s*⟦(\d+)⟧", sentence[at + 1 :])
            if text is not None:
                named.add(int(text[1]))  # the letter's own text, or a contradiction
        more = _MORE.match(sentence, at + 1)
        if more is None:
            return named
        at = more.start(1)


def _ruled_out(sentence: str, start: int, end: int) -> bool:
    before = sentence[:start]
    clauses = list(_CLAUSE.finditer(before))
    clause = before[clauses[-1].end() :] if clauses else before
    return bool(_RULED_OUT_BEFORE.search(clause) or _RULED_OUT_AFTER.match(sentence[end:]))
