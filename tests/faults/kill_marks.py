"""Has a run under ``kill_harness.py`` write down which phase of which step began when.

The harness names this module's agent loop manager in place of the one in ``verl_patches``. It is
imported in the trainer's process before the first step, and puts a line into a file at the head of
five of the trainer's methods. Nothing else differs from any other run.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from tests.faults.kill_phases import MARKS_VARIABLE, PHASES
from verl_patches.rollout.agent_loop import CartridgeAgentLoopManager
from verl_patches.trainer.trainer import CartridgeTrainer

_METHODS = ("prepare_step", "_update_actor", "_save_checkpoint", "on_step_end", "_compute_metrics")


class MarkedAgentLoopManager(CartridgeAgentLoopManager):
    """The same; its module marks the trainer when it is imported."""


def _mark(name: str, phase: str) -> None:
    original = getattr(CartridgeTrainer, name)

    @functools.wraps(original)
    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        line = f"{time.time():.6f} {self.global_steps} {phase}\n"
        os.write(_file, line.encode())  # one call, so that a line is there whole or not at all
        return original(self, *args, **kwargs)

    setattr(CartridgeTrainer, name, marked)


_file = os.open(os.environ[MARKS_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _name, _phase in zip(_METHODS, PHASES, strict=True):
    _mark(_name, _phase)
