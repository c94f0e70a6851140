"""Which option an answer names, in the forms that models write, and what names none."""

from __future__ import annotations

import pytest

from cartridge_distill.evaluation.answers import READINGS, closest_option
from cartridge_distill.evaluation.named_option import chosen_option

OPTIONS = ("a church", "E. coli", "the garden", "a bank", "12.5 mg daily")

SAY_C = [
    *(
        "C",
        "C.",
        "C)",
        "(C)",
        "[C]",
        "c",
        "(c)",
        "**C**",
        "*C*",
        '"C"',
        "- C",
        "#### C",
        "C！",
        "Ⓒ",
    ),
    *("C: the garden", "C. the garden", "C) the garden", "C - the garden", "C the garden"),
    *("the garden", "The garden.", "The answer is the gardens", "She was in the garden."),
    *("Answer: C", "answer: c", "Answer: **C**", "Answer:\n**C**", "Answer - C", "Answer = C"),
    *("Final answer: C", "Correct option: C", "Option: C", "Antwort: C", '{"answer": "C"}'),
    *("The answer is C.", "The correct answer is (C).", "The answer is most likely C."),
    *(r"\boxed{C}", r"$\boxed{\text{C}}$", r"The final answer is $\boxed{\textbf{(C)}}$."),
    *("option C", "option (C)", "Option C is correct.", "Choice C", "The answer is option c."),
    *(
        "C is correct",
        "C is the correct answer",
        "C because of that",
        "C, since she was seen there.",
    ),
    *("I choose C", "I'd go with C", "It's C", "Therefore, C.", "It must be C: the garden."),
    *(
        "C, not D",
        "not A but C",
        "It is not A, B, D or E; it is C.",
        "C is right, A and B are wrong",
    ),
    "A is wrong. B is wrong. So C.",
    "Options A and B are wrong.\nThe right one is C.",
    "Wait, D? The answer is D.\nActually, C.",
    "C\n\nThe text says that she was outside.",
    "The note says the garden, so no E. coli.\n\nThe answer is **C**: *the garden*.",
    "A: no\nB: no\nC: yes",
    "D was my first thought. <answer>The answer is C</answer>",
]


@pytest.mark.parametrize("text", SAY_C)
def test_the_ways_to_say_c(text: str) -> None:
    assert chosen_option(text, OPTIONS) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", " \n ", "<answer></answer>", "C was it. <answer>letter</answer>"),
        *(
            "I do not know.",
            "I cannot answer that.",
            "A good question.",
            "All of the above",
            "12 mg",
        ),
        *("A bakery", "vitamin C deficiency", "12,5 mg each day", "a churchyard"),
        *("Answer: F", "F: none of them, a church"),  # there is no option F
        *(
            "not C",
            "C is wrong",
            "The answer is not C",
            "Option C is not correct.",
            "Not the garden.",
        ),
        *("B or C", "C/D", "Answer: C or D", "Answer: C, D", "Either B or C", "C and D are wrong"),
        *("The correct answers are C and D", "a church or the garden", "It could be C or E"),
        *("C: a bank", "C. A bank"),  # the letter and the text contradict each other
        # the question's own list
        "A) a church\nB) E. coli\nC) the garden\nD) a bank\nE) 12.5 mg daily",
    ],
)
def test_what_names_no_option_or_several_is_none(text: str) -> None:
    assert chosen_option(text, OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("She was outside. <answer>C: the garden</answer>", 2),
        ("<answer>\n(D)\n</answer>", 3),
        ("First <answer>A</answer>, no: <answer>D: a bank</answer>", 3),  # the last one counts
        ("thinking ... <answer>Option B.", 1),  # cut off at the token limit
        ("E. coli", 1),  # no letter E
        ("It was E. coli.", 1),
        ("It must be the following.\n\nA bank", 3),  # an article, not the letter A
        ("The answer is A church", 0),
        ("a", 0),
        ("12,5 mg daily", 4),  # a decimal comma
        ("The correct answer is D: a bank.\nI am sure.", 3),
        ("Because of E. coli, option D is excluded; the answer is B.", 1),
    ],
)
def test_other_options(text: str, option: int) -> None:
    assert chosen_option(text, OPTIONS) == option


@pytest.mark.parametrize(
    ("options", "text", "option"),
    [
        (("hepatitis A", "hepatitis B", "vitamin C"), "The answer is hepatitis B.", 1),
        (("hepatitis A", "hepatitis B", "vitamin C"), "Vitamin C.", 2),
        (("hepatitis A", "hepatitis B", "vitamin C"), "hepatitis", None),
        (("1", "2", "3"), "The answer is 3.", 2),
        (("1", "2", "3"), "2 of 3", None),
        (("1", "2", "3"), "C: 2", None),
        (("1.5", "15"), "1,5", 0),
        (("-1", "1"), "B: 1", 1),
        (("pain", "chest pain"), "It is chest pain.", 1),
        (("yes", "no"), "No, it is not.", 1),
        (("the same", "the same"), "the same", None),  # nothing tells them apart
    ],
)
def test_options_that_look_like_letters_or_contain_each_other(
    options: tuple[str, ...], text: str, option: int | None
) -> None:
    assert chosen_option(text, options) == option


def test_the_papers_protocol_stays_and_is_another_rule() -> None:
    """There the closest text always wins, whatever was said."""
    assert READINGS == {"named": chosen_option, "closest": closest_option}
    for text in ("Answer: C", "I do not know."):
        assert closest_option(text, OPTIONS) not in (2, None)
