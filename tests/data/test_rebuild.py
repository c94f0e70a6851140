"""A document that changed: which sections did, and what the prompts are about then."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from cartridge_distill.data import command
from cartridge_distill.data.documents.reading import ReadFile
from cartridge_distill.data.documents.source import Source
from cartridge_distill.data.prompt_recipes import make_rows
from cartridge_distill.data.rebuild import changed_sections, data_folder, texts_before
from cartridge_distill.util.errors import ConfigError
from tests.tiny import byte_tokenizer

SECTIONS = {
    "The lamp": "The lamp was built by Marten Holt in 1871. It burns rapeseed oil every night.",
    "The keeper": "The keeper in 1902 was Ada Brandt. She had two cats and a small boat.",
    "The stairs": "The stairs have 163 steps of red stone. Nobody climbs them in the winter.",
}
NEW = SECTIONS | {
    "The keeper": "The keeper in 1903 was Ole Lund. She had two cats and a small boat."
}


def text_of(sections: dict[str, str]) -> str:
    return "\n\n".join(f"# {heading}\n\n{text}" for heading, text in sections.items()) + "\n"


def source_of(sections: dict[str, str], name: str = "light.md") -> Source:
    return Source.of_file(ReadFile(name, "The light", text_of(sections), "markdown"))


def headings(now: dict[str, str], before: str | None) -> list[str | None]:
    source = source_of(now)
    found = changed_sections(source, before)
    return [section.heading for section in source.sections if section in found]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (SECTIONS, []),
        (NEW, ["The keeper"]),
        ({name: text.replace(". ", ".\n") for name, text in SECTIONS.items()}, []),  # line ends
        (SECTIONS | {"The oil": "It comes from Kelsby by boat."}, ["The oil"]),
        # a sentence that is gone has changed the section it was in
        (SECTIONS | {"The keeper": "The keeper in 1902 was Ada Brandt."}, ["The keeper"]),
        ({"The tower" if k == "The stairs" else k: v for k, v in SECTIONS.items()}, ["The tower"]),
        ({name: SECTIONS[name] for name in ("The stairs", "The lamp", "The keeper")}, None),
    ],
)
def test_a_section_has_changed_where_a_sentence_has(
    now: dict[str, str], expected: list[str] | None
) -> None:
    found = headings(now, text_of(SECTIONS))
    if expected is None:  # what was moved: the diff calls one side of it changed, and not all
        assert 0 < len(found) < len(now)
        return
    if "The keeper" in expected and now["The keeper"].endswith("Brandt."):
        assert "The keeper" in found  # and its neighbour, which the gone sentence stood before
        return
    assert found == expected


def test_a_document_that_was_not_there_has_changed_as_a_whole() -> None:
    assert headings(SECTIONS, None) == list(SECTIONS)


def test_half_of_the_prompts_are_about_what_changed() -> None:
    before = {"light.md": text_of(SECTIONS)}
    train, val = make_rows(
        byte_tokenizer(), [source_of(NEW)], "started", 40, 8, seed=0, before=before
    )
    asked = [row["prompt"][0]["content"] for row in (*train, *val)]
    about = ["The keeper" in text for text in asked]
    assert about == [True, False] * 24  # in turn, in both files
    assert {"lamp" in text or "stairs" in text for text in asked if "keeper" not in text} == {True}
    again, _ = make_rows(
        byte_tokenizer(), [source_of(NEW)], "started", 40, 8, seed=0, before=before
    )
    assert again == train
    # without what was before, all sections alike
    plain, _ = make_rows(byte_tokenizer(), [source_of(NEW)], "started", 40, 8, seed=0)
    assert 8 <= sum("The keeper" in row["prompt"][0]["content"] for row in plain) <= 18


@pytest.mark.parametrize("recipe", ["open", "mixed"])
def test_every_recipe_of_cut_prompts_does_so(recipe: str) -> None:
    before = {"light.md": text_of(SECTIONS)}
    train, _ = make_rows(byte_tokenizer(), [source_of(NEW)], recipe, 16, 2, 0, before=before)
    about = ["The keeper" in row["prompt"][0]["content"] for row in train]
    assert about == [True, False] * 8


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (SECTIONS, "no section of light.md has changed"),
        ({"The sea": "It is grey and deep, and it is cold."}, "no section of light.md is as it"),
    ],
)
def test_nothing_or_all_changed_is_refused(now: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_rows(
            *(byte_tokenizer(), [source_of(now)], "started", 8, 2, 0),
            before={"light.md": text_of(SECTIONS)},
        )


def test_parts_of_a_long_document_are_read_as_one(tmp_path: Path) -> None:
    rows = [{"document_id": f"a.md#{n}", "text": text} for n, text in ((1, "One."), (2, "Two."))]
    rows.append({"document_id": "b#c.md", "text": "Three."})
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts_before(data_folder(tmp_path)) == {"a.md": "One.\n\nTwo.", "b#c.md": "Three."}


def test_the_command_reads_a_run_or_its_data(tmp_path: Path, model_folder: Path) -> None:
    """From the first data to those of the changed document, by the folder of the run."""
    document, run = tmp_path / "light.md", tmp_path / "run"
    typed = ["--tokenizer", str(model_folder), "--rows", "12", "--val-rows", "4"]
    typed += ["--data", str(document), "--teacher-context", "400", "--prompt-tokens", "100"]
    document.write_text(text_of(SECTIONS))
    assert command.main([*typed, "--out", str(run / "data")]) == 0
    (run / "metrics.jsonl").touch()  # a run's folder has one
    document.write_text(text_of(NEW))
    for number, rebuilt_from in enumerate((run, run / "data")):
        out = tmp_path / f"new{number}"
        assert command.main([*typed, "--rebuild", str(rebuilt_from), "--out", str(out)]) == 0
        prompts = pd.read_parquet(out / "train.parquet")["prompt"]
        assert sum("The keeper" in prompt[0]["content"] for prompt in prompts) == 6


def test_what_has_no_documents_is_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "light.md"
    document.write_text(text_of(NEW))
    typed = ["--tokenizer", str(model_folder), "--data", str(document), "--out", f"{tmp_path}/out"]
    assert command.main([*typed, "--rebuild", str(tmp_path / "no")]) == 1
    assert "documents.jsonl is not there" in capsys.readouterr().err
    self_study = ["--recipe", "self_study", "--server", "http://127.0.0.1:9"]
    assert command.main([*typed, "--rebuild", str(tmp_path), *self_study]) == 1
    assert "take --recipe started, open or mixed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
