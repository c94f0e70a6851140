"""The grid file of a study: arms x seeds x documents, in YAML, committed before it runs.

    model: smollm2-135m-instruct   # from its wheel; or a folder, or a hub id
    documents: [httptools]         # names in training/study/documents, or demo-record
    seeds: [1, 2]
    steps: 16                      # these are the same for all arms: equal tokens
    batch: 16
    response_tokens: 32
    settings: {num_tokens: 128, lr: 0.02}    # of all arms, unless an arm says otherwise
    arms:
      student: {on_policy_fraction: 1.0}
      teacher: {on_policy_fraction: 0.0}
    evaluate_at: [8, 16]           # steps; the last one is always among them
    expectation: what is expected to come out, in words

What is compared has to be fixed before anybody knows how it comes out: :func:`registered` finds the
commit that holds the file as it is, and a study of a file that is not committed is a draft.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cartridge_distill.evaluation.names import MEASURE_TOKENS, MEASURES, OWN_TEXT
from cartridge_distill.sync.versions import is_run_name
from cartridge_distill.util.errors import ConfigError, nearest
from training.study.settings import CartridgeSettings, OptimSettings, RunSettings

DEMO_MODEL = "smollm2-135m-instruct"
OF_ARMS = (
    *("on_policy_fraction", "loss", "loss_weight", "skip_first_tokens", "max_token_loss", "topk"),
    *("kl_temperature", "teacher_temperature", "lr", "lr_decay_to", "lr_warmup_steps"),
    "async_steps",
)
"""What an arm may set. Whatever else could differ would change the tokens, or the start."""

OF_ALL = ("num_tokens", "num_frozen_tokens", "init", *OF_ARMS)
"""What ``settings`` may set."""

PROMPT_RECIPES = ("started", "open", "mixed")


@dataclass(frozen=True)
class Grid:
    """A grid file's content.

    Attributes:
        model: one that comes in a wheel (``get_demo_model.py --model``), a folder or a hub id.
        documents: names, see ``documents``.
        seeds: of data, sampling and order, one run each.
        arms: name -> what it sets, of :data:`OF_ARMS`.
        steps, batch, response_tokens, prompt_tokens, temperature: of all runs.
        settings: of all arms, of :data:`OF_ALL`.
        prompt_recipe: of the training prompts, see ``prepare --help``.
        general_fraction: of general rows.
        evaluate_at: the steps at which a run is evaluated; the last one is among them.
        measures, measure_tokens: as ``eval --measures``; own text is always measured.
        limit_questions: the first so many questions alone; None for all.
        save_every: steps between saves of a run.
        unseen: whether the documents may be such as were kept for the end.
        gate_points: by how much the full document must beat no document, in points of
            ``generated_match``.
        expectation: what is expected, in words.

    Raises:
        ConfigError: every value that makes no sense.
    """

    documents: tuple[str, ...]
    seeds: tuple[int, ...]
    arms: Mapping[str, Mapping[str, Any]]
    model: str = DEMO_MODEL
    steps: int = 16
    batch: int = 16
    response_tokens: int = 32
    prompt_tokens: int = 256
    temperature: float = 0.7
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt_recipe: str = "started"
    general_fraction: float = 0.0
    evaluate_at: tuple[int, ...] = ()
    measures: tuple[str, ...] = MEASURES
    measure_tokens: int = 64
    limit_questions: int | None = None
    save_every: int = 4
    unseen: bool = False
    gate_points: float = 20.0
    expectation: str = ""

    def __post_init__(self) -> None:
        problems = [*self._problems_of_lists(), *self._problems_of_numbers()]
        if not problems:
            object.__setattr__(self, "evaluate_at", self._steps_to_evaluate())
            for arm in self.arms:
                try:
                    self.run_settings(arm, self.seeds[0])
                except (ConfigError, TypeError) as error:
                    problems.append(f"arm {arm}: {error}")
        if problems:
            raise ConfigError("\n- ".join(["the grid makes no sense:", *problems]))

    def _problems_of_lists(self) -> list[str]:
        problems = []
        for name in ("documents", "seeds", "arms"):
            values = list(getattr(self, name))
            if not values:
                problems.append(f"{name}: name one at least")
            if len(set(values)) < len(values):
                problems.append(f"{name}: {values} names one twice")
        for arm, settings in self.arms.items():
            if not is_run_name(arm):
                problems.append(f"arm {arm!r}: use letters, digits and single - or _")
            problems += [
                f"arm {arm}: {key!r} is not an arm's to set{nearest(key, OF_ARMS)}"
                for key in settings
                if key not in OF_ARMS
            ]
        problems += [
            f"settings: {key!r} is unknown{nearest(key, OF_ALL)}"
            for key in self.settings
            if key not in OF_ALL
        ]
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or OWN_TEXT not in self.measures:
            problems.append(
                f"measures: {list(self.measures)}; give own_text, or own_text and off_context"
            )
        if self.prompt_recipe not in PROMPT_RECIPES:
            problems.append(
                f"prompt_recipe: {self.prompt_recipe!r} is unknown"
                f"{nearest(self.prompt_recipe, PROMPT_RECIPES)}"
            )
        return problems

    def _problems_of_numbers(self) -> list[str]:
        problems = []
        for name in ("steps", "batch", "response_tokens", "prompt_tokens", "save_every"):
            value = getattr(self, name)
            if not _is_count(value):
                problems.append(f"{name}: {value!r}; set a whole number, 1 or more")
        if not _is_count(self.measure_tokens) or self.measure_tokens > MEASURE_TOKENS:
            problems.append(f"measure_tokens: {self.measure_tokens!r}; set 1 to {MEASURE_TOKENS}")
        if self.limit_questions is not None and not _is_count(self.limit_questions):
            problems.append(
                f"limit_questions: {self.limit_questions!r}; set 1 or more, or leave it"
            )
        if not all(isinstance(seed, int) and seed >= 0 for seed in self.seeds):
            problems.append(f"seeds: {list(self.seeds)}; set whole numbers, 0 or more")
        if not all(_is_count(step) for step in self.evaluate_at):
            problems.append(f"evaluate_at: {list(self.evaluate_at)}; set steps, 1 or more")
        elif _is_count(self.steps) and any(step > self.steps for step in self.evaluate_at):
            problems.append(f"evaluate_at: {list(self.evaluate_at)}; a run has {self.steps} steps")
        return problems

    def _steps_to_evaluate(self) -> tuple[int, ...]:
        return tuple(sorted({*self.evaluate_at, self.steps}))

    def run_settings(self, arm: str, seed: int) -> RunSettings:
        """One run's settings.

        Raises:
            ConfigError: they make no sense together.
        """
        chosen = {**self.settings, **self.arms[arm]}
        optim = {k: chosen.pop(k) for k in ("lr_warmup_steps",) if k in chosen}
        return RunSettings(
            CartridgeSettings(**chosen),
            OptimSettings(**optim),
            seed=seed,
            steps=self.steps,
            batch=self.batch,
            response_tokens=self.response_tokens,
            temperature=self.temperature,
        )

    @property
    def runs(self) -> list[tuple[str, str, int]]:
        """(document, arm, seed), a seed of all arms before the next seed."""
        return [(d, arm, seed) for d in self.documents for seed in self.seeds for arm in self.arms]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def read_grid(path: Path) -> Grid:
    """Reads a grid file.

    Raises:
        ConfigError: it cannot be read, names something unknown, or makes no sense.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"grid {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"grid {path}: write one setting a line, such as `steps: 16`")
    known = {about.name for about in fields(Grid)}
    if strange := [str(key) for key in content if key not in known]:
        raise ConfigError(f"grid {path}: {strange[0]!r} is unknown{nearest(strange[0], known)}")
    if missing := [name for name in ("documents", "seeds", "arms") if name not in content]:
        raise ConfigError(f"grid {path}: {', '.join(missing)} must be there")
    for name in ("arms", "settings"):
        if name in content:
            content[name] = _mapping(content[name], f"grid {path}: {name}")
    content["arms"] = {
        str(arm): _mapping(chosen or {}, f"grid {path}: arm {arm}")
        for arm, chosen in content["arms"].items()
    }
    for name in ("documents", "seeds", "evaluate_at", "measures"):
        if name in content:
            if not isinstance(content[name], Sequence) or isinstance(content[name], str):
                raise ConfigError(f"grid {path}: {name}: {content[name]!r} is no list")
            content[name] = tuple(content[name])
    try:
        return Grid(**content)
    except ConfigError as error:
        raise ConfigError(f"grid {path}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"grid {path}: a value is of another kind: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {value!r} is no mapping of names to values")
    return {str(key): kept for key, kept in value.items()}


@dataclass(frozen=True)
class Registration:
    """Where a grid was fixed.

    Attributes:
        sha256: of the file.
        commit: that holds it as it is; None for a draft.
        date: of that commit, as ISO 8601.
    """

    sha256: str
    commit: str | None = None
    date: str | None = None

    @property
    def words(self) -> str:
        """For the table."""
        if self.commit is None:
            return "a draft: its grid was not registered"
        return f"registered as {self.commit[:12]}, {self.date}"


def registered(path: Path, draft: bool = False) -> Registration:
    """The commit in which the grid file stands as it is now.

    Args:
        draft: do without one.

    Raises:
        ConfigError: git has the file not, or not so.
    """
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if draft:
        return Registration(sha256)
    where, name = path.absolute().parent, path.name

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(where), *arguments, "--", name]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=30)
        except FileNotFoundError as error:
            raise ConfigError(
                f"grid {path}: git is not here to tell when it was written"
            ) from error

    if git("ls-files", "--error-unmatch").returncode != 0:
        raise ConfigError(
            f"grid {path} is not committed: arms are registered before they run. Fix: git add and "
            "commit it, or say --draft, and the table says so, too"
        )
    if git("diff", "--quiet", "HEAD").returncode != 0:
        raise ConfigError(
            f"grid {path} was changed since it was committed; fix: commit it, or say --draft"
        )
    commit, date = git("log", "-1", "--format=%H %cI").stdout.split()
    return Registration(sha256, commit, date)
