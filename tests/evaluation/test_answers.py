"""Generated answers: what they count as, and that they can be had twice, here and by a server."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cartridge_distill.evaluation.answers import (
    LocalAnswerer,
    Sampling,
    ServerAnswerer,
    closest_option,
    lettered,
    lettered_prompt,
)
from cartridge_distill.evaluation.conditions import BestChunk, Fixed, View
from cartridge_distill.evaluation.names import TRAINED
from cartridge_distill.evaluation.scoring import sampled_answers
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.util.errors import ConfigError
from tests.conftest import StartServer
from tests.evaluation.made import QUESTIONS, evaluate, teacher
from tests.tiny import random_cartridge, write_cartridge

OPTIONS = ("a church", "E. coli", "the garden", "a bank", "12.5 mg daily")


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("She was outside. <answer>C: the garden</answer>", 2),
        ("<answer>\n(D)\n</answer>", 3),
        ("First <answer>A</answer>, no: <answer>D: a bank</answer>", 3),  # the last one counts
        ("thinking ... <answer>Option B.", 1),  # cut off at the token limit
        ("<answer>e</answer>", 4),
        ("E. coli", 1),  # the text before the letter
        ("E) 12.5 mg daily", 4),
        ("The correct answer is D: a bank.\nI am sure.", 3),
        ("The answer is the gardens", 2),  # no letter: the closest text
        ("It must be the following.\n\nA bank", 3),  # an article, not the letter A
        ("**A**: a church", 0),
        ("12,5 mg each day", 4),
        ("F: none of them, a church", 0),  # there is no option F
        ("", None),
        (" \n ", None),
        ("<answer></answer>", None),
    ],
)
def test_the_closest_option(text: str, option: int | None) -> None:
    assert closest_option(text, OPTIONS) == option


def test_the_question_shows_its_options_by_letter() -> None:
    shown = lettered(QUESTIONS[0])
    assert shown.startswith(
        "What has Ann?\n\nOptions:\nA: a red hat\nB: a car\nC: an old blue boat"
    )
    assert shown.index("step by step") < shown.index("<answer>")


def test_answers_follow_the_seed_and_are_counted(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    condition = Fixed(TRAINED, random_cartridge(packed).prefix())

    def rows(name: str, seed: int) -> list[tuple[str | None, int | None, bool | None]]:
        answerer = LocalAnswerer(packed, tokenizer, Sampling(1.0, 12, seed))
        results = evaluate(packed, tokenizer, tmp_path / name, [condition], answerer=answerer)
        found = results.of(TRAINED)[0]
        assert all(
            row.generated_correct == (row.generated_choice == QUESTIONS[i].correct)
            for i, row in enumerate(found)
        )
        return [(r.generated_text, r.generated_choice, r.generated_correct) for r in found]

    first = rows("first", 0)
    assert all(text for text, _, _ in first)
    assert rows("again", 0) == first != rows("other", 1)


def test_an_answer_over_the_context_is_refused(
    packed: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    answerer = LocalAnswerer(packed, tokenizer, Sampling(max_new_tokens=512))
    with pytest.raises(ConfigError, match=r"up to 512 are over the model's context of 512"):
        answerer.answer("any", [View(None, ())], [lettered_prompt(tokenizer, QUESTIONS[0])])


def test_a_server_says_what_the_engine_here_says(
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    start_server: StartServer,
) -> None:
    """Greedy, so that seeds are out of it: ids before the prompt, and a cartridge by its id."""
    cartridge = random_cartridge(packed)
    write_cartridge(cartridge, tmp_path, "anna")
    server = start_server(cartridge_dir=tmp_path)
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    prompts = [lettered_prompt(tokenizer, question) for question in QUESTIONS[1:]]
    chunks = BestChunk(teacher(packed, tokenizer), 64)
    served = {TRAINED: CartridgeRef(id="anna", source="local")}
    remote = ServerAnswerer(server.url, tokenizer, greedy, served)
    here = LocalAnswerer(packed, tokenizer, greedy)
    for name, views in {
        "no document": [View(None, ())] * 2,
        "best chunk": [chunks.view("two", question.question) for question in QUESTIONS[1:]],
        TRAINED: [View(cartridge.prefix(), None)] * 2,
    }.items():
        texts = here.answer(name, views, prompts)
        assert remote.answer(name, views, prompts) == texts and all(texts)
    with pytest.raises(ConfigError, match="--served"):
        remote.answer("another", [View(cartridge.prefix(), None)], prompts[:1])


def test_rows_do_not_disturb_each_other(packed: PreTrainedModel) -> None:
    """Each prompt has a prefix and random numbers of its own, whatever else is in the batch."""
    prefixes = [random_cartridge(packed, 8, seed).prefix() for seed in range(2)] + [None]
    prompts = [[5, 9, 7], [5, 9], [5, 9, 7, 100]]

    def draw(places: list[int]) -> list[list[int]]:
        generators = [random.Random(place) for place in places]
        some = [prefixes[i] for i in places], [prompts[i] for i in places]
        return sampled_answers(packed, *some, 6, 1.0, generators)

    together = draw([0, 1, 2])
    assert together == [draw([place])[0] for place in range(3)]
