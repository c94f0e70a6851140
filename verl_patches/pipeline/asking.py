"""Asks a function that needs the libraries, in a process that has them.

``distill`` looks at the model and at the data before it trains, and both need transformers: three
seconds of imports in the command's own process. Where the stages are forked from a process that has
imported them, a question is a process of its own, too; it takes no imports, and goes on beside
others. Elsewhere it is an ordinary call.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from cartridge_distill.util.processes import ChildFailed, Supervisor, say, tail

Answer = TypeVar("Answer")
_QUESTION, _ANSWER = "question", "answer"


class Question(Generic[Answer]):
    """A call that may be under way.

    Args:
        function: of a module; called with ``arguments``, which are pickled, as its answer is.
        env: of the process, over this one's.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        env: dict[str, str],
        function: Callable[..., Answer],
        *arguments: Any,
    ) -> None:
        self._call = lambda: function(*arguments)
        self._child = None
        if not supervisor.forks:
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="cartridge-distill-")
        self._folder = Path(self._scratch.name)
        (self._folder / _QUESTION).write_bytes(pickle.dumps((function, arguments)))
        command = [sys.executable, "-m", "verl_patches.pipeline.asking", str(self._folder)]
        self._log = self._folder / "log"
        self._child = supervisor.start(command, self._log, env)

    def answer(self) -> Answer:
        """Waits for it; once.

        Raises:
            Exception: whatever the function raised.
            ChildFailed: its process ended without an answer.
        """
        if self._child is None:
            return self._call()
        with self._scratch:
            self._child.wait()
            said = self._log.read_text(errors="replace").rstrip()
            file = self._folder / _ANSWER
            if not file.is_file():
                raise ChildFailed(f"a process ended without an answer\n{tail(self._log)}")
            if said:
                say(said)
            answer, error = pickle.loads(file.read_bytes())
        if error is not None:
            raise error
        found: Answer = answer
        return found


def main(folder: Path) -> None:
    """Answers the question that lies in the folder."""
    function, arguments = pickle.loads((folder / _QUESTION).read_bytes())
    answer, error = None, None
    try:
        answer = function(*arguments)
    except Exception as raised:  # it goes to whoever asked
        error = raised
    part = folder / f"{_ANSWER}.part"
    part.write_bytes(pickle.dumps((answer, error)))
    part.rename(folder / _ANSWER)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
