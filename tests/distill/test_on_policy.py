"""What is on-policy: the student's samples are of this version, the teacher's of none."""

from __future__ import annotations

import pytest

from cartridge_distill.distill.mixing import STUDENT, TEACHER
from cartridge_distill.distill.on_policy import check_versions, the_served_version
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
