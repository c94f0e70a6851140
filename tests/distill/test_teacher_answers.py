"""The teacher's answers and their cache: what is asked, what is kept, what never hits."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.distill.teacher_answers import AnswerCache, TeacherWriter
from cartridge_distill.model.identity import model_identity
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.util.errors import ConfigError, DocumentError
from tests.distill.filling import fill

ANSWER = Completion([5, 6, 7], [-0.1, -2.25, -1e-9], "length")
KEY = {"base_model": "m", "seed": 3, "temperature": 0.7}
TEXTS = {"red": "The red house.", "blue": "The blue boat."}


def test_what_was_put_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "new" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, ANSWER)
    assert AnswerCache(tmp_path / "new" / "cache").get(dict(reversed(KEY.items()))) == ANSWER
    for name, other in (("base_model", "n"), ("seed", 4), ("temperature", 0.8)):
        assert cache.get(KEY | {name: other}) is None
    assert [path.suffix for path in (tmp_path / "new").rglob("*.*")] == [".json"]  # no scratch


def cut(text: str) -> str:
    return text[:-9]


def swapped(text: str) -> str:
    return text.replace("[5, 6, 7]", "[5, 7, 6]")


def of_another(text: str) -> str:
    return text.replace('"seed": 3', '"seed": 4')


@pytest.mark.parametrize("damage", [cut, swapped, of_another, lambda _: "", lambda _: "[1]"])
def test_a_damaged_entry_is_said_and_written_anew(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = AnswerCache(tmp_path)
    cache.put(KEY, ANSWER)
    path = cache.path(KEY)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert f"{path} is damaged" in caplog.text
    cache.put(KEY, ANSWER)
    assert cache.get(KEY) == ANSWER


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    """Both write all entries again and again; each is whole at any moment."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(str(tmp_path), own)) for own in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    cache = AnswerCache(tmp_path)
    for number in range(300):
        answer = cache.get({"number": number})
        assert answer is not None and answer.token_ids[0] == number
    assert len(list(tmp_path.rglob("*.*"))) == 300


class Server:
    """Remembers what it was asked; answers with the seed."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], float, int]] = []

    async def __call__(self, ids: list[int], temperature: float, seed: int) -> Completion:
        self.asked.append((ids, temperature, seed))
        return Completion([seed], [-0.5], "length")


def writer(cache: Path | None = None, texts: dict[str, str] = TEXTS, **changes: Any) -> Any:
    given = {"context": 40, "max_tokens": 4, "temperature": 0.7, "base_model": "sha256:a"}
    store = DocumentStore(texts)
    kept = AnswerCache(cache) if cache is not None else None
    return TeacherWriter(store, lambda text: list(text.encode()), **(given | changes), cache=kept)


async def test_the_document_stands_before_the_prompt(tmp_path: Path) -> None:
    server = Server()
    answer, cached = await writer().write("red", [1, 2], 9, server)
    assert server.asked == [([*b"The red house.", 1, 2], 0.7, 9)]
    assert (answer.token_ids, cached) == ([9], False)


async def test_a_hit_is_the_same_answer_and_nothing_else_hits(tmp_path: Path) -> None:
    server = Server()
    first, cached = await writer(tmp_path).write("red", [1, 2], 9, server)
    assert not cached
    again, cached = await writer(tmp_path).write("red", [1, 2], 9, server)
    assert cached and again == first and len(server.asked) == 1
    changed: list[tuple[Any, tuple[Any, ...]]] = [
        (writer(tmp_path), ("blue", [1, 2], 9)),
        (writer(tmp_path), ("red", [1, 3], 9)),
        (writer(tmp_path), ("red", [1, 2], 10)),
        (writer(tmp_path, {"red": "The red house!"}), ("red", [1, 2], 9)),
        (writer(tmp_path, base_model="sha256:b"), ("red", [1, 2], 9)),
        (writer(tmp_path, temperature=0.8), ("red", [1, 2], 9)),
        (writer(tmp_path, max_tokens=5), ("red", [1, 2], 9)),
    ]
    for number, (other, sample) in enumerate(changed):
        _, cached = await other.write(*sample, server)
        assert not cached, number
    assert len(server.asked) == 1 + len(changed)


async def test_nothing_is_asked_without_the_whole_document(tmp_path: Path) -> None:
    server = Server()
    with pytest.raises(DocumentError, match="'green' is not in memory"):
        await writer(tmp_path).write("green", [1], 0, server)
    await writer(tmp_path, context=14 + 2 + 4).write("red", [1, 2], 0, server)
    with pytest.raises(DocumentError, match="'red' has 14 tokens.* that is 20.*context is 19"):
        await writer(tmp_path, context=19).write("red", [1, 2], 0, server)
    assert len(server.asked) == 1


def test_a_models_identity_is_its_content(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(model_folder, copy)
    assert model_identity(copy) == model_identity(model_folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_identity(copy) != model_identity(model_folder)
    assert model_identity("owner/name", "abc") == "owner/name@abc"
    with pytest.raises(ConfigError, match="no teacher_cache"):
        model_identity("owner/name")


def test_an_entry_can_be_read_by_a_person(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put(KEY, ANSWER)
    entry = json.loads(cache.path(KEY).read_text())
    assert entry["key"] == KEY
    assert entry["answer"]["token_ids"] == ANSWER.token_ids
