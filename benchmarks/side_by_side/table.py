"""What the benchmark prints: who agrees with whom, seconds with their range, ratios, the floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.side_by_side.plain import Outcome
from benchmarks.side_by_side.work import STAGES, Work
from cartridge_distill.util.errors import ConfigError

TOLERANCE = 1e-4
"""Of log-probs and of the loss, nats."""
NORM_TOLERANCE = 1e-3
"""Of the gradient's norm, relative."""
TITLES = {
    "rollout": "rollout",
    "teacher": "teacher",
    "student": "student forward",
    "update": "loss, backward, step",
}

Steps = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """A way's seconds.

    Attributes:
        name: as the table says it.
        steps: by stage, one entry a timed step; a stage may be missing.
        partial: the way is no whole step, so it has no sum.
    """

    name: str
    steps: Steps
    partial: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> list[float]:
        """Of each step, all stages."""
        return [sum(step.values()) for step in self.steps]


def apart(outcome: Outcome, work: Work) -> dict[str, tuple[float, float]]:
    """By what: how far a way is from ours on the same tokens, and how far it may be."""
    found: dict[str, tuple[float, float]] = {}
    if outcome.logprobs is not None:
        theirs = torch.tensor(outcome.logprobs)
        most = (theirs - work.logprobs[: len(theirs)]).abs().max().item()
        found["log-probs of the student"] = (most, TOLERANCE)
    if outcome.token_losses is not None:
        nats = torch.tensor(outcome.token_losses)
        ours = work.token_losses[: len(nats)]
        found["KL loss"] = (abs((nats.mean() - ours.mean()).item()), TOLERANCE)
    if outcome.grad_norm is not None:
        relative = abs(outcome.grad_norm / work.grad_norm - 1)
        found["gradient's norm, relative"] = (relative, NORM_TOLERANCE)
    if outcome.first is not None:
        ours = work.logprobs[:: work.answer_tokens]
        most = (torch.tensor(outcome.first) - ours).abs().max().item()
        found["first token's log-probs in the rollout"] = (most, TOLERANCE)
    if outcome.own is not None:
        found["rollout against the way's own forward"] = (outcome.own, TOLERANCE)
    return found


def of_padding(outcome: Outcome, work: Work) -> str:
    """For a way that padding on the left puts wrong: the samples without padding are right.

    Returns:
        How far both kinds of samples are from ours, in words.

    Raises:
        ConfigError: a sample without padding, or the rollout itself, is wrong, so it is not the
            padding.
    """
    assert outcome.logprobs is not None
    prompts = work.batches[0].prompts
    longest = max(map(len, prompts))
    is_longest = torch.tensor([len(prompt) == longest for prompt in prompts])
    unpadded = is_longest.repeat_interleave(work.answer_tokens)
    off = (torch.tensor(outcome.logprobs) - work.logprobs).abs()
    most = off[unpadded].max().item()
    first, _ = apart(outcome, work)["first token's log-probs in the rollout"]
    if not max(most, first) <= TOLERANCE:
        raise ConfigError(
            f"its log-probs are {most:.1e} off where nothing is padded, and {first:.1e} in its "
            f"rollouts, over {TOLERANCE:g}: it computes something else; nothing of it is reported"
        )
    others = off[~unpadded]
    padded = f"{others.max().item():.2g}" if len(others) else "none"
    return (
        f"its log-probs are off by {padded} nats at most (mean {off.mean().item():.2g}) where "
        f"prompts are padded, by {most:.1e} in the {int(is_longest.sum())} samples that are not"
    )


def differences(outcome: Outcome, work: Work) -> str:
    """All of :func:`apart` in words."""
    found = apart(outcome, work)
    return "; ".join(f"{what} {most:.1e}" for what, (most, _) in found.items())


def agreement(name: str, outcome: Outcome, work: Work) -> str:
    """The differences in words.

    Raises:
        ConfigError: the way computes something else; a time of that would mean nothing.
    """
    said = differences(outcome, work)
    for what, (most, bound) in apart(outcome, work).items():
        if not most <= bound:
            raise ConfigError(
                f"{name} computes something else: {what} differ by {most:.1e}, over {bound:g} "
                f"({said}); nothing of it is reported"
            )
    return said


def _cell(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.2f}"
    return f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"


def markdown(rows: Sequence[Row]) -> str:
    """Medians with their range; the first row is ours."""
    ours = rows[0]
    head = ["one step, CPU-seconds", *TITLES.values(), "all", "against ours"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = []
        for stage in STAGES:
            values = [step[stage] for step in row.steps if stage in step]
            cells.append(_cell(values) if values else "-")
        if row.partial:
            (stage,) = {stage for step in row.steps for stage in step}
            base = statistics.median([step[stage] for step in ours.steps])
            ratio = statistics.median([step[stage] for step in row.steps]) / base
            cells += ["-", f"{ratio:.2f} (of the {TITLES[stage]})"]
        else:
            cells.append(_cell(row.whole))
            ratios = [a / b for a, b in zip(row.whole, ours.whole, strict=True)]
            cells.append("1" if row is ours else _cell(ratios))
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines)


def growth(cases: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """The whole step of each way and case, with the ratio to ours."""
    names = list(dict.fromkeys(row.name for _, rows in cases for row in rows if not row.partial))
    lines = ["| one step, CPU-seconds | " + " | ".join(names) + " |"]
    lines.append("|---" + "|--:" * len(names) + "|")
    for case, rows in cases:
        base = statistics.median(rows[0].whole)
        found = {row.name: statistics.median(row.whole) for row in rows if not row.partial}
        cells = [
            f"{found[name]:.1f} ({found[name] / base:.1f})" if name in found else "-"
            for name in names
        ]
        lines.append("| " + " | ".join([case, *cells]) + " |")
    return "\n".join(lines)


def with_reading(kept: Row, name: str, teacher: Steps) -> Row:
    """The loop that reads the document again: its own teacher, and the other loop's rest."""
    steps = [{**a, **b} for a, b in zip(kept.steps, teacher, strict=True)]
    return Row(name, steps)


def floor_table(
    ours: Row, alone: Mapping[str, float], shared: Mapping[str, float], rate: float
) -> str:
    """Our seconds against the products' at the machine's rate.

    Args:
        alone: FLOPs by stage, each sample by itself.
        shared: the same with each distinct beginning once.
        rate: FLOP/s.
    """
    head = ["", *TITLES.values(), "all"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]

    def line(name: str, values: Sequence[float], form: str) -> None:
        lines.append("| " + " | ".join([name, *(format(value, form) for value in values)]) + " |")

    seconds = [statistics.median([step.get(stage, 0.0) for step in ours.steps]) for stage in STAGES]
    seconds.append(statistics.median(ours.whole))
    line("ours, CPU-seconds", seconds, ".2f")
    for name, work in (("each sample by itself", alone), ("each beginning once", shared)):
        least = [work[stage] / rate for stage in STAGES]
        least.append(sum(least))
        line(f"products, {name}: GFLOP", [value * rate / 1e9 for value in least], ",.0f")
        line(f"... at {rate / 1e9:.0f} GFLOPS, seconds", least, ".2f")
        line("... of ours", [a / b for a, b in zip(least, seconds, strict=True)], ".0%")
    return "\n".join(lines)


def losses_table(ours: Sequence[float], others: Mapping[str, Sequence[float]]) -> str:
    """The loss of each timed step: all ways train on the same tokens."""
    lines = [f"| loss, nats a token | {' | '.join(f'step {n + 2}' for n in range(len(ours)))} |"]
    lines.append("|---" + "|--:" * len(ours) + "|")
    for name, losses in {"ours": ours, **others}.items():
        lines.append(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
    return "\n".join(lines)
