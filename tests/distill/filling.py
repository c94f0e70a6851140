"""What a process of its own does to a cache of answers; imports little, for it is started anew."""

from __future__ import annotations

from cartridge_distill.distill.teacher_answers import AnswerCache
from cartridge_distill.rollout.fingerprint import Completion


def fill(directory: str, own: int) -> None:
    cache = AnswerCache(directory)
    for number in range(300):
        key = {"number": number}
        found = cache.get(key)
        assert found is None or found.token_ids[0] == number, found
        cache.put(key, Completion([number, own], [-1.0, -1.0], "stop"))
