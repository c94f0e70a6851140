"""The grid file: what it means, what is refused, and where it was registered."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.evaluation.free_answers import matches_any
from cartridge_distill.util.errors import ConfigError
from tests.training.study.made import grid_of, write_grid, write_texts
from training.study.documents import KINDS, TEXTS, TUNING, UNSEEN, all_documents, chosen
from training.study.grid import Grid, read_grid, registered

GRIDS = Path(__file__).resolve().parents[3] / "training" / "study" / "grids"


def read(tmp_path: Path, **changes: Any) -> Grid:
    return read_grid(write_grid(tmp_path / "grid.yaml", tmp_path / "model", **changes))


def test_an_arm_sets_what_all_arms_leave_open(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        settings={"num_tokens": 64, "lr": 0.01, "lr_decay_to": 0.1},
        arms={"mix": {"loss": "kl_mix", "loss_weight": 0.25, "lr_warmup_steps": 1}, "plain": None},
        seeds=[3, 4],
    )
    mix, plain = grid.run_settings("mix", 3), grid.run_settings("plain", 4)
    assert (mix.cartridge.loss, mix.cartridge.loss_weight, mix.cartridge.lr) == (
        "kl_mix",
        0.25,
        0.01,
    )
    assert (mix.optim.lr_warmup_steps, plain.optim.lr_warmup_steps) == (1, 0)
    assert (mix.seed, plain.seed, plain.cartridge.loss) == (3, 4, "forward_kl_topk")
    assert grid.evaluate_at == (2, 4)  # the last step is among them
    assert grid.runs == [("harbour", a, s) for s in (3, 4) for a in ("mix", "plain")]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stepz": 3}, "'stepz' is unknown; fix: did you mean 'steps'"),
        ({"steps": 0}, "steps: 0; set a whole number, 1 or more"),
        ({"arms": {}}, "arms: name one at least"),
        ({"arms": {"a": {"batch": 3}}}, "arm a: 'batch' is not an arm's to set"),
        ({"arms": {"a": {"loss": "klmix"}}}, "did you mean 'kl_mix'"),
        ({"arms": {"a b": {}}}, "arm 'a b': use letters"),
        ({"arms": ["a"]}, "arms: ['a'] is no mapping"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"evaluate_at": [5]}, "evaluate_at: [5]; a run has 4 steps"),
        ({"measures": ["off_context"]}, "give own_text"),
        (
            {"settings": {"tokens": 16}},
            "settings: 'tokens' is unknown; fix: did you mean 'num_tokens'",
        ),
        ({"settings": {"lr_warmup_steps": 2}}, "would be ignored at a constant rate"),
        ({"settings": {"lr_decay_to": 0.1, "lr_warmup_steps": 4}}, "lr_warmup_steps=4 of 4 steps"),
        ({"documents": "harbour"}, "documents: 'harbour' is no list"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, **changes)
    assert told in str(error.value)


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_a_grid_is_registered_by_the_commit_that_holds_it(tmp_path: Path) -> None:
    path = write_grid(tmp_path / "grid.yaml", tmp_path / "model")
    git(tmp_path, "init", "-q")
    with pytest.raises(ConfigError, match="is not committed"):
        registered(path)
    assert registered(path, draft=True).commit is None
    assert "not registered" in registered(path, draft=True).words
    git(tmp_path, "add", "grid.yaml")
    git(tmp_path, "commit", "-q", "-m", "the grid")
    found = registered(path)
    assert found.commit is not None and found.commit[:12] in found.words
    write_grid(path, tmp_path / "model", steps=5)
    with pytest.raises(ConfigError, match="was changed since it was committed"):
        registered(path)


def test_the_comparison_keeps_the_recipe_of_its_table() -> None:
    """docs/results.md: the demo may be tuned, the comparison stays comparable with those before."""
    grid = read_grid(GRIDS / "demo_record.yaml")
    assert (grid.documents, grid.seeds) == (("demo-record",), (0, 1, 2))
    found = {arm: grid.run_settings(arm, 0) for arm in grid.arms}
    assert {arm: run.cartridge.on_policy_fraction for arm, run in found.items()} == {
        "off-policy": 0.0,
        "on-policy": 1.0,
        "mixed": 0.25,
    }
    for run in found.values():
        assert (run.steps, run.batch, run.response_tokens) == (16, 48, 4)
        cartridge = run.cartridge
        assert (cartridge.lr, cartridge.lr_decay_to, cartridge.num_tokens) == (0.02, None, 128)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_this_project_can_be_read(path: Path) -> None:
    chosen(read_grid(path))


def test_the_studys_documents_are_whole() -> None:
    found = {name: each for name, each in all_documents().items() if each.questions is not None}
    uses = [each.use for each in found.values()]
    assert (uses.count(TUNING), uses.count(UNSEEN)) == (3, 3)
    assert len({each.language for each in found.values()}) >= 2
    licences = (TEXTS / "README.md").read_text()
    for name, each in found.items():
        questions = json.loads(each.questions.read_text())
        assert {row["kind"] for row in questions} == set(KINDS) and len(questions) >= 12
        for row in questions:
            wordings = (row["answer"], *row.get("also", ()))
            # an echo of the question would be taken for an answer
            assert not matches_any(row["question"], wordings), (name, row["question"])
        assert each.text.name in licences and each.licence in licences
    assert {path.name for path in TEXTS.iterdir()} == {
        "README.md",
        "index.yaml",
        *(each.text.name for each in found.values()),
        *(f"{name}.questions.json" for name in found),
    }


def test_a_text_that_a_formatter_touched_is_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    all_documents(texts)
    (texts / "harbour.md").write_text((texts / "harbour.md").read_text() + "\n")
    with pytest.raises(ConfigError, match="harbour.md is not as it was"):
        all_documents(texts)


def test_an_unseen_document_is_for_the_end(tmp_path: Path) -> None:
    name = next(name for name, each in all_documents().items() if each.use == UNSEEN)
    with pytest.raises(ConfigError, match="kept unseen"):
        chosen(Grid(**{**_plain(tmp_path), "documents": (name,)}))
    (document,) = chosen(Grid(**{**_plain(tmp_path), "documents": (name,), "unseen": True}))
    assert document.name == name
    with pytest.raises(ConfigError, match="'harbor' is unknown"):
        chosen(Grid(**{**_plain(tmp_path), "documents": ("harbor",)}))


def _plain(tmp_path: Path) -> dict[str, Any]:
    content = grid_of(tmp_path / "model")
    lists = ("documents", "seeds", "evaluate_at", "measures")
    return content | {name: tuple(content[name]) for name in lists}
