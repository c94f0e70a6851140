"""What goes wrong with `chat` and `serve` at a first try, and after how many seconds.

On a clock, and of a processor, which other programs change less.

    python -m tests.cli.mistakes        # the table of docs/using.md, measured here

Each is a process of its own, as a user starts it.
"""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cli.made import made_run
from tests.tiny import save_model, tiny_model
from tests.training.conftest import ROOT, child_environment


@dataclass(frozen=True)
class Mistake:
    """One of them.

    Attributes:
        what: in a few words.
        arguments: of the command; names in capitals are places of :func:`places`.
        said: a part of the message that names what is wrong, and one that names the fix.
    """

    what: str
    arguments: tuple[str, ...]
    said: tuple[str, str]


MISTAKES = (
    Mistake("a run's name mistyped", ("chat", "MINNE"), ("is not there", "did you mean")),
    Mistake("no such path", ("chat", "/no/such"), ("no file, no directory", "name a run's folder")),
    Mistake(
        "a folder without a cartridge",
        ("chat", "EMPTY", "--model", "MODEL"),
        ("holds no cartridge", "fix: name the folder of a run"),
    ),
    Mistake(
        "a run that has not ended", ("serve", "UNFINISHED"), ("without a cartridge yet", "fix: ")
    ),
    Mistake(
        "a wrong model path",
        ("chat", "MINE", "--model", "/no/model"),
        ("there is no such folder", "fix: give the folder"),
    ),
    Mistake(
        "a model that has moved since", ("serve", "MOVED"), ("is not there", "fix: name the folder")
    ),
    Mistake(
        "a model of another shape",
        ("chat", "MINE", "--model", "OTHER", "--prompt", "?"),
        ("trained with other weights", "fix: give the model"),
    ),
    Mistake(
        "a twin: same shape, other weights",
        ("chat", "MINE", "--model", "TWIN", "--prompt", "?"),
        ("trained with other weights", "--allow-other-model"),
    ),
    Mistake(
        "the port is taken", ("serve", "MINE", "--port", "PORT"), ("in use", "fix: choose another")
    ),
    Mistake(
        "no GPU",
        ("serve", "MINE", "--port", "0", "--device", "cuda"),
        ("sees no GPU", "fix: --device cpu"),
    ),
    Mistake(
        "a cartridge without a name",
        ("serve", "--cartridge", "MINE"),
        ("has no name", "fix: say NAME=SOURCE"),
    ),
    Mistake(
        "a document of no cartridge",
        ("serve", "MINE", "--document", "yours=FILE"),
        ("no cartridge of this name", "fix: name one of mine"),
    ),
    Mistake(
        "a server for training, and no such model",
        ("serve", "--model", "/no/model"),
        ("there is no such folder", "fix: give the folder"),
    ),
    Mistake("an option mistyped", ("chat", "MINE", "--promt", "?"), ("--promt", "--prompt")),
)


def places(folder: Path) -> dict[str, str]:
    """What the arguments name, made in ``folder``."""
    model = tiny_model()
    save_model(model, folder / "model")
    save_model(tiny_model(num_hidden_layers=3), folder / "other")
    save_model(tiny_model(seed=1), folder / "twin")
    made_run(folder / "model", model, folder / "runs" / "mine")
    made_run(folder / "model", model, folder / "runs" / "moved")
    described = folder / "runs" / "moved" / "cartridge" / "cartridge.json"
    text = described.read_text().replace(str(folder / "model"), "/moved/away")
    described.write_text(text)
    (folder / "runs" / "unfinished").mkdir()
    (folder / "runs" / "unfinished" / "metrics.jsonl").write_text("")
    (folder / "empty").mkdir()
    return {
        "MINE": str(folder / "runs" / "mine"),
        "MINNE": str(folder / "runs" / "minne"),
        "MOVED": str(folder / "runs" / "moved"),
        "UNFINISHED": str(folder / "runs" / "unfinished"),
        **{name.upper(): str(folder / name) for name in ("model", "other", "twin", "empty")},
    }


def made(
    mistake: Mistake, place: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """The command as a process; and its seconds, on a clock and of a processor."""
    command = [sys.executable, "-m", "cartridge_distill.cli.main"]
    command += [place.get(argument, argument) for argument in mistake.arguments]
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=child_environment(), cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done, time.monotonic() - begun, computed


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as taken:
        place = places(Path(folder))
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place["PORT"] = str(taken.getsockname()[1])
        print("| mistake | what is said | seconds | of a processor |\n|---|---|--:|--:|")
        for mistake in MISTAKES:
            done, seconds, computed = made(mistake, place)
            line = done.stderr.strip().splitlines()[-1].removeprefix("error: ")
            line = line.replace(f"{folder}/", "").replace("|", "\\|")
            print(f"| {mistake.what} | {line} | {seconds:.1f} | {computed:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
