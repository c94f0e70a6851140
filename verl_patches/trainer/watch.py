"""Notices that a process of the run died, which nobody else may.

veRL hands prompts to an agent loop and then looks for the results in its queue: when the agent
loop, the queue's storage or the rollout proxy is gone they never come, and it looks for ever; a
rollout waits half an hour for a version whose publisher is gone. Nor could veRL go on without
them: an actor that Ray started again would have lost its state. So a death ends the run, soon, and
says what died and how to go on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from cartridge_distill.util.errors import ProcessDied
from verl_patches.rollout.ray_errors import why

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0


class ActorWatch:
    """Asks actors for a sign of life from a thread, until one of them is found dead.

    An actor that is busy answers late, which is fine: only Ray's word that it died counts.

    Args:
        actors: what a person calls them -> their Ray handles.
        fix: how to go on; ends every message.
        grace_s: seconds from a death until the process ends, unless it ends by itself.
    """

    def __init__(
        self, actors: Mapping[str, Any], fix: str, grace_s: float = _GRACE_SECONDS
    ) -> None:
        self._actors = dict(actors)
        self._fix = fix
        self._grace_s = grace_s
        self._dead: str | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="actor-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Deaths from now on are part of an orderly end."""
        self._stopped.set()

    def check(self) -> None:
        """
        Raises:
            ProcessDied: one of them was found dead.
        """
        if self._dead is not None:
            raise ProcessDied(self._dead)

    def check_now(self, patience_s: float = _GRACE_SECONDS) -> None:
        """The same, after asking all of them once more: for an error that a death may explain.

        Returns when all have answered, which takes milliseconds; Ray's word of a death takes a
        second or two, and longer where every core is busy.

        Args:
            patience_s: the longest wait for one that neither answers nor is known to be dead.

        Raises:
            ProcessDied: one of them is dead.
        """
        self.check()
        asked = {actor.__ray_ready__.remote(): name for name, actor in self._actors.items()}
        until = time.monotonic() + patience_s
        while asked:
            answers, _ = ray.wait(list(asked), timeout=max(0.0, until - time.monotonic()))
            if not answers:
                return
            for sign in answers:
                name = asked.pop(sign)
                if (words := _last_words(sign)) is not None:
                    raise ProcessDied(self._message(name, words))

    def _message(self, name: str, words: str) -> str:
        return f"the {name} died ({words}); {self._fix}"

    def _look(self) -> None:
        signs: dict[str, Any] = {}
        while not self._stopped.wait(_LOOK_SECONDS):
            for name, actor in self._actors.items():
                if name in signs and (words := _last_words(signs[name])) is not None:
                    self._found(self._message(name, words))
                    return
                if name not in signs or _answered(signs[name]):
                    signs[name] = actor.__ray_ready__.remote()

    def _found(self, message: str) -> None:
        self._dead = message
        # The trainer's own thread raises it at its next look. Should it wait for something that
        # the dead process owed it, the run must end all the same.
        if not self._stopped.wait(self._grace_s):
            print(f"[cartridge] {message}", file=sys.stderr, flush=True)
            self._stopped.wait(_LOOK_SECONDS)  # Ray passes the line on from a file
            os._exit(1)


def find_actor(what: str, name: str, namespace: str | None = None) -> Any:
    """A named actor's handle.

    Raises:
        ProcessDied: there is none, or none any more.
    """
    try:
        return ray.get_actor(name, namespace)
    except ValueError as error:
        raise ProcessDied(f"the {what} is gone: {error}") from error


def _answered(sign: Any) -> bool:
    ready, _ = ray.wait([sign], timeout=0)
    return bool(ready)


def _last_words(sign: Any) -> str | None:
    """What Ray says of an actor's death; None while it lives, or is too busy to answer."""
    if not _answered(sign):
        return None
    try:
        ray.get(sign)
    except RayActorError as error:
        return why(error) or str(error)
    return None
