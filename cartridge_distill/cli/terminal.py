"""``chat`` in a terminal: questions typed, answers as they come, one or three side by side.

Ctrl-C stops an answer and nothing else; at the prompt it clears the line. Where the terminal is
narrow or is none, the three answers stand one below the other.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cartridge_distill.cli.conversation import Conversation, Reply
from cartridge_distill.cli.opened import Shown
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.shown_text import printable

COMMANDS = {
    "/help": "this list",
    "/compare": "from now on all three answers, or the cartridge's alone again",
    "/reset": "forget the earlier questions",
    "/quit": "end; so does exit, and Ctrl-D",
}
_LEAVE = {"/quit", "/exit", "exit", "quit"}
_WIDE = 96
_ENDED = {
    "interrupted": "stopped",
    "repeats": "ended here: the model repeats itself",
    "length": "cut off at --max-new-tokens",
}


class Terminal:
    """The loop around a conversation.

    Args:
        conversation: to be asked.
        shown: its views, in order.
        first: the view that answers where not all do.
        compare: whether all of them answer.
    """

    def __init__(
        self, conversation: Conversation, shown: Sequence[Shown], first: str, compare: bool = False
    ) -> None:
        self._conversation, self._shown, self._first = conversation, list(shown), first
        self._compare = compare
        self._console = Console(highlight=False)

    def greet(self, questions: Sequence[str]) -> None:
        """What can be done."""
        print("Ask something; /help lists the commands, Ctrl-C stops an answer.")
        if questions:
            print("For example:", *(f"  {printable(question)}" for question in questions), sep="\n")

    def run(self) -> None:
        """Asks until somebody leaves."""
        try:
            import readline  # noqa: F401  # input() then has a history, and a line can be edited
        except ImportError:
            pass
        while True:
            try:
                typed = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit ends the conversation)")
                continue
            if typed.lower() in _LEAVE:
                return
            if typed.startswith("/"):
                self._command(typed)
            elif typed:
                self._try(typed)

    def ask(self, question: str, start: str | None = None) -> None:
        """Answers a question.

        Raises:
            CartridgeDistillError: it cannot be answered.
            KeyboardInterrupt: at the second Ctrl-C; the first stops the answer.
        """
        with self._interruptible():
            if self._compare and self._console.is_terminal and self._console.width >= _WIDE:
                self._side_by_side(question, start)
            elif self._compare:
                self._below(question, start)
            else:
                self._alone(question, start)

    def _try(self, question: str) -> None:
        """What is wrong with a question is said, and ends nothing."""
        try:
            self.ask(question)
        except CartridgeDistillError as error:
            print(printable(f"error: {error}"), file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")

    def _command(self, typed: str) -> None:
        if typed == "/help":
            width = max(map(len, COMMANDS))
            print(*(f"{name:{width}}  {said}" for name, said in COMMANDS.items()), sep="\n")
        elif typed == "/reset":
            self._conversation.reset()
            print("(the earlier questions are forgotten)")
        elif typed == "/compare":
            self._switch()
        else:
            near = get_close_matches(typed.split()[0], COMMANDS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            print(f"no command {typed.split()[0]}; {meant}")

    def _switch(self) -> None:
        if len(self._shown) == 1:
            print("(there is nothing to compare with: no cartridge and no document is known)")
            return
        self._compare = not self._compare
        names = ", ".join(one.name for one in self._shown)
        print(printable(f"(answers of: {names if self._compare else self._first})"))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Within it, Ctrl-C sets the conversation's event; a second one is as always."""
        wanted = self._conversation.interrupted
        wanted.clear()

        def stop(signum: int, frame: FrameType | None) -> None:
            if wanted.is_set():
                raise KeyboardInterrupt
            wanted.set()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _alone(self, question: str, start: str | None) -> None:
        _write(start or "")
        answer = self._conversation.ask(self._first, question, _write, start)
        print()
        if said := _after(answer):
            print(f"({said})", file=sys.stderr)

    def _below(self, question: str, start: str | None) -> None:
        for one in self._shown:
            print(printable(f"{one.heading()}:"))
            _write(start or "")
            try:
                answer = self._conversation.ask(one.name, question, _write, start)
            except CartridgeDistillError as error:  # of this view; the others may fit
                print(printable(f"(no answer: {error})\n"))
                continue
            print(f"\n({_figures(answer)})\n")
            if self._conversation.interrupted.is_set():
                return

    def _side_by_side(self, question: str, start: str | None) -> None:
        texts = [start or "" for _ in self._shown]
        notes = ["" for _ in self._shown]

        def drawn() -> Table:
            return beside(self._shown, texts, notes)

        with Live(drawn(), console=self._console, vertical_overflow="visible") as live:
            for number, one in enumerate(self._shown):

                def add(text: str, number: int = number) -> None:
                    texts[number] += text
                    live.update(drawn())

                try:
                    answer = self._conversation.ask(one.name, question, add, start)
                    notes[number] = _figures(answer)
                except CartridgeDistillError as error:
                    notes[number] = f"no answer: {error}"
                live.update(drawn())
                if self._conversation.interrupted.is_set():
                    return


def beside(shown: Sequence[Shown], texts: Sequence[str], notes: Sequence[str]) -> Table:
    """Answers in columns, whole: a word that is wider than its column goes on in the next line."""
    table = Table(expand=True)
    for one in shown:
        table.add_column(Text(printable(one.heading())), ratio=1, overflow="fold")
    table.add_row(*(Text(printable(text)) for text in texts))
    if any(notes):
        table.add_section()
        table.add_row(*(Text(printable(note), style="dim") for note in notes))
    return table


def _write(text: str) -> None:
    print(printable(text), end="", flush=True)


def _after(answer: Reply) -> str:
    said = []
    if answer.left_out:
        said.append(f"the context was full: {answer.left_out} of the earlier questions left out")
    if answer.ended in _ENDED:
        said.append(_ENDED[answer.ended])
    return "; ".join(said)


def _figures(answer: Reply) -> str:
    figures = (
        f"{answer.tokens} tokens in {answer.seconds:.1f} s, the first after "
        f"{answer.first_seconds:.1f} s"
    )
    return "; ".join(filter(None, (figures, _after(answer))))
