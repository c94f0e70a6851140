"""What describes a distillation: :class:`Distillation`, and the training run that follows from it.

The defaults are those of the demo: a small model on a CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.beginnings import ATTENDED, BEGINNINGS
from cartridge_distill.cartridge.run_folder import CARTRIDGE_FOLDER, RUN_FILES, resolve_cartridge
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.pasting import hydra_value
from verl_patches.launching.command import model_path
from verl_patches.launching.settings import Run

__all__ = ["CARTRIDGE_FOLDER", "RUN_FILES", "Distillation", "Prepared", "as_run"]

# A bfloat16 server and trainer round differently; the engine's check of a whole step is for that.
# In float32 only the order of their sums differs: by 1e-4 on a CPU, by 3e-5 on an H200 (outside
# veRL: `make gpu-check`, stage differences).
_CUDA_FLOAT32_BOUND = 1e-2
# Counted by Ray, not used: TransferQueue's actors take a CPU each, and wait for ever without.
_CUDA_RAY_CPUS = 16
_MOST_SAVES = 12
_MOST_STEPS_BETWEEN_SAVES = 25

MAY_CHANGE = ("out", "server", "engine", "engine_python", "threads", "log_to", "wait")
"""Settings that a run may go on with others of; nothing that was made depends on them."""


INIT = "actor_rollout_ref.actor.cartridge.init"


@dataclass(frozen=True)
class Prepared:
    """What the training needs to know of the data.

    Attributes:
        questions: how many came with the documents.
        init_document: id of the one that the cartridge begins as a part of; None where there is
            but one, or where an override says something else.
        document_tokens: of the longest document.
        documents: how many the teacher reads.
    """

    questions: int = 0
    init_document: str | None = None
    document_tokens: int = 0
    documents: int = 1


@dataclass(frozen=True)
class Distillation:
    """One run from documents to a report.

    Attributes:
        documents: what ``prepare --data`` takes: a file, a folder, or records.
        model: folder or hub id of the base model.
        out: the run's folder.
        name: of the recipe in a report of several, and what begins the version ids.
        tokens: of the cartridge.
        init: the part of a document that it begins as.
        steps: of the optimizer.
        batch: rollouts a step.
        response_tokens, prompt_tokens: of a rollout and of its prompt, at most.
        lr: of the first step; it falls to a tenth along a cosine.
        prompt_recipe: where the prompts come from: started, open or mixed.
        rebuild: folder of the run whose cartridge is gone on with, for its documents have changed.
        test_every: steps between validations on the documents' questions; None for four in the run
            where there are questions, 0 for none.
        save_every: steps between checkpoints; None for a dozen in the run.
        choose: which cartridge becomes the run's: that of the "best" validation, or the "last".
        server: that writes the rollouts; None starts one for the run.
        wait: seconds to wait for a server that was given.
        log_to: further loggers, as ``train --log-to``.
        overrides: of veRL's settings.
    """

    documents: str
    model: str
    out: Path
    name: str = "mine"
    tokens: int = 128
    init: str = ATTENDED
    steps: int = 36
    batch: int = 48
    response_tokens: int = 6
    prompt_tokens: int = 192
    lr: float = 0.02
    prompt_recipe: str = "started"
    questions: str | None = None
    rebuild: str | None = None
    test_every: int | None = None
    save_every: int | None = None
    choose: str = "best"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    server: str | None = None
    engine: str = "embedded"
    engine_python: str | None = None
    wait: float = 60.0
    log_to: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.engine == "vllm") != (self.engine_python is not None):
            raise ConfigError(
                "--engine vllm and --engine-python PATH go together; fix: give both "
                "(docs/vllm.md says how to make vLLM's environment), or neither"
            )
        if self.server is not None and self.engine != "embedded":
            raise ConfigError(
                f"--engine {self.engine} starts a server, and --server names one that is there; "
                "fix: give one of them"
            )
        if self.rebuild is not None and self.override(INIT) is not None:
            raise ConfigError(
                f"--rebuild {self.rebuild} begins with that run's cartridge, and {INIT}="
                f"{self.override(INIT)} with another; fix: leave one of them out"
            )
        for name, least in (("test_every", 0), ("save_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value}; fix: give {least} or more")
        as_run(self)  # it checks the numbers

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def versions(self) -> Path:
        """Where the run's own server finds the versions of the cartridge."""
        return self.out / "cartridges"

    @property
    def rows(self) -> int:
        """Training prompts that the steps need."""
        return self.steps * self.batch

    def override(self, key: str) -> str | None:
        """Its value among the overrides, the last where there are several."""
        found = [item.partition("=")[2] for item in self.overrides if item.startswith(f"{key}=")]
        return found[-1] if found else None

    @property
    def init_document(self) -> str | None:
        return self.override(f"{INIT}_document")

    @property
    def begins_elsewhere(self) -> bool:
        """Whether the cartridge begins as something else than a part of a document."""
        return self.rebuild is not None or self.override(INIT) not in (None, *BEGINNINGS)

    @property
    def rebuilt_cartridge(self) -> str:
        """That a rebuild begins with.

        Raises:
            CartridgeFormatError: the run has none.
        """
        assert self.rebuild is not None
        return resolve_cartridge(str(Path(self.rebuild).expanduser().absolute()))

    def validations(self, has_questions: bool) -> int | None:
        """Steps between validations; None for none."""
        if self.test_every == 0 or not has_questions:
            return None
        return self.test_every or max(1, self.steps // 4)

    def saves(self, has_questions: bool) -> int:
        """Steps between checkpoints. Every validated step is saved, so that it can be chosen."""
        if self.save_every is not None:
            return self.save_every
        most = min(_MOST_STEPS_BETWEEN_SAVES, max(1, self.steps // _MOST_SAVES))
        every = self.validations(has_questions)
        if every is None:
            return most
        return next(number for number in range(min(most, every), 0, -1) if every % number == 0)

    def fixed(self) -> dict[str, Any]:
        """What must be the same when the run goes on, in JSON's types."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in MAY_CHANGE}
        return found | {"model": model_path(self.model), "overrides": list(self.overrides)}


def as_run(
    settings: Distillation,
    server: str = "http://127.0.0.1",
    data: Prepared = Prepared(),  # noqa: B008  (it is frozen)
) -> Run:
    """The training run that veRL is asked for.

    Args:
        server: the URL of who writes the rollouts.
        data: what was found in the run's data.
    """
    has_questions = data.questions > 0
    first = [] if data.init_document is None or settings.init_document else [data.init_document]
    actor = "actor_rollout_ref.actor"
    return Run(
        model=settings.model,
        data=settings.data,
        server=(server,),
        out=settings.out,
        name=settings.name,
        sync_dir=None if settings.server else settings.versions,
        tokens=settings.tokens,
        lr=settings.lr,
        batch=settings.batch,
        steps=settings.steps,
        prompt_tokens=settings.prompt_tokens,
        response_tokens=settings.response_tokens,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        save_every=settings.saves(has_questions),
        test_every=settings.validations(has_questions),
        log_to=settings.log_to,
        wait=settings.wait,
        overrides=(
            # At a constant rate the held-out KL jumps between steps, and the last one decides.
            f"{actor}.optim.lr_scheduler_type=cosine",
            f"{actor}.optim.min_lr_ratio=0.1",
            *needed_on_a_gpu(settings),
            *(f"{INIT}_document={hydra_value(name)}" for name in first),
            *([] if settings.rebuild else [f"{INIT}={settings.init}"]),
            *_rebuilding(settings),
            *settings.overrides,
        ),
    )


def _rebuilding(settings: Distillation) -> list[str]:
    """Settings that --rebuild needs."""
    if settings.rebuild is None:
        return []
    where = hydra_value(settings.rebuilt_cartridge)
    return [f"{INIT}=checkpoint", f"actor_rollout_ref.actor.cartridge.checkpoint_path={where}"]


def needed_on_a_gpu(settings: Distillation) -> list[str]:
    """Settings that --device cuda needs."""
    if settings.device != "cuda":
        return []
    cpus = max(_CUDA_RAY_CPUS, os.cpu_count() or 1)
    found = [f"ray_kwargs.ray_init.num_cpus={cpus}"]
    if settings.dtype == "float32":
        found.append(f"actor_rollout_ref.actor.cartridge.max_logprob_diff={_CUDA_FLOAT32_BOUND}")
    return found
