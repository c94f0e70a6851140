"""What an error that came through Ray says, without the stacks that Ray wraps around it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.exceptions import RayActorError


def kind_and_message(error: BaseException) -> str:
    """Kind and message, for a line of a log or another error's message.

    Ray raises an actor's error as one of its own (``RayTaskError``), whose text is the stack of the
    actor's process; the error itself is its ``cause``.
    """
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"


def why(error: RayActorError) -> str | None:
    """Ray's reason for an actor's death, in one line.

    None when the actor failed by itself, in its ``__init__``: the error that it failed with says
    more, and to start it again would not help.
    """
    text = " ".join(str(error).split())
    found = re.search(r"The actor is dead because (.*?)(?: Some common| There are some|$)", text)
    return f"{found[1]} Killed, or out of memory?" if found else None
