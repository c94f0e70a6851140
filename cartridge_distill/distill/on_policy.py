"""Is this batch on-policy? Every sample says who wrote it and with which cartridge version.

The student's samples must all be of the version that is trained now; the teacher has the document
and no cartridge, so its samples carry no version. What a sample says is proven by its log-probs:
``rounding`` compares those with the trainer's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cartridge_distill.distill.mixing import TEACHER
from cartridge_distill.util.errors import OffPolicyError


def check_versions(authors: Sequence[str], steps: Sequence[int | None], version: int) -> None:
    """Refuses samples of another cartridge version, and a teacher's that carry one.

    Args:
        authors: B, who wrote each; whatever is not the teacher's is held against the student.
        steps: B cartridge steps that the samples were made with; None where a sample has none.
        version: step of the cartridge that is trained now.

    Raises:
        OffPolicyError: names the versions.
    """
    samples = list(zip(authors, steps, strict=True))
    if labelled := {step for author, step in samples if author == TEACHER} - {None}:
        raise OffPolicyError(
            f"answers of the teacher carry cartridge steps {_sorted(labelled)}; the teacher has "
            "the document and no cartridge. The rollout proxy is out of order"
        )
    if stale := {step for author, step in samples if author != TEACHER} - {version}:
        raise OffPolicyError(
            f"rollouts of cartridge step {_sorted(stale)} reached the trainer at step {version}; "
            f"on-policy training takes step {version} only. The rollout proxy or the sync is out "
            "of order"
        )


def the_served_version(made_with: Iterable[str], served: Iterable[str]) -> str:
    """The one version id that all proxies serve and that all of the student's samples carry.

    Raises:
        OffPolicyError: the proxies serve several, or a sample carries another.
    """
    active, found = set(served), set(made_with)
    if len(active) != 1 or found - active:
        raise OffPolicyError(
            f"the batch has rollouts of the versions {sorted(found)}, and the proxies serve "
            f"{sorted(active)}"
        )
    return active.pop()


def _sorted(steps: set[int | None]) -> list[int | None]:
    return sorted(steps, key=str)
