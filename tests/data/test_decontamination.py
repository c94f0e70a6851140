"""Evaluation questions are found in prompts, exactly and nearly; so is a prompt seen before."""

from __future__ import annotations

import random

import pytest

from cartridge_distill.data.decontamination import (
    NEAR_DUPLICATE,
    Guard,
    Seen,
    jaccard,
    normalised,
    words,
)
from cartridge_distill.data.records import Question
from cartridge_distill.util.errors import ConfigError


def guard(*questions: str, stem: str | None = None) -> Guard:
    options = ("a", "b", "c", "d", "e")
    return Guard([Question("p", question, options, 0, stem) for question in questions])


def test_words_are_compared_not_punctuation_or_case() -> None:
    assert normalised('He said: "3.5 mg_a day"!') == " he said 3 5 mg a day "
    assert words("Die Größe des 橋は、いつ?") == ["die", "größe", "des", "橋", "は", "い", "つ"]


def test_a_question_inside_a_prompt_is_found_whatever_its_case_and_punctuation() -> None:
    apart = guard("Where does the patient live?", stem="Her family doctor is")
    assert apart.collision("So: where does the PATIENT live - in Rome") is not None
    assert apart.collision("Complete: 'Her family doctor is, '") is not None
    assert apart.collision("Where does the patient lie?") is None
    row = {
        "patient_id": "p",
        "prompt": [{"role": "user", "content": "Where does the patient live"}],
    }
    with pytest.raises(ConfigError, match="'where does the patient live'"):
        apart.check([row])


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("Which antibiotic did Mrs Bell receive after the operation in March?", True),
        ("What antibiotics had Mrs Bell received after an operation, March?", True),
        ("Make a table. Then: which antibiotic Mrs Bell got after operation in March", True),
        ("Which antibiotic is named first?", False),
        ("Write a poem on the operation of Mrs Bell.", False),
        ("When in March was Mrs Bell's operation, and who paid for the antibiotic?", False),
    ],
)
def test_near_to_an_evaluation_question(prompt: str, near: bool) -> None:
    asked = "Which antibiotic did Mrs Bell receive after the operation in March?"
    found = guard("Something else entirely, of no concern?", asked).near(prompt)
    assert found == (asked if near else None)


def test_a_short_question_is_compared_with_the_prompt_as_a_whole() -> None:
    apart = guard("Who is the family doctor?")
    assert apart.near("Who is her family doctor?") is not None
    assert apart.near("Describe how the family doctor coordinates the nurses' visits.") is None
    assert guard("Diagnosis?").near("Which diagnosis?") is None


def test_near_duplicates_and_what_is_only_alike() -> None:
    seen = Seen()
    seen.add("Summarize how the harbour of Aarhus was built, in three sentences.")
    again = "In three sentences: summarize how the harbour of Aarhus was built!"
    assert seen.like(again) is not None
    assert seen.like("Please summarize how the harbour of Aarhus was built, in three sentences")
    assert seen.like("Summarize how the museum of Aarhus was funded, in three sentences.") is None
    assert seen.like("") is None


def test_the_index_finds_what_comparing_with_everything_finds() -> None:
    rng = random.Random(1)
    vocabulary = [f"w{'x' * (n % 5)}{n}" for n in range(30)]
    seen, texts, found = Seen(), [], 0
    for _ in range(400):
        text = " ".join(rng.sample(vocabulary, rng.randrange(1, 9)))
        if texts and rng.random() < 0.5:  # something close to one of them
            old = rng.choice(texts).split()
            text = " ".join([*old[: len(old) - rng.randrange(2)], rng.choice(vocabulary)])
        like = [o for o in texts if jaccard(set(words(o)), set(words(text))) >= NEAR_DUPLICATE]
        assert seen.like(text) == (like[0] if like else None)
        found += bool(like)
        seen.add(text)
        texts.append(text)
    assert found > 40
