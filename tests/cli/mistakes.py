"""What goes wrong at a first try, and after how many seconds it is said.

On a clock, and of a processor, which other programs change less.

    python -m tests.cli.mistakes        # the table of docs/using.md, measured here

Each is a process of its own, as a user starts it.
"""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cli.made import DOCUMENT, made_run
from tests.gateway.rig import TOKEN, Rig
from tests.tiny import save_model, tiny_model
from tests.training.conftest import ROOT, child_environment
from tests.training.rows import write_rows
from verl_patches.pipeline.settings import Distillation
from verl_patches.pipeline.state import DATA, TRAINING, begin, check_folder

_SMALL = ("--tokens", "32", "--steps", "2", "--batch", "4", "--response-tokens", "4")
_SMALL += ("--device", "cpu", "--threads", "1")
DISTILL = ("distill", "FILE", "--model", "MODEL", *_SMALL, "--out")
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Mistake:
    """One of them.

    Attributes:
        what: in a few words.
        arguments: of the command; names in capitals are places of :func:`places`.
        said: a part of the message that names what is wrong, and one that names the fix.
        key: whether the gateway's key is in the environment.
        stopped: Ctrl-C is typed when the command has printed its first line.
        program: what is started in place of ``cartridge-distill``.
    """

    what: str
    arguments: tuple[str, ...]
    said: tuple[str, str]
    key: bool = False
    stopped: bool = False
    program: tuple[str, ...] = (sys.executable, "-m", "cartridge_distill.cli.main")


MISTAKES = (
    # --- chat and serve
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
    # --- setup, distill and train
    Mistake(
        "another Python",
        ("setup", "PYTHON=OLD_PYTHON", "VENV=VENV"),
        ("needs Python 3.11 or 3.12", "fix: make setup PYTHON="),
        program=("make", "--no-print-directory"),
    ),
    Mistake(
        "documents that are not there",
        ("distill", "FIEL", "--model", "MODEL", "--out", "NEW"),
        ("there is no such file or folder", "fix: did you mean"),
    ),
    Mistake(
        "no data",
        ("train", "--model", "MODEL", "--server", NOBODY, "--device", "cpu"),
        ("no data", "fix: give --data"),
    ),
    Mistake(
        "no server there, and --wait 1",
        (*DISTILL, "NEW", "--server", NOBODY, "--wait", "1"),
        ("no inference server at", "fix: start one"),
    ),
    Mistake(
        "/v1 behind the server's URL",
        (*DISTILL, "NEW", "--server", f"{NOBODY}/v1"),
        ("ends in /v1", "fix: leave it out"),
    ),
    Mistake(
        "the server's key is missing",
        (*DISTILL, "NEW", "--server", "GATEWAY"),
        ("refused with HTTP 401: the bearer token is missing", "fix: set TOKASAURUS_API_KEY"),
    ),
    Mistake(
        "a setting of veRL's mistyped",
        (*DISTILL, "NEW", "data.shufle=False"),
        ("veRL has no setting of this name", "fix: did you mean data.shuffle"),
    ),
    Mistake(
        "tokens that are no multiple of 16",
        (*DISTILL, "NEW", "--tokens", "100"),
        ("is no multiple of 16", "fix: give 96 or 112"),
    ),
    Mistake(
        "a cartridge longer than the document",
        (*DISTILL, "NEW", "--tokens", "4096"),
        ("the longest has", "fix: give --tokens"),
    ),
    Mistake(
        "a place that cannot be written to",
        (*DISTILL, "/proc/run"),
        ("cannot be written to", "fix: give another --out"),
    ),
    Mistake(
        "the same folder with another setting",
        (*DISTILL, "BEGUN", "--lr", "0.5"),
        ("lr: 0.02 there, 0.5 now", "fix: give the same"),
    ),
    Mistake(
        "no GPU, and --device forgotten",
        ("train", "--model", "MODEL", "--data", "ROWS", "--server", "GATEWAY", "--out", "NEW"),
        ("sees no GPU", "fix: --device cpu"),
        key=True,
    ),
    Mistake(
        "an option of distill mistyped",
        (*DISTILL, "NEW", "--stps", "3"),
        ("--stps: no such option", "fix: did you mean --steps"),
    ),
    Mistake(
        "Ctrl-C before the first step",
        (*DISTILL, "NEW"),
        ("stopped: ", "the same command"),
        stopped=True,
    ),
)


def places(folder: Path, gateway: str) -> dict[str, str]:
    """What the arguments name, made in ``folder``.

    Args:
        gateway: URL of a gateway with a token.
    """
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
    (folder / "file.txt").write_text(DOCUMENT)
    (folder / "rows").mkdir()
    write_rows(folder / "rows")
    old = folder / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    _begin(folder)
    return {
        "MINE": str(folder / "runs" / "mine"),
        "MINNE": str(folder / "runs" / "minne"),
        "MOVED": str(folder / "runs" / "moved"),
        "UNFINISHED": str(folder / "runs" / "unfinished"),
        "BEGUN": str(folder / "runs" / "begun"),
        "NEW": str(folder / "runs" / "new"),
        "FILE": str(folder / "file.txt"),
        "FIEL": str(folder / "fiel.txt"),
        "PYTHON=OLD_PYTHON": f"PYTHON={old}",
        "VENV=VENV": f"VENV={folder / 'venv'}",
        "GATEWAY": gateway,
        **{name.upper(): str(folder / name) for name in ("model", "other", "twin", "empty")},
        "ROWS": str(folder / "rows"),
    }


def _begin(folder: Path) -> None:
    """A run that has trained."""
    settings = Distillation(
        documents=str(folder / "file.txt"),
        model=str(folder / "model"),
        out=folder / "runs" / "begun",
        name="file",
        tokens=32,
        steps=2,
        batch=4,
        response_tokens=4,
        threads=1,
    )
    state = check_folder(settings, overwrite=False)
    begin(state)
    state.finish(DATA)
    state.finish(TRAINING)
    state.release()


def made(
    mistake: Mistake, place: dict[str, str], verl: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """The command as a process; and its seconds, on a clock and of a processor.

    Of one that is stopped, the seconds from Ctrl-C on.

    Args:
        verl: a folder that holds the ``verl/`` to be imported; None takes the installed one.
    """
    command = [*mistake.program, *(place.get(part, part) for part in mistake.arguments)]
    environment = child_environment(verl, **({"TOKASAURUS_API_KEY": TOKEN} if mistake.key else {}))
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as child:
        first = ""
        if mistake.stopped:
            assert child.stdout is not None
            first = child.stdout.readline()
            begun = time.monotonic()
            child.send_signal(signal.SIGINT)
        try:
            printed, complained = child.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    seconds, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done = subprocess.CompletedProcess(command, child.returncode, first + printed, complained)
    return done, seconds, computed


def message(mistake: Mistake, done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what is wrong, with the items that it lists behind it."""
    said = done.stdout if mistake.stopped else done.stderr
    begin = "stopped: " if mistake.stopped else "error: "
    [line] = [line for line in said.splitlines() if line.startswith(begin)]
    return " ".join([line, *(item for item in said.splitlines() if item.startswith("- "))])


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as taken:
        with Rig(Path(folder) / "rig", _served(Path(folder))) as rig:
            place = places(Path(folder), rig.url)
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            place["PORT"] = str(taken.getsockname()[1])
            print("| mistake | what is said | seconds | of a processor |\n|---|---|--:|--:|")
            for mistake in MISTAKES:
                done, seconds, computed = made(mistake, place)
                line = message(mistake, done).removeprefix("error: ")
                line = line.replace(f"{folder}/", "").replace("|", "\\|")
                mark = "``" if "`" in line else "`"
                print(
                    f"| {mistake.what} | {mark}{line}{mark} | {seconds:.1f} | {computed:.1f} |",
                    flush=True,
                )
    return 0


def _served(folder: Path) -> Path:
    save_model(tiny_model(), folder / "served")
    return folder / "served"


if __name__ == "__main__":
    sys.exit(main())
