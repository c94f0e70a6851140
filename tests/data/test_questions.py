"""Questions about own documents: read from a file, given options, written by a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cartridge_distill.data import command
from cartridge_distill.data.documents.reading import ReadFile
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.questions.options import MOST_WRONG, Asked, with_options
from cartridge_distill.data.questions.reading import add_questions
from cartridge_distill.data.questions.writing import (
    BRIEFLY,
    QuestionSettings,
    made_with,
    sift,
    write_questions,
)
from cartridge_distill.data.records import Question, load_questions, save_questions
from cartridge_distill.data.self_study.plan import Plan
from cartridge_distill.model.prompts import render_alone, render_document
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.journal import Journal
from tests.data.documents.made import prose
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
FACTS = (
    "The lighthouse was built in 1871 by Marten Holt. Its lamp burns rapeseed oil. "
    "The keeper in 1902 was Ada Brandt. The stairs have 163 steps."
)


def length(text: str) -> int:
    return len(render_document(TOKENIZER, text))


def source(name: str = "guides/light.md", text: str = FACTS) -> Source:
    return Source.of_file(ReadFile(name, f"The {name}", text, "markdown"))


def write(folder: Path, name: str, content: str | list[Any], encoding: str = "utf-8") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(encoding))
    return path


BUILT = {"question": "When was it built?", "answer": "1871", "wrong": ["1872", "1902"]}
OIL = {"question": "What burns in the lamp?", "answer": "rapeseed oil"}
KEEPER = {"question": "Who was the keeper in 1902?", "answer": "Ada Brandt"}
STEPS = {"question": "How many steps are there?", "answer": 163}


# --- a file ---------------------------------------------------------------------------------------


def test_json_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    rows: list[Any] = [BUILT, OIL, KEEPER, STEPS]
    table = (
        "\ufeffQuestion;Answer;wrong;wrong_2\r\n"
        "When was it built?;1871;1872;1902\r\n"
        "What burns in the lamp?;rapeseed oil;;\r\n\r\n"
        '"Who was the keeper in 1902?";"Ada Brandt";;\r\n'
        "How many steps are there?;163;;\r\n"
    )
    files = [
        write(tmp_path, "q.json", rows),
        write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, rows)) + "\n"),
        write(tmp_path, "q.csv", table),
        write(tmp_path, "tabs.csv", table.replace(";", "\t"), "utf-16"),
    ]
    [found] = {tuple(add_questions([source()], path, 0)[0].questions) for path in files}
    built, oil, keeper, steps = found
    assert sorted(built.options) == ["1871", "1872", "1902"] and built.answer == "1871"
    assert [question.answer for question in (oil, keeper, steps)] == [
        *("rapeseed oil", "Ada Brandt", "163")
    ]
    assert set(keeper.options) == {"Ada Brandt", "rapeseed oil", "1871", "163"}
    assert {question.document_id for question in found} == {"guides/light.md"}


def test_the_place_of_the_right_answer_is_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [{**BUILT, "question": f"When was house {n} built?"} for n in range(40)]
    path = write(tmp_path, "q.json", rows)
    first, again, other = (add_questions([source()], path, seed)[0].questions for seed in (3, 3, 4))
    assert first == again != other
    assert {question.correct for question in first} == {0, 1, 2}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "holds no question"),
        ({"question": "?"}, "fix: write a JSON list"),
        ([["When?", "1871"]], "question 1 is a list; fix: write an object"),
        ([{**BUILT, "answr": "1"}], "'answr' is unknown; fix: did you mean 'answer'"),
        ([{"question": "When?"}], "'answer' is missing"),
        ([{**BUILT, "answer": None}], "'answer' is null"),
        ([{**BUILT, "answer": " "}], "'answer' is empty"),
        ([{**BUILT, "wrong": 7}], "'wrong' is 7; fix: write a list"),
        ([{**BUILT, "wrong": ["1871"]}], "stands there twice"),
        ([OIL], "nothing to choose from but the right answer 'rapeseed oil'"),
        ([BUILT, {**BUILT, "question": "when was it built"}], "is asked in .*question 1 already"),
        ([{**BUILT, "document": "lihgt.md"}], "no document 'lihgt.md'"),
        ('[{"question": "a", "question": "b"}]', "occurs twice"),
        ("[1", "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        add_questions([source()], write(tmp_path, "q.json", content), 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("question,answer\nWhen, or where?,1871\n", ":2: 3 values for 2 columns; fix: put quotes"),
        ("question,answer,answer\na,b,c\n", "'answer' stands there twice"),
        ("question,right\na,b\n", "'right' is unknown"),
        ("question\na\n", "'answer' is missing"),
        ("question,answer\na,\n", ":2: 'answer' is empty"),
        ('question,answer\n"a,b\n', "not CSV"),
        ("", "missing"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        add_questions([source()], write(tmp_path, "q.csv", content), 0)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give a file of \.csv, \.json, \.jsonl"):
        add_questions([source()], tmp_path / "q.xlsx", 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        add_questions([source()], tmp_path / "q.csv", 0)


def test_a_document_is_named_by_id_name_or_title(tmp_path: Path) -> None:
    sources = [source(), source("tools/light.md", "Other words."), source("guides/dark.md", "Dim.")]
    for named, index in (
        ("guides/light.md", 0),
        ("dark.md", 2),
        ("dark", 2),
        ("The tools/light.md", 1),
    ):
        path = write(tmp_path, "q.json", [{**BUILT, "document": named}])
        counts = [len(each.questions) for each in add_questions(sources, path, 0)]
        assert counts == [int(place == index) for place in range(3)], named
    for named, says in (
        ("light.md", r"may be 'guides/light.md', 'tools/light.md'"),
        ("guides/dork.md", "did you mean 'guides/dark.md'"),
        (None, "there are 3 documents; fix: say with 'document'"),
    ):
        path = write(tmp_path, "q.json", [{**BUILT, "document": named}])
        with pytest.raises(ConfigError, match=says):
            add_questions(sources, path, 0)


def test_a_question_goes_to_the_part_that_answers_it(tmp_path: Path) -> None:
    long = source(text=f"{FACTS}\n\n{prose(40)}").split(1500, length)
    ids = [part.document.document_id for part in long.parts]
    assert len(ids) > 1
    [made] = add_questions([long], write(tmp_path, "q.json", [BUILT]), 0)
    assert made.questions[0].document_id == ids[0]
    named = [{**BUILT, "answer": "nowhere", "document": ids[1]}]
    [made] = add_questions([long], write(tmp_path, "q.json", named), 0)
    assert made.questions[0].document_id == ids[1]
    with pytest.raises(
        ConfigError, match="0 of them hold the answer 'nowhere'.*say with 'document'"
    ):
        add_questions([long], write(tmp_path, "q.json", [{**BUILT, "answer": "nowhere"}]), 0)


# --- options --------------------------------------------------------------------------------------


def test_wrong_answers_are_like_the_right_one() -> None:
    answers = ["1871", "163", "1902", "12 May 1950", "Ada Brandt", "Marten Holt", "in 1871", "7"]
    asked = [Asked(str(n), "d", f"Question {n}?", text) for n, text in enumerate(answers)]
    found = {question.answer: question for question in with_options(asked, 0)}
    year = set(found["1871"].options)
    assert year == {"1871", "163", "1902", "7", "12 May 1950"}  # numbers; never "in 1871"
    assert "Marten Holt" in found["Ada Brandt"].options
    assert all(len(question.options) == 1 + MOST_WRONG for question in found.values())


# --- written by a model ---------------------------------------------------------------------------


def plan_of(*sources: Source) -> Plan:
    return Plan(sources or (source(),), 700, 0, length)


def row(number: int, text: str, answer: str | None = None, unaided: str | None = "No.") -> Any:
    return {
        "task": number,
        "opening": "",
        "text": text,
        "finish": "stop",
        "answer": answer,
        "unaided": unaided,
    }


def test_questions_that_judge_nothing_are_dropped_and_counted() -> None:
    cases = [
        ('Question: "When was the lighthouse built?" Answer: 1871', '"1871."', None),
        ("Tell me about the lighthouse.", None, "no question mark"),
        ("Who?", None, "a question of less than 3 or more than 40 words"),
        ("What burns in the lamp?", "Rapeseed oil\nor whale oil", None),
        ("what burns in the lamp ?", "rapeseed oil", "a question that is there already, in"),
        ("Who was the keeper?", "", "no answer, or one of more than 12 words"),
        ("Who kept it in that year?", "Bela Brandt", "an answer that does not stand in the text"),
        ("Who was Ada Brandt, the keeper?", "Ada Brandt", "a question that says its answer"),
    ]
    plan = plan_of()
    rows = [row(number, text, answer) for number, (text, answer, _) in enumerate(cases)]
    known = row(len(rows), "How many steps does it have?", "163", "There are 163 steps, I think.")
    found = sift([known, *rows], plan)
    assert [(asked.question, asked.answer) for asked in found.kept] == [
        ("When was the lighthouse built?", "1871"),
        ("What burns in the lamp?", "Rapeseed oil"),
    ]
    expected = [reason for *_, reason in cases if reason] + ["answered without the document"]
    assert len(found.dropped) == len(expected) == found.dropped.total()
    assert all(any(key.startswith(reason) for key in found.dropped) for reason in expected)


class ScriptedModel:
    """Stands in for a model that can ask: none that small can. It sees the prompts as ids."""

    def __init__(self, facts: list[tuple[str, str]], known: str = "") -> None:
        self.facts, self.known = facts, known
        self.asked: list[tuple[str, float]] = []

    async def complete(
        self, prompt: list[int], tokens: int, temperature: float, seed: int | None = None
    ) -> list[Completion]:
        text = TOKENIZER.decode(prompt)
        self.asked.append((text, temperature))
        if temperature:
            said = self.facts[(seed or 0) % len(self.facts)][0]
        else:
            question, answer = next(fact for fact in self.facts if BRIEFLY.format(fact[0]) in text)
            has_document = FACTS in text
            said = answer if has_document or question == self.known else "I do not know."
        ids = TOKENIZER(said, add_special_tokens=False).input_ids
        return [Completion(ids[:tokens], [-1.0] * len(ids[:tokens]), "stop")]


async def test_questions_are_asked_with_and_without_the_document(tmp_path: Path) -> None:
    facts = [(str(f["question"]), str(f["answer"])) for f in (BUILT, OIL, KEEPER, STEPS)]
    facts[0] = ("In which year was it built?", "1871")
    model: Any = ScriptedModel(facts, known="How many steps are there?")
    settings = QuestionSettings(questions=3, attempts=12, concurrency=1)
    plan, about = plan_of(), {"made": "so"}
    with Journal(tmp_path / "questions.jsonl", about) as journal:
        found = await write_questions(model, TOKENIZER, plan, journal, settings)
        rows = list(journal.rows)
    assert {asked.question for asked in found.kept} == {fact[0] for fact in facts[:3]}
    assert found.dropped["answered without the document"] >= 1
    document = TOKENIZER.decode(render_document(TOKENIZER, FACTS))
    for text, temperature in model.asked:
        assert text.startswith(document) or not temperature and FACTS not in text
    alone = [
        {"role": "user", "content": BRIEFLY.format(facts[0][0])},
        {"role": "assistant", "content": ""},
    ]
    assert TOKENIZER.decode(render_alone(TOKENIZER, alone)) in {text for text, _ in model.asked}

    # goes on: nothing is asked again
    before = len(model.asked)
    with Journal(tmp_path / "questions.jsonl", about) as journal:
        again = await write_questions(model, TOKENIZER, plan, journal, settings)
    assert again == found and len(model.asked) == before and rows

    [made] = found.added_to([source()], seed=0)
    assert [question.answer for question in made.questions] == [
        asked.answer for asked in found.kept
    ]
    found.kept = found.kept[:1]
    assert found.added_to([source()], seed=0)[0].questions == ()
    assert found.dropped["the only one about its document"] == 1


def test_a_journal_of_other_questions_is_refused(tmp_path: Path) -> None:
    settings = QuestionSettings(questions=3)
    about = made_with(plan_of(), TOKENIZER, settings, ["m"])
    Journal(tmp_path / "q.jsonl", about).close()
    for other in (
        made_with(plan_of(source(text=FACTS + " More.")), TOKENIZER, settings, ["m"]),
        made_with(plan_of(), TOKENIZER, replace(settings, seed=1), ["m"]),
        made_with(plan_of(), TOKENIZER, settings, ["other"]),
    ):
        with pytest.raises(ConfigError, match="another run wrote"):
            Journal(tmp_path / "q.jsonl", other)
    more = made_with(plan_of(), TOKENIZER, replace(settings, questions=9), ["m"])
    Journal(tmp_path / "q.jsonl", more).close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"questions": 1}, "too few.*; fix: .* 2 or more"),
        ({"temperature": 0.0}, "; fix: give more than 0"),
        ({"attempts": 0}, "attempts"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QuestionSettings(**{"questions": 8, **settings})


# --- the command ----------------------------------------------------------------------------------


def prepare(folder: Path, model: Path, *more: str) -> int:
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "light.md").write_text(f"# Light\n\n{FACTS}\n\n{prose(30)}")
    arguments = ["--data", str(folder / "docs"), "--tokenizer", str(model), "--rows", "400"]
    return command.main([*arguments, "--val-rows", "4", "--out", str(folder / "out"), *more])


def test_prepare_keeps_the_questions_from_the_prompts(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "The lighthouse was built in"
    path = write(tmp_path, "q.json", [{**BUILT, "stem": stem}, OIL])
    assert (
        prepare(tmp_path, model_folder, "--questions", str(path), "--teacher-context", "9000") == 0
    )
    assert "2 questions for the evaluation" in capsys.readouterr().out
    [built, oil] = load_questions(tmp_path / "out" / "eval.json")
    assert isinstance(built, Question) and (built.stem, oil.document_id) == (stem, "light.md")
    prompts = pd.read_parquet(tmp_path / "out" / "train.parquet")["prompt"]
    said = [message["content"] for messages in prompts for message in messages]
    assert any("The keeper in" in text for text in said)  # of the same paragraph
    assert not any(stem in text for text in said)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--questions", "nowhere.csv"), "there is no such file"),
        (("--write-questions", "8"), "--write-questions needs a server of the base model"),
        (("--server", "http://127.0.0.1:9"), "--server belongs to --recipe self_study and to"),
    ],
)
def test_options_that_cannot_work(
    tmp_path: Path, model_folder: Path, capsys: Any, more: tuple[str, ...], says: str
) -> None:
    assert prepare(tmp_path, model_folder, *more) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_wordings_and_a_kind_come_from_a_table_or_a_list(tmp_path: Path) -> None:
    table = write(
        tmp_path,
        "q.csv",
        "question,answer,also,also_2,kind\n"
        "Who was the keeper?,Ada Brandt,Mrs. Brandt,the keeper Brandt,one place\n"
        "How many steps?,163,,,\n",
    )
    listed = write(
        tmp_path,
        "q.json",
        [
            {
                "question": "Who was the keeper?",
                "answer": "Ada Brandt",
                "also": ["Mrs. Brandt", "the keeper Brandt"],
                "kind": "one place",
            },
            {"question": "How many steps?", "answer": 163},
        ],
    )
    for path in (table, listed):
        keeper, steps = add_questions([source()], path, seed=0)[0].questions
        assert keeper.wordings == ("Ada Brandt", "Mrs. Brandt", "the keeper Brandt")
        assert (keeper.kind, steps.wordings, steps.kind) == ("one place", ("163",), None)
        saved = tmp_path / "eval.json"
        save_questions(saved, [keeper, steps])
        assert load_questions(saved) == [keeper, steps]
        rows = json.loads(saved.read_text())
        assert "also" in rows[0] and "also" not in rows[1] and "kind" not in rows[1]


def test_an_option_is_no_other_wording(tmp_path: Path) -> None:
    path = write(tmp_path, "q.json", [{**BUILT, "also": ["1872"]}])
    with pytest.raises(ConfigError, match="'1872' is an option, and another wording"):
        add_questions([source()], path, seed=0)
    path = write(tmp_path, "q.json", [{**BUILT, "also": [{}]}])
    with pytest.raises(ConfigError, match="'also' is a dict, not a text"):
        add_questions([source()], path, seed=0)


def test_another_wording_of_the_right_answer_is_no_wrong_one() -> None:
    asked = [
        Asked("1", "a", "Who was it?", "Ada Brandt", also=("the keeper",)),
        Asked("2", "a", "Who had the lamp?", "the keeper"),
        Asked("3", "a", "Who built it?", "Marten Holt"),
    ]
    assert set(with_options(asked, 0)[0].options) == {"Ada Brandt", "Marten Holt"}


@pytest.mark.parametrize("number", ["NaN", "1e400", "-Infinity"])
def test_an_answer_that_is_no_number_is_refused(tmp_path: Path, number: str) -> None:
    """It was the right answer "nan"."""
    path = tmp_path / "q.json"
    path.write_text(f'[{{"question": "When?", "answer": {number}}}]')
    with pytest.raises(ConfigError, match=r"'answer' is (nan|-?inf), no number"):
        add_questions([source()], path, seed=0)
