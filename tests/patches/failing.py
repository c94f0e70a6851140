"""A launcher whose training is a line of shell."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import CartridgeMeta, save_cartridge
from cartridge_distill.util.tracker import TRACKER
from tests.tiny import random_cartridge, tiny_model
from verl_patches import launch
from verl_patches.launching.settings import Run


def failing(run: Run, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In veRL's place, a shell."""
    monkeypatch.setattr(launch, "command", lambda _: ["bash", "-c", script])


def saving(monkeypatch: pytest.MonkeyPatch, out: Path, step: int, without: str = "") -> None:
    """In veRL's place, a shell that saves the cartridge of a step, whole or not, and ends well."""
    made = out.parent / "made"
    save_cartridge(random_cartridge(tiny_model()), made, CartridgeMeta("someone/tiny", step=step))
    if without:
        (made / without).unlink()
    saved = f"{shlex.quote(str(out))}/checkpoints"
    folder = f"{saved}/global_step_{step}/actor"
    script = f"mkdir -p {folder}; cp -r {shlex.quote(str(made))} {folder}/cartridge; "
    script += f"echo {step} > {saved}/{TRACKER}; echo '[cartridge] step {step}/{step}  loss 1'"
    failing(Run(), monkeypatch, script if step else "exit 0")
