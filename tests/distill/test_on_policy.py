"""What is on-policy: the student's samples are of this version or near, the teacher's of none."""

from __future__ import annotations

import pytest

from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.distill.on_policy import (
    ages_of,
    check_versions,
    oldest_step,
    the_newest_version,
    the_served_version,
)
from cartridge_distill.util.errors import OffPolicyError


def test_a_sound_batch_passes() -> None:
    check_versions([STUDENT, TEACHER, STUDENT], [4, None, 4], 4)
    assert the_served_version(["run-4", "run-4"], ["run-4", "run-4"]) == "run-4"
    assert the_served_version([], ["run-4"]) == "run-4"  # the teacher wrote all of it


@pytest.mark.parametrize(
    ("author", "step", "says"),
    [
        (STUDENT, 3, r"step \[3\] reached the trainer at step 4"),
        (STUDENT, 5, r"step \[5\] reached"),
        (STUDENT, None, r"step \[None\] reached"),
        ("nobody", None, r"step \[None\] reached"),
        (TEACHER, 4, r"teacher carry cartridge steps \[4\]"),
    ],
)
def test_another_version_is_refused(author: str, step: int | None, says: str) -> None:
    with pytest.raises(OffPolicyError, match=says):
        check_versions([STUDENT, author], [4, step], 4)


@pytest.mark.parametrize(
    ("made_with", "served"),
    [(["run-3"], ["run-4"]), (["run-4"], ["run-4", "run-5"]), (["run-4"], [])],
)
def test_all_is_served_by_one_version(made_with: list[str], served: list[str]) -> None:
    with pytest.raises(OffPolicyError, match="proxies serve"):
        the_served_version(made_with, served)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_rollout_that_was_asked_for_ahead_may_be_so_old(step: int) -> None:
    check_versions([STUDENT, TEACHER, STUDENT], [4, None, step], 4, async_steps=2)


@pytest.mark.parametrize("step", [1, 5, None])
def test_an_older_one_is_refused(step: int | None) -> None:
    with pytest.raises(OffPolicyError, match=rf"step \[{step}\].*async_steps=2 takes steps 2 to 4"):
        check_versions([STUDENT, STUDENT], [4, step], 4, async_steps=2)


def test_ages_are_counted_of_the_students_samples() -> None:
    assert ages_of([STUDENT, TEACHER, STUDENT, STUDENT], [4, None, 2, 4], 4) == {0: 2, 2: 1}
    assert ages_of([TEACHER], [None], 4) == {}


def test_the_oldest_version_of_a_batch() -> None:
    assert [oldest_step(step, 2) for step in (1, 2, 3, 4, 9)] == [0, 0, 0, 1, 6]
    assert oldest_step(9, 0) == 8  # what strict training trains step 9 at


def test_the_newest_version_that_wrote() -> None:
    served = [["run-3", "run-4", "run-5"], ["run-3", "run-4"]]
    assert the_newest_version(["run-3", "run-4", "run-3"], served) == "run-4"
    assert the_newest_version([], served) == "run-4"  # the teacher wrote all of it
    for made_with in (["run-5"], ["run-4", "other-4"]):
        with pytest.raises(OffPolicyError, match="not every proxy has served"):
            the_newest_version(made_with, served)
    with pytest.raises(OffPolicyError, match="not every proxy has served"):
        the_newest_version([], [["run-3"], []])
