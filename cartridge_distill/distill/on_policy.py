"""Is this batch on-policy? Every sample says who wrote it and with which cartridge version.

The student's samples must all be of the version that is trained now, or, where rollouts are asked
for ahead, of one of the last few. The teacher has the document and no cartridge, so its samples
carry no version. What a sample says is proven by its log-probs: ``rounding`` compares those with
the trainer's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cartridge_distill.distill.mixing import TEACHER
from cartridge_distill.util.errors import OffPolicyError

OLDEST_STEP = "oldest_step"
"""Of a rollout that is asked for ahead: the step of the oldest version that may answer."""
ONLY_STEP = "only_step"
"""Of a rollout that is not: the step of the one version that may answer. Whoever knows that version
need not ask whether there is a newer one."""


def check_versions(
    authors: Sequence[str], steps: Sequence[int | None], version: int, async_steps: int = 0
) -> None:
    """Refuses samples of another cartridge version, and a teacher's that carry one.

    Args:
        authors: B, who wrote each; whatever is not the teacher's is held against the student.
        steps: B cartridge steps that the samples were made with; None where a sample has none.
        version: step of the cartridge that is trained now.
        async_steps: how many steps earlier a sample's version may be.

    Raises:
        OffPolicyError: names the versions.
    """
    samples = list(zip(authors, steps, strict=True))
    if labelled := {step for author, step in samples if author == TEACHER} - {None}:
        raise OffPolicyError(
            f"answers of the teacher carry cartridge steps {_sorted(labelled)}; the teacher has "
            "the document and no cartridge. The rollout proxy is out of order"
        )
    allowed = range(version - async_steps, version + 1)
    if stale := {step for author, step in samples if author != TEACHER and step not in allowed}:
        takes = f"on-policy training takes step {version} only"
        if async_steps:
            takes = (
                f"actor.cartridge.async_steps={async_steps} takes steps {max(0, allowed[0])} to "
                f"{version} only"
            )
        raise OffPolicyError(
            f"rollouts of cartridge step {_sorted(stale)} reached the trainer at step {version}; "
            f"{takes}. The rollout proxy or the sync is out of order"
        )


def oldest_step(step: int, async_steps: int) -> int:
    """The oldest version that may write the batch of a training step.

    Args:
        step: the training step, from 1; it starts at version ``step - 1``.
        async_steps: how many steps earlier a sample's version may be.
    """
    return max(0, step - 1 - async_steps)


def ages_of(authors: Sequence[str], steps: Sequence[int | None], version: int) -> dict[int, int]:
    """How many of the student's samples are how many optimizer steps old.

    Args:
        authors, steps, version: as :func:`check_versions` has let them through.

    Returns:
        Number of samples by age, the youngest first; empty where the teacher wrote all.
    """
    ages = [
        version - step
        for author, step in zip(authors, steps, strict=True)
        if author != TEACHER and step is not None
    ]
    return {age: ages.count(age) for age in sorted(set(ages))}


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


def the_newest_version(made_with: Iterable[str], served: Iterable[Sequence[str]]) -> str:
    """The newest version id that student's samples carry, where rollouts are asked for ahead.

    Args:
        made_with: ids of the student's samples.
        served: by proxy, every id that it has ever sent requests with, in order.

    Returns:
        The newest one that all proxies have served, where there is no sample of the student's.

    Raises:
        OffPolicyError: a sample carries an id that a proxy has never served.
    """
    lists = [list(ids) for ids in served]
    known = [version for version in lists[0] if all(version in ids for ids in lists)]
    found = set(made_with)
    if (strange := found - set(known)) or not known:
        raise OffPolicyError(
            f"the batch has rollouts of the versions {sorted(strange)}, which not every proxy has "
            f"served; they have served {known[-8:]} of late"
        )
    return next(version for version in reversed(known) if version in found or not found)


def _sorted(steps: set[int | None]) -> list[int | None]:
    return sorted(steps, key=str)
