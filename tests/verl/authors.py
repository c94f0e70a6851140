"""Who wrote which answer of a whole run: what the server was asked for, and the step's numbers."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

from cartridge_distill.model.prompts import render_document
from cartridge_distill.sync.versions import run_of, step_of, version_id
from tests.tiny import byte_tokenizer
from tests.verl.world import ROWS, World


class Asked:
    """What came to the server, by author; the probe of each new version left out."""

    def __init__(self, world: World) -> None:  # noqa: F811
        text = json.loads((world.folder / "documents.jsonl").read_text())["text"]
        self.document = render_document(byte_tokenizer(), text)
        self.of_student: list[dict[str, Any]] = []
        self.of_teacher: list[dict[str, Any]] = []
        self.stale_from = 10**6  # from this version on the server serves version 0 under its name
        self._lock = threading.Lock()
        world.proxy.spoil = self.note

    def note(self, _: int, body: dict[str, Any]) -> httpx.Response | None:
        with self._lock:
            if not body["cartridges"]:
                self.of_teacher.append(body)
            elif body["max_tokens"] > 1:
                self.of_student.append(body)
                [cartridge] = body["cartridges"]
                if step_of(cartridge["id"]) >= self.stale_from:
                    cartridge["id"] = version_id(run_of(cartridge["id"]), 0)
        return None


def check_counts(step: dict[str, Any], before: dict[str, Any], by_student: int) -> None:
    """One step's numbers add up, and go on from those of the step before."""
    assert step["actor/on_policy_fraction"] == by_student / ROWS
    hits, misses = (step[f"teacher_answers/cache_{name}"] for name in ("hits", "misses"))
    assert hits + misses == ROWS - by_student
    assert bool(step["tokens/generated"]) == bool(by_student)
    assert bool(step["tokens/generated_by_teacher"]) == bool(misses)
    assert step["tokens/trained"] == step["tokens/teacher_scored"]
    if not hits:
        made = step["tokens/generated"] + step["tokens/generated_by_teacher"]
        assert made == step["tokens/trained"]
    for name in ("generated", "generated_by_teacher", "teacher_scored", "trained"):
        total = before.get(f"tokens/total_{name}", 0) + step[f"tokens/{name}"]
        assert step[f"tokens/total_{name}"] == total
