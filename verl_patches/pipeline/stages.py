"""The stages of a distillation: data, server, training, proof, evaluation, report.

Each is a process of its own with its own log in the run's folder. A person sees a few lines of
each; ``verbose`` shows all that it says. Everything that is started here is stopped by the
supervisor.
"""

from __future__ import annotations

import atexit
import json
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from cartridge_distill.cartridge.run_folder import METRICS_FILE
from cartridge_distill.data.records import load_questions
from cartridge_distill.engines.vllm.launch import PackagePath, ServeCommand, check_python
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.processes import Awaited, ChildFailed, Supervisor, follow, say
from verl_patches import launch
from verl_patches.launching.command import environment
from verl_patches.launching.following import log_file
from verl_patches.launching.result import Result, publish
from verl_patches.launching.settings import Run
from verl_patches.pipeline import checks
from verl_patches.pipeline.asking import Question
from verl_patches.pipeline.checks import shorter_than_the_cartridge
from verl_patches.pipeline.settings import Distillation, Prepared, as_run

# vLLM imports and compiles for a minute or two before it looks at the model.
_START_SECONDS = {"embedded": 180, "vllm": 900}
_SPARE_TOKENS = 64  # of vLLM's context: a validation asks for longer answers
_SHOWN_LINES = 6
_MOST_ERROR_LINES = 20
_FOR_TRAIN = "name one behind the train command"
_WROTE = re.compile(r"^Wrote (.* prompts) to .*")
_ERROR = re.compile(r"(?:\w*Error|error|refused): ")


def environment_of(settings: Distillation) -> dict[str, str]:
    """Of the stages beside the training, as the training has it."""
    return environment(as_run(settings))


class Stage:
    """A stage's process, beside which others may be started. Left early, it is ended."""

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        folder: Path,
        supervisor: Supervisor,
        env: dict[str, str],
    ) -> None:
        self._name, self._log = name, log_file(folder, name)
        self._child = supervisor.start([sys.executable, *command], self._log, env)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None:
            self._child.terminate()
            self._child.wait()

    def finish(self, verbose: bool = False) -> str:
        """Waits for its end; returns what it printed.

        Raises:
            ChildFailed: it ended with an error; in its own words.
        """
        name = self._name
        show: Callable[[str], str | None] = lambda line: line if verbose else None  # noqa: E731
        status = follow(self._child, self._log, show, name, launch.QUIET_SECONDS)
        printed = self._log.read_text(errors="replace")
        if status != 0:
            lines = printed.splitlines()
            begun = [number for number, line in enumerate(lines) if _ERROR.match(line)]
            said = lines[begun[-1] :] if begun else lines[-_SHOWN_LINES:]
            words = "\n".join(said[:_MOST_ERROR_LINES]).removeprefix("error: ")
            raise ChildFailed(f"{name}: {words or f'it ended with status {status}'}")
        return printed


def run_stage(
    command: Sequence[str],
    name: str,
    folder: Path,
    supervisor: Supervisor,
    env: dict[str, str],
    verbose: bool = False,
) -> str:
    """Runs a short stage to its end; returns what it printed.

    Raises:
        ChildFailed: it ended with an error; in its own words.
    """
    return Stage(command, name, folder, supervisor, env).finish(verbose)


def start_data(settings: Distillation, scratch: Path, supervisor: Supervisor) -> Stage:
    """Begins to write ``scratch/data`` and ``scratch/data.log``.

    Not yet the run's folder: what the data show to be wrong is found before that is touched.
    """
    command = ["-m", "cartridge_distill.data.command"]
    command += ["--data", settings.documents, "--tokenizer", settings.model]
    command += ["--out", str(scratch / "data")]
    command += ["--recipe", settings.prompt_recipe, "--seed", str(settings.seed)]
    command += ["--rows", str(settings.rows), "--prompt-tokens", str(settings.prompt_tokens)]
    command += ["--response-tokens", str(settings.response_tokens)]
    if settings.questions is not None:
        command += ["--questions", settings.questions]
    if settings.rebuild is not None:
        command += ["--rebuild", settings.rebuild]
    return Stage(command, "data", scratch, supervisor, environment_of(settings))


def finish_data(
    settings: Distillation,
    writing: Stage,
    scratch: Path,
    supervisor: Supervisor,
    verbose: bool = False,
) -> Prepared:
    """Waits for what :func:`start_data` began, says what it wrote, and looks whether it will do.

    Raises:
        ChildFailed: it was not written.
        ConfigError, NotReady: the run cannot be trained with it.
    """
    data = scratch / "data"
    printed = writing.finish(verbose)
    # The last is for who trains with another command.
    lines = [line for line in printed.splitlines() if line.strip() and _FOR_TRAIN not in line]
    lines = [line for line in lines if " dropped: " not in line or " 0 dropped" not in line]
    # They lie in ``scratch`` so far, and after a dry run nowhere.
    lines = [_WROTE.sub(r"\1", line) for line in lines]
    lines = [line.replace(str(data), shorter(settings.data)) for line in lines]
    if len(lines) > _SHOWN_LINES:
        lines = [*lines[:2], f"({len(lines) - 3} more lines in data.log)", lines[-1]]
    if len(lines) == 3:  # one document: what it is, and what becomes of it
        lines = [lines[0], f"{lines[1]}; {lines[2]}"]
    say("== data: " + "\n   ".join(lines))
    env = environment_of(settings)
    return Question(supervisor, env, look_at_data, settings, data).answer()


def look_at_data(settings: Distillation, data: Path) -> Prepared:
    """What training needs to know of a data folder, once the whole run was looked at with it.

    Raises:
        ConfigError, NotReady: the run cannot be trained with it.
    """
    found = prepared(settings, data)
    checks.check_prepared(settings, data, found)
    return found


def prepared(settings: Distillation, data: Path) -> Prepared:
    """What training needs to know of a data folder.

    Raises:
        ConfigError: no document is as long as the cartridge.
    """
    from cartridge_distill.data.document_store import DocumentStore
    from cartridge_distill.model.prompts import render_document
    from cartridge_distill.model.reading import read_tokenizer

    documents = DocumentStore.from_file(data / "documents.jsonl")
    tokenizer = read_tokenizer(settings.model)
    tokenizer.model_max_length = sys.maxsize  # transformers would warn of each long document
    lengths = {
        name: len(render_document(tokenizer, documents.text(name))) for name in documents.ids
    }
    chosen = settings.init_document
    if chosen is None and not settings.begins_elsewhere:
        long_enough = [name for name, tokens in lengths.items() if tokens >= settings.tokens]
        if not long_enough:
            raise shorter_than_the_cartridge(settings, max(lengths.values()))
        if len(lengths) > 1:
            chosen = long_enough[0]
            say(f"   the cartridge begins as a part of {chosen}")
    questions = len(load_questions(data / "eval.json"))
    return Prepared(questions, chosen, max(lengths.values()), len(lengths))


def start_server(settings: Distillation, supervisor: Supervisor) -> tuple[str, Awaited]:
    """Starts the embedded server, or vLLM, on a free port.

    Returns:
        Its URL, and what tells when it answers.

    Raises:
        ConfigError: there is no such Python as vLLM's.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings.versions.mkdir(exist_ok=True)
    log = log_file(settings.out, "server")
    command = [sys.executable, "-m", "cartridge_distill.server", "--model", settings.model]
    command += ["--port", str(port), "--cartridge-dir", str(settings.versions)]
    command += ["--threads", str(settings.threads), "--seed", str(settings.seed)]
    command += ["--device", settings.device, "--dtype", settings.dtype]
    env = environment_of(settings)
    if settings.engine == "vllm":
        command, env = vllm_server(settings, port, env)
    server = supervisor.start(command, log, env)
    # One client: httpx.get() makes a TLS context, 60 ms of the server's cores, at every look.
    http = httpx.Client(base_url=url, timeout=2)

    def answers() -> bool:
        try:
            up = http.get("/ping").status_code == 200
        except httpx.TransportError:
            return False
        if up:
            http.close()
        return up

    return url, Awaited(answers, server, log, "server", _START_SECONDS[settings.engine])


def vllm_server(
    settings: Distillation, port: int, env: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command of a vLLM that reads the run's cartridges, and its environment.

    Raises:
        ConfigError: there is no such Python.
    """
    longest = settings.tokens + settings.prompt_tokens + settings.response_tokens
    command = ServeCommand(
        model=settings.model,
        options=Options(cartridge_dir=settings.versions, seed=settings.seed),
        host="127.0.0.1",
        port=port,
        max_model_len=longest + _SPARE_TOKENS,
        dtype=settings.dtype,
        more=("--seed", str(settings.seed)),
    )
    package = PackagePath()
    # It must outlive this function, and is gone with this process.
    atexit.register(package.remove)
    return command.own(check_python(settings.engine_python)), package.environment(env)


def free_port() -> int:
    """One that nobody listens on, on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def train(
    run: Run,
    supervisor: Supervisor,
    verbose: bool = False,
    started: Callable[[], None] = lambda: None,
    choose_last: bool = False,
    server: Awaited | None = None,
) -> Result:
    """veRL, a line a step; its best cartridge, or its last, lies at RUN/cartridge afterwards.

    Args:
        server: of the run's own, that veRL waits for when it needs it.

    Raises:
        ChildFailed: the server did not come up.
        TrainingFailed: it ended with an error; the cause is named.
    """
    if server is None:
        saved = launch.train(run, supervisor, verbose, started)
    else:
        saved = launch.train(run, supervisor, verbose, started, server.look)
    assert saved is not None  # the last step is saved
    return publish(run.folder, launch.checkpoints(run), launch.saved_step(run), choose_last)


def proof(settings: Distillation) -> str:
    """What shows that the run was what it says, from the server's logs and the metrics."""
    out = settings.out
    logged = [json.loads(line)["data"] for line in (out / METRICS_FILE).read_text().splitlines()]
    # The line before the first step has the validation alone.
    metrics = [step for step in logged if "actor/loss" in step]
    worst = max(step["actor/logprob_diff/max"] for step in metrics)
    changed = sum(step["actor/frozen_tokens_changed"] for step in metrics)
    served = ""
    if settings.server is None:
        logs = sorted(out.glob("server*.log"))
        found = re.findall(r"loaded cartridge (\S+):", "\n".join(log.read_text() for log in logs))
        starts = "" if len(logs) == 1 else f" in {len(logs)} starts"
        served = f"{len(set(found))} versions served{starts} (the first, and one a step); "
    # The engine does not save a cartridge over a base that changed, and this one was saved.
    return (
        f"== proof: {served}log-probs of server and trainer differ by {worst:.1e} at most; "
        f"{changed:.0f} of {len(metrics)} steps changed a frozen token, none a base weight"
    )


def evaluate(settings: Distillation, supervisor: Supervisor, verbose: bool = False) -> None:
    """Writes RUN/evaluation."""
    out = settings.out
    command = ["-m", "cartridge_distill.cli.main", "eval", str(out), "--model", settings.model]
    command += ["--data", str(settings.data), "--out", str(out / "evaluation")]
    command += ["--seed", str(settings.seed)]
    if settings.rebuild is not None:  # what training began with
        command += ["--untrained", settings.rebuilt_cartridge]
    env = environment_of(settings)
    run_stage(command, "evaluation", out, supervisor, env, verbose)


def table(out: Path) -> list[str]:
    """The evaluation's, without the lines below it."""
    from cartridge_distill.evaluation.table import format_table

    summary = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    lines = format_table(summary).splitlines()
    return [line for line in lines if line.startswith("|")]


def report(out: Path) -> Path:
    """Writes RUN/report.html."""
    from cartridge_distill.report.page import write_report  # --help needs no plotly

    return write_report([out], out / "report.html")
