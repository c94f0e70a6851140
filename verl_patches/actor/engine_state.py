"""From the engine to a checkpoint and back: cartridge, optimizer, schedule, random numbers, step.

``global_step_7/actor/`` holds the cartridge in its own directory, as before, and beside it the
training state. Both appear together: the directory is filled under another name and renamed. The
base model is never written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, read_cartridge, save_cartridge
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.records import Document
from cartridge_distill.distill.kept_prompts import settle, settle_again
from cartridge_distill.distill.training_state import (
    TrainingState,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
)
from cartridge_distill.model.kept_tokens import Row
from cartridge_distill.util.errors import CartridgeFormatError
from cartridge_distill.util.files import replace_directory
from cartridge_distill.util.same_settings import check_same_settings

CARTRIDGE_FOLDER = "cartridge"

# What the saved numbers were made with. Not here, and free to change when a run goes on: how many
# ranks, steps and servers, paths, the sync, how long a teacher's document is kept.
_CARTRIDGE_SETTINGS = (
    *("num_tokens", "num_frozen_tokens", "lr", "init", "loss", "topk", "kl_temperature", "seed"),
)
# Named where they are set alone: a checkpoint from before there were any goes on without them.
_OPTIONAL_SETTINGS = (*("loss_weight", "skip_first_tokens", "max_token_loss", "lr_decay_to"),)
_OPTIMIZER_SETTINGS = (
    *("optimizer", "betas", "weight_decay", "clip_grad", "override_optimizer_config"),
    *("lr_scheduler_type", "lr_warmup_steps", "lr_warmup_steps_ratio", "min_lr_ratio"),
    *("num_cycles", "zero_indexed_step"),
)


def documents_sha256(documents: DocumentStore) -> str:
    """One hash of all the documents' ids and texts, whatever file they came from."""
    digest = hashlib.sha256()
    for document_id in sorted(documents.ids):
        for part in (document_id, documents.text(document_id)):
            encoded = part.encode()
            digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()


def settings_of(engine: Any) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    return {
        **_settings(engine),
        "base_model_weights": engine.base_sha256,
        "documents": documents_sha256(engine.teacher.documents),
    }


def _settings(engine: Any) -> dict[str, Any]:
    cartridge = engine.settings
    return {
        **{f"cartridge.{name}": getattr(cartridge, name) for name in _CARTRIDGE_SETTINGS},
        **{
            f"cartridge.{name}": v for name in _OPTIONAL_SETTINGS if (v := getattr(cartridge, name))
        },
        **{f"optim.{name}": getattr(engine.optimizer_config, name) for name in _OPTIMIZER_SETTINGS},
        "model_dtype": str(engine.engine_config.model_dtype),
    }


def save(engine: Any, directory: Path) -> None:
    """Writes ``directory``, whole or not at all. One rank calls it."""
    state = TrainingState(
        step=engine.step,
        version=engine.version,
        schedule=engine.lr_scheduler.last_epoch,
        optimizer=_optimizer_tensors(engine),
        rng=rng_state(engine.cartridge.trainable_keys[0].device),
        settings=settings_of(engine),
        prompts=engine.teacher.settled,
    )
    meta = _meta(engine)

    def write(scratch: Path) -> None:
        save_cartridge(engine.cartridge, scratch / CARTRIDGE_FOLDER, meta)
        save_state(state, scratch)

    replace_directory(directory, write, overwrite=True)


def _meta(engine: Any) -> CartridgeMeta:
    """What the saved cartridge says of itself, to whoever finds it elsewhere."""
    documents: DocumentStore = engine.teacher.documents
    title = sha256 = None
    if len(documents.ids) == 1:  # of several it stands for none alone
        title = documents.ids[0]
        sha256 = Document.of(title, documents.text(title)).sha256
    return CartridgeMeta(
        base_model=str(engine.model_config.path),
        base_revision=getattr(engine.module.config, "_commit_hash", None),  # of a hub model
        step=engine.step,
        document_title=title,
        document_sha256=sha256,
        recipe=_settings(engine),
        model_fingerprint=engine.model_fingerprint,
    )


def keep_on(engine: Any) -> None:
    """Before a save: what the teacher keeps of prompts becomes a function of the checkpoint.

    Every rank has prompts of its own, and one of them writes: several keep none over a save.
    """
    if _several_ranks():
        keep_again(engine, [])
    else:
        settle(engine.teacher)


def keep_again(engine: Any, prompts: list[Row]) -> None:
    """After a load: the teacher keeps the checkpoint's prompts and no others."""
    if engine.teacher.prompts is not None:
        engine.teacher.prompts.clear()
    settle_again(engine.teacher, [] if _several_ranks() else prompts)


def _several_ranks() -> bool:
    """A plain loop (training/study) has no process group."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with another run's state.

    Raises:
        OtherSettings: names every setting that differs, with both values.
    """
    check_same_settings(
        saved,
        now,
        f"{where} was saved by a run with other settings, so this run cannot go on from it. Give "
        "the same settings; or another trainer.default_local_dir for a new run, which may start "
        "from that cartridge with actor.cartridge.init=checkpoint",
    )


def restore(engine: Any, directory: Path) -> None:
    """Puts an engine that was just built where the saved one stood. Every rank calls it.

    Raises:
        CartridgeFormatError: files are missing, damaged or do not fit the cartridge.
        ConfigError: they are of a run with other settings.
    """
    state = load_state(directory)
    check_same_run(state.settings, settings_of(engine), directory)
    saved = read_cartridge(directory / CARTRIDGE_FOLDER)
    if saved.meta.step != state.step:
        raise CartridgeFormatError(
            f"{directory}: the cartridge is of step {saved.meta.step}, the training state of step "
            f"{state.step}: they are not of one save; fix: go on from another checkpoint"
        )
    # In place: the optimizer keeps them.
    engine.cartridge.load_state_dict(dict(saved.snapshot.items()))
    _set_optimizer(engine, state, directory)
    _set_schedule(engine.lr_scheduler, state.schedule)
    set_rng_state(state.rng, engine.cartridge.trainable_keys[0].device)
    engine.step, engine.version = state.step, state.version
    keep_again(engine, state.prompts)


def _names(engine: Any) -> list[str]:
    """Names of the trained parameters, in the optimizer's order."""
    name_of = {id(parameter): name for name, parameter in engine.cartridge.named_parameters()}
    return [name_of[id(p)] for group in engine.optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(engine: Any) -> dict[str, dict[str, Tensor]]:
    by_index = engine.optimizer.state_dict()["state"]
    found: dict[str, dict[str, Tensor]] = {}
    for index, name in enumerate(_names(engine)):
        values = {k: v for k, v in by_index.get(index, {}).items() if v is not None}
        for key, value in values.items():
            if type(value) is not Tensor:
                raise CartridgeFormatError(
                    f"the optimizer keeps {key!r} as {type(value).__name__}, and only plain "
                    "tensors are saved; fix: set actor.optim.optimizer to one of torch.optim, e.g. "
                    "AdamW"
                )
        found[name] = values
    return found


def _set_optimizer(engine: Any, state: TrainingState, where: Path) -> None:
    names = _names(engine)
    if state.step and set(state.optimizer) != set(names):
        strange = sorted(set(state.optimizer) ^ set(names))
        raise CartridgeFormatError(
            f"{where}: the optimizer state does not fit at {strange[:4]}; fix: go on with the "
            "settings that it was saved with"
        )
    whole = engine.optimizer.state_dict()
    # Settings stay those of this run's configuration (they are equal, they were compared).
    whole["state"] = {
        index: state.optimizer[name] for index, name in enumerate(names) if name in state.optimizer
    }
    engine.optimizer.load_state_dict(whole)


def _set_schedule(scheduler: Any, position: int) -> None:
    """Moves one of veRL's schedules (all are ``LambdaLR``) to a step.

    The rates are computed anew and not copied, so that a run with another number of steps follows
    its own schedule from here on.
    """
    rates = [
        base * rate(position)
        for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    counters = {"last_epoch": position, "_step_count": position + 1, "_last_lr": rates}
    scheduler.load_state_dict({**scheduler.state_dict(), **counters})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def weights_sha256(checksum: dict[str, tuple[int, int]]) -> str:
    """One short name for a frozen model's weights, from their checksums."""
    return hashlib.sha256(repr(sorted(checksum.items())).encode()).hexdigest()
