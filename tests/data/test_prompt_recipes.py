"""Training prompts: cut at tokens, repeatable, and apart from the evaluation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cartridge_distill.data.dataset import evaluation_questions
from cartridge_distill.data.decontamination import check_held_out
from cartridge_distill.data.documents.reading import ReadFile
from cartridge_distill.data.documents.source import Source, choose
from cartridge_distill.data.prompt_recipes import PROMPT_RECIPES, cut_points, make_rows
from cartridge_distill.data.records import Question, Record, parse_records
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.util.errors import ConfigError
from tests.data.documents.made import prose
from tests.model.templates import SHAPES, SMOLLM2, tokenizer_of
from tests.tiny import byte_tokenizer

DATA = Path(__file__).parents[2] / "cartridge_distill" / "data" / "examples"


def sources_of(name: str) -> list[Source]:
    return [Source.of_record(record) for record in parse_records((DATA / name).read_text(), name)]


@pytest.fixture(scope="module")
def demo() -> list[Source]:
    return sources_of("demo.json")


@pytest.fixture(scope="module")
def clinic() -> list[Source]:
    return sources_of("clinic.json")


@pytest.fixture(scope="module")
def bpe(demo: list[Source]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on the demo's document: tokens of several letters, as real ones."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([demo[0].text], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = SMOLLM2
    return tokenizer


def test_in_a_record_sentences_end_at_line_ends_and_not_at_titles_and_initials() -> None:
    text = 'Mr. A. Bee saw Dr. Cee. "Fine," she said. It was 3.5 mg.\nNext line'
    source = Source.of_record(Record("p", "n", "b", "d", (text,), ()))
    assert source.sentences(source.sections[0]) == [
        "Mr. A. Bee saw Dr. Cee.",
        '"Fine," she said.',
        "It was 3.5 mg.",
        "Next line",
    ]


def test_headings_are_short_beginnings_with_a_colon(demo: list[Source]) -> None:
    assert [section.heading for section in demo[0].sections] == [
        *("Home", "Admission", "Findings", "Treatment", "Problems", "Discharge")
    ]
    for section in demo[0].sections:
        assert demo[0].text[: section.start].endswith(f"{section.heading}: ")
    letter = "Dear colleague, we saw: a lot of things."
    plain = Source.of_record(Record("p", "n", "b", "d", (letter, "Plan: none."), ()))
    assert plain.text[plain.sections[1].start :] == "none."
    assert len(plain.sections[0].heading or "") < 40


def test_cuts_fall_on_tokens_of_the_whole_sentence(bpe: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "A question?"}
    for sentence in ("Her family doctor is Dr. Paul Renshaw.", "Grüße aus Ålesund, näher als Rom."):
        whole = render_prompt(bpe, [user, {"role": "assistant", "content": sentence}])
        head = len(render_prompt(bpe, [user]))
        starts = cut_points(bpe, sentence)
        assert starts
        for start in starts:
            ids = render_prompt(bpe, [user, {"role": "assistant", "content": start}])
            assert ids == whole[: len(ids)]
            assert head + 2 <= len(ids) < len(whole)


def test_no_cut_in_the_middle_of_a_letter_or_before_anything_is_said(
    bpe: PreTrainedTokenizerFast,
) -> None:
    assert all("\ufffd" not in start for start in cut_points(bpe, "日本語の文です。"))
    assert cut_points(bpe, "A") == []


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row["prompt"]) for row in rows]


@pytest.mark.parametrize("prompt_recipe", ["started", "open", "mixed"])
def test_rows_are_repeatable_and_of_the_kind_asked_for(
    bpe: PreTrainedTokenizerFast, demo: list[Source], prompt_recipe: str
) -> None:
    train, val = make_rows(bpe, demo, prompt_recipe, rows=300, val_rows=8, seed=3)
    again, _ = make_rows(bpe, demo, prompt_recipe, rows=300, val_rows=8, seed=3)
    other, _ = make_rows(bpe, demo, prompt_recipe, rows=300, val_rows=8, seed=4)
    assert train == again and train != other
    assert (len(train), len(val)) == (300, 8)
    kinds = {row["extra_info"]["kind"] for row in train}
    assert kinds == ({"started", "open"} if prompt_recipe == "mixed" else {prompt_recipe})
    for index, row in enumerate(train):
        info = row["extra_info"]
        assert (info["index"], info["split"], info["document_id"]) == (index, "train", "demo_01")
        last = row["prompt"][-1]
        assert last["role"] == ("assistant" if info["kind"] == "started" else "user")
        if info["kind"] == "started":
            assert last["content"] in demo[0].text
    if prompt_recipe == "started":
        cuts = {row["prompt"][-1]["content"] for row in train}
        assert not cuts & {row["prompt"][-1]["content"] for row in val}


@pytest.mark.parametrize(
    ("prompt_recipe", "sha256"),
    [
        ("started", "e4bd819162fbbcb2f00f2ffbd44bedb80781bb4b47ac5e6e0efb45cd108e8446"),
        ("open", "aae7763fc93659322cdd3e4371c5234abe0dc02224e4719861441239dab40a74"),
        ("mixed", "676618460900a13255d36ee4918c5105610d1402a1d5c8478bf1344083ff68af"),
    ],
)
def test_the_demos_prompts_are_those_of_the_results(
    demo: list[Source], prompt_recipe: str, sha256: str
) -> None:
    """Figures were measured on them: whoever changes them measures anew."""
    rows = make_rows(byte_tokenizer(), demo, prompt_recipe, rows=400, val_rows=16, seed=0)
    made = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert made == sha256


def with_question(source: Source, question: str, stem: str | None) -> Source:
    asked = Question("demo_01", question, ("a", "b", "c", "d", "e"), 0, stem)
    return replace(source, questions=(asked,))


def test_cuts_that_hold_an_evaluation_stem_are_dropped_and_counted(
    bpe: PreTrainedTokenizerFast, demo: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    # Another case and other punctuation do not hide it.
    colliding = with_question(demo[0], "?", "her family doctor is, Dr")
    train, val = make_rows(bpe, [colliding], "started", 600, 4, seed=0, say=print)
    starts = {row["prompt"][-1]["content"] for row in train + val}
    assert not any(start.startswith("Her family doctor is Dr") for start in starts)
    assert any(start.startswith("Her next visit") for start in starts)
    dropped = int(capsys.readouterr().out.split("started answers, ")[1].split(" ")[0])
    assert dropped > 0


def test_an_open_prompt_that_is_an_evaluation_question_is_left_out(
    bpe: PreTrainedTokenizerFast, demo: list[Source]
) -> None:
    colliding = with_question(demo[0], "List the facts that the record gives about home.", None)
    train, _ = make_rows(bpe, [colliding], "open", rows=100, val_rows=4, seed=0)
    assert all("facts that the record gives about home" not in text for text in prompts(train))


def test_with_several_patients_prompts_and_questions_say_whom_they_mean(
    bpe: PreTrainedTokenizerFast, clinic: list[Source]
) -> None:
    train, _ = make_rows(bpe, clinic, "mixed", rows=200, val_rows=4, seed=0)
    names = {source.document_id: source.title for source in clinic}
    assert {row["patient_id"] for row in train} == set(names)
    for row in train:
        assert names[row["patient_id"]] in row["prompt"][0]["content"]
    for question in evaluation_questions(clinic):
        assert names[question.document_id] in question.question


def test_texts_without_headings_get_open_prompts_too(bpe: PreTrainedTokenizerFast) -> None:
    letter = Record("p", "A B", "1", "d", ("Dear colleague\nWe saw her on Monday.",), ())
    train, _ = make_rows(bpe, [Source.of_record(letter)], "open", rows=10, val_rows=1, seed=0)
    assert len(set(prompts(train))) == 10


def test_what_is_kept_aside_is_not_trained_on(
    bpe: PreTrainedTokenizerFast, demo: list[Source]
) -> None:
    train, val = make_rows(bpe, demo, "mixed", rows=400, val_rows=16, seed=0)
    check_held_out(train, val)
    with pytest.raises(ConfigError, match="is trained on, too"):
        check_held_out(train, [*val, train[7]])


def files() -> Source:
    text = "\n\n".join(f"# District {n}\n\n{prose(20, 20 * n)}" for n in range(6))
    return Source.of_file(ReadFile("town/guide.md", "Guide", text, "markdown"))


@pytest.mark.parametrize("prompt_recipe", ["started", "open"])
def test_a_prompt_from_a_long_document_names_the_part_it_came_from(
    bpe: PreTrainedTokenizerFast, prompt_recipe: str
) -> None:
    whole = files()
    source = whole.split(300, lambda text: len(text.split()))
    texts = {part.document.document_id: part.document.text for part in source.parts}
    assert list(texts) == [f"town/guide.md#{n}" for n in range(1, len(texts) + 1)]
    assert len(texts) > 3
    for part in source.parts:
        assert part.document.parent_id == "town/guide.md"
        assert part.document.parent_sha256 == whole.parts[0].document.sha256
        assert source.part_at(part.start) == source.part_at(part.end - 1) == part
    train, _ = make_rows(bpe, [source], prompt_recipe, rows=60, val_rows=2, seed=0)
    assert {row["patient_id"] for row in train} == {"town/guide.md"}
    assert len({row["extra_info"]["document_id"] for row in train}) == len(texts)
    for row in train:
        read = texts[row["extra_info"]["document_id"]]
        said = row["prompt"][-1]["content"]
        if prompt_recipe == "started":
            assert said in " ".join(read.split())
        else:
            heading = said[said.index("District") :].split()[1]
            assert f"# District {heading.strip('.?')}" in read


def test_a_document_without_headings_is_asked_about_part_by_part(
    bpe: PreTrainedTokenizerFast,
) -> None:
    source = Source.of_file(ReadFile("a.txt", "Town plan", prose(60), "plain"))
    train, _ = make_rows(bpe, [source], "open", rows=4, val_rows=1, seed=0)
    assert all("Town plan" in prompt for prompt in prompts(train))
    parts = source.split(200, lambda text: len(text.split()))
    train, _ = make_rows(bpe, [parts], "open", rows=20, val_rows=1, seed=0)
    for row in train:
        number = row["extra_info"]["document_id"].removeprefix("a.txt#")
        assert f"Town plan, part {number}" in row["prompt"][0]["content"]


def test_a_document_that_fits_is_its_own_only_part(demo: list[Source]) -> None:
    assert demo[0].split(None, len) is demo[0]
    assert demo[0].split(len(demo[0].text), len) is demo[0]
    assert len(demo[0].split(len(demo[0].text) - 1, len).parts) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("other", 10, 2), "'other' is unknown"),
        (("started", 0, 2), "--rows 0 .*; fix: give 1 or more"),
        (("started", 10, 10_000), "fewer --val-rows"),
    ],
)
def test_bad_requests_are_refused(
    bpe: PreTrainedTokenizerFast, demo: list[Source], arguments: tuple[str, int, int], says: str
) -> None:
    prompt_recipe, rows, val_rows = arguments
    with pytest.raises(ConfigError, match=says):
        make_rows(bpe, demo, prompt_recipe, rows, val_rows, seed=0)


def test_patients_are_chosen_by_name(clinic: list[Source]) -> None:
    assert [source.document_id for source in choose(clinic, ["clinic_02"])] == ["clinic_02"]
    assert len(choose(clinic, None)) == 2
    with pytest.raises(
        ConfigError, match="there is no patient 'p9'; fix: name one of clinic_01, clinic_02"
    ):
        choose(clinic, ["p9"])
    with pytest.raises(ConfigError, match="twice"):
        choose(clinic, ["clinic_01", "clinic_01"])


@pytest.mark.parametrize("recipe", PROMPT_RECIPES)
def test_prompts_about_chat_formats_hold_the_templates_control_tokens_alone(recipe: str) -> None:
    """Headings and sentences that name control tokens; read as such they would end the turn."""
    tokenizer = tokenizer_of(SHAPES["smollm2"])
    names = ("<|im_start|>", "<|im_end|>")
    sections = [
        f"# What {name} does\n\nEvery message number {n} is closed with {name} and a line end. "
        f"The words between {name} and the next {name} of part {n} are the content."
        for n in range(4)
        for name in names
    ]
    source = Source.of_file(ReadFile("chat.md", "chat", "\n\n".join(sections), "markdown"))
    rows, _ = make_rows(tokenizer, [source], recipe, rows=12, val_rows=2, seed=0)
    named = 0
    for row in rows:
        messages = list(row["prompt"])
        contents = "".join(message["content"] for message in messages)
        named += any(name in contents for name in names)
        ids = render_prompt(tokenizer, messages)
        found = [name for token in ids if (name := tokenizer.decode([token])) in names]
        assert found == ["<|im_start|>", "<|im_end|>", "<|im_start|>"], messages
        assert tokenizer.decode(ids).count("<|im_end|>") == contents.count("<|im_end|>") + 1
    assert named >= 6
