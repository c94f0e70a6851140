"""What an error that came through Ray says, without the stacks that Ray wraps around it."""

from __future__ import annotations


def kind_and_message(error: BaseException) -> str:
    """Kind and message, for a line of a log or another error's message.

    Ray raises an actor's error as one of its own (``RayTaskError``), whose text is the stack of the
    actor's process; the error itself is its ``cause``.
    """
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}"
