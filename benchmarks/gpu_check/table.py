"""The figures of a check as one Markdown table, for docs/performance.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_check.kernels import MEASURED, is_good
from benchmarks.gpu_check.stages import Figures

Row = tuple[str, str]  # what, figure


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. ``why`` is empty where it went well."""

    seconds: float
    why: str = ""

    @property
    def good(self) -> bool:
        return not self.why


def kernels(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for dtype in dict.fromkeys(figure["dtype"] for figure in figures):
        ours = [figure for figure in figures if figure["dtype"] == dtype]
        computed = [figure for figure in ours if "error" not in figure]
        kinds = len({figure["kind"] for figure in ours})
        worst = ", ".join(
            f"{name} {max(figure[name] for figure in computed):.1e}"
            for name in MEASURED
            if computed
        )
        good = sum(map(is_good, ours))
        said = f"{good} of {len(ours)} batches right on {kinds} architectures"
        rows.append((f"{dtype}, against dense", f"{said}; largest relative error: {worst or '-'}"))
    graphs: dict[str, int] = defaultdict(int)
    for figure in figures:
        graphs[figure["kind"]] = max(graphs[figure["kind"]], figure["graphs"])
        if not is_good(figure):
            what = f"**wrong**: {figure['kind']}, {figure['dtype']}, {figure['tokens']} tokens"
            rows.append((what, figure.get("error") or str({k: figure.get(k) for k in MEASURED})))
    unfused = sum(figure["unfused"] for figure in figures)
    most = max(graphs.values(), default=0)
    rows.append(("compiled graphs of an architecture", f"at most {most}; unfused: {unfused}"))
    return rows


def student(figures: Figures) -> list[Row]:
    """Student and teacher: tokens/s of each way, and its time against the first's."""
    rows: list[Row] = []
    first: dict[str, float] = {}
    for figure in figures:
        if "agree" in figure:
            ways = f"{figure['table']}, {len(figure['agree'])} ways agree in float32"
            said = f"log-probs to {figure['logprobs']:.0e}, gradients to {figure['gradients']:.0e}"
            rows.append((ways, said))
            continue
        seconds = figure["seconds"]
        ratio = seconds / first.setdefault(figure["table"], seconds)
        peak = "" if figure["peak_gib"] is None else f", +{figure['peak_gib']:.1f} GiB"
        said = f"{figure['tokens'] / seconds:,.0f} tokens/s ({ratio:.2f}x the time{peak})"
        rows.append((f"{figure['table']}: {figure['name']}", said))
    return rows


def memory(figures: Figures) -> list[Row]:
    def gib(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} GiB"

    return [
        (
            f"a training step with {figure['copies']} base{'s' * (figure['copies'] - 1)}",
            f"weights {gib(figure['weights_gib'])}, peak {gib(figure['peak_gib'])} "
            f"(predicted {gib(figure['predicted_gib'])}), "
            f"{sum(figure['seconds'].values()):.2f} s",
        )
        for figure in figures
    ]


def engine(figures: Figures) -> list[Row]:
    return [
        (
            f"embedded server, {figure['rows']} rows of {figure['new_tokens']} tokens",
            f"{figure['rows'] * figure['new_tokens'] / figure['seconds']:,.0f} tokens/s, "
            f"{1e3 * figure['seconds'] / figure['forwards']:.1f} ms a forward",
        )
        for figure in figures
    ]


def sync(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for figure in figures:
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in figure["parts"].items())
        what = f"optimizer step to served version, {figure['megabytes']:.0f} MB"
        rows.append((what, f"{figure['seconds']:.2f} s ({parts})"))
    return rows


def differences(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for figure in figures:
        for kind, what in (("fresh", "the same version"), ("stale", "one step stale")):
            found = figure[kind]
            said = ", ".join(f"{name} {found[name]:.1e}" for name in ("mean", "q90", "q99", "max"))
            rows.append((f"server against trainer, {figure['dtype']}, {what}", said))
    return rows


def run_rows(name: str, run: dict[str, Any]) -> list[Row]:
    """What every run of veRL tells."""
    said = f"{run['steps']} steps, the first {run['first_step_seconds']:.1f} s"
    apart = f"mean {run['logprob_diff_mean']:.1e}, largest {run['logprob_diff_max']:.1e}"
    return [
        (name, f"{said}, later ones {run['step_seconds']:.2f} s"),
        (f"{name}: server against trainer", apart),
        (f"{name}: steps in which a frozen token changed", f"{run['frozen_tokens_changed']:.0f}"),
        (f"{name}: loss", f"{run['loss_first']:.3f} to {run['loss_last']:.3f}"),
    ]


def demo(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for run in figures:
        rows += run_rows("demo", run)
        for condition, kl in run.get("kl", {}).items():
            rows.append((f"demo: held-out KL, {condition}", f"{kl:.3f}"))
    return rows


def loop(figures: Figures) -> list[Row]:
    rows: list[Row] = []
    for run in figures:
        rows += run_rows("3B loop", run)
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in run["seconds"].items())
        rows.append(("3B loop: seconds of a step after the first", parts))
        rows.append(("3B loop: tokens trained on in a step", f"{run['tokens']:.0f}"))
        rows.append(("3B loop: the trainer's peak", f"{run['peak_gib']:.1f} GiB"))
    return rows


ROWS: Mapping[str, Callable[[Figures], list[Row]]] = {
    "kernels": kernels,
    "student": student,
    "engine": engine,
    "sync": sync,
    "differences": differences,
    "memory": memory,
    "demo": demo,
    "loop": loop,
}


def markdown(
    head: list[str], figures: Mapping[str, Figures], outcomes: Mapping[str, Outcome]
) -> str:
    """The lines of ``head``, and the table; a stage that failed stands in it with the reason.

    Args:
        figures: of the stages that have run, in their order; a failed one may have some.
        outcomes: of the same stages.
    """
    lines = [*head, "", "| Stage | What | Figure |", "|---|---|---|"]
    for name, outcome in outcomes.items():
        rows = list(ROWS[name](figures[name])) if figures[name] else []
        if not outcome.good:
            rows.append(("**failed**", f"{outcome.why}, after {outcome.seconds:.0f} s"))
        for number, row in enumerate(rows):
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            label = f"{name} ({outcome.seconds:.0f} s)" if number == 0 else ""
            lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"
