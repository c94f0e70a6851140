"""How long a run is: rows, batch, epochs, steps and saving, which mean something only together.

A step takes one batch of prompts, an epoch has as many steps as the rows have whole batches, and
the run ends at whichever comes first, its epochs or its steps. The cartridge is saved every so many
steps and at the last one. Each of these settings is harmless alone; together they can ask for steps
that never come, and then the last one is not saved either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cartridge_distill.util.errors import ConfigError, with_fix
from cartridge_distill.util.lfs import about, pointer_in
from cartridge_distill.util.parquet import read_rows
from verl_patches.config.data_files import path_of

if TYPE_CHECKING:
    from omegaconf import DictConfig

BATCH, EPOCHS = "data.train_batch_size", "trainer.total_epochs"
STEPS, SAVE = "trainer.total_training_steps", "trainer.save_freq"


@dataclass(frozen=True)
class RunLength:
    """The settings, as they are configured: what is no number is a problem, too.

    Attributes:
        rows: prompts to train on; None where the data are not there yet.
        val_rows: prompts kept aside; None as above.
        batch: prompts a step.
        epochs: passes over the rows at most.
        steps: optimizer steps asked for; None for all that the epochs have.
        save_every: steps between saved cartridges; -1 saves none.
    """

    rows: int | None
    val_rows: int | None
    batch: Any
    epochs: Any
    steps: Any
    save_every: Any

    @property
    def last_step(self) -> int | None:
        """The step that the run is to end with; None where the rows decide and are not known."""
        if self.steps is not None:
            return int(self.steps)
        return None if self.rows is None else self.rows // int(self.batch) * int(self.epochs)

    @property
    def saves(self) -> bool:
        """Whether the last step is saved."""
        return int(self.save_every) > 0

    def problems(self) -> list[str]:
        """What keeps the run from ending with the step that was asked for, each with its fix."""
        wrong = list(self._wrong_numbers())
        return wrong or list(self._together())

    def _wrong_numbers(self) -> Iterator[str]:
        for key, value, what in (
            (BATCH, self.batch, "prompts a step"),
            (EPOCHS, self.epochs, "passes over the prompts"),
            (STEPS, self.steps, "optimizer steps"),
        ):
            if not _is_whole(value, 1) and not (value is None and key == STEPS):
                or_null = ", or null for all of the epochs" if key == STEPS else ""
                yield f"{key}={value!r}: {what}; fix: set a whole number, 1 or more{or_null}"
        if not (_is_whole(self.save_every, 1) or self.save_every == -1):
            yield (
                f"{SAVE}={self.save_every!r}: steps between saved cartridges, the last step always "
                "among them; fix: set a whole number, 1 or more, or -1 to save none"
            )

    def _together(self) -> Iterator[str]:
        if self.val_rows == 0:
            yield "data.val_files has no rows; fix: prepare one prompt for it, at least"
        if self.rows is None:
            return
        an_epoch = self.rows // self.batch
        if an_epoch == 0:
            yield (
                f"data.train_files has {self.rows} rows, {BATCH}={self.batch}: that is not one "
                f"step; fix: set {BATCH}={max(1, self.rows)} or less, or prepare {self.batch} rows "
                "or more"
            )
        elif self.steps is not None and self.steps > an_epoch * self.epochs:
            yield (
                f"{STEPS}={self.steps}, but the run would end after {an_epoch * self.epochs}: "
                f"{self.rows} rows of {BATCH}={self.batch} are {an_epoch} steps an epoch, and "
                f"{EPOCHS}={self.epochs}. The last step would not be saved; fix: set "
                f"{EPOCHS}={-(-self.steps // an_epoch)}, or {STEPS}={an_epoch * self.epochs}, or "
                f"prepare {self.steps * self.batch} rows"
            )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def run_length(config: DictConfig) -> RunLength:
    """How long the run is to be.

    Raises:
        ConfigError: a file of the data cannot be read.
    """
    return RunLength(
        rows=_rows(config, "train"),
        val_rows=_rows(config, "val"),
        batch=_get(config, BATCH),
        epochs=_get(config, EPOCHS),
        steps=_get(config, STEPS),
        save_every=_get(config, SAVE),
    )


def _rows(config: DictConfig, split: str) -> int | None:
    """Rows of a split, as veRL will read them; None where a file is not there, or no parquet."""
    total = 0
    for name in data_files(config, split):
        file = path_of(name)
        if file.suffix != ".parquet" or not file.is_file():
            return None
        try:
            # All of it: veRL's reader does not compare the checksums.
            total += len(read_rows(file))
        except (ConfigError, OSError) as error:
            reason = about(file) if pointer_in(file) else str(error)
            raise ConfigError(
                with_fix(f"data.{split}_files: {reason}", "let it be read")
            ) from error
    most = _get(config, f"data.{split}_max_samples")
    return min(total, most) if isinstance(most, int) and most > 0 else total


def data_files(config: DictConfig, split: str) -> list[str]:
    """A split's files, as they are named."""
    named = _get(config, f"data.{split}_files")
    return [named] if isinstance(named, str) else [str(name) for name in named or ()]


def _get(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, default=None)
