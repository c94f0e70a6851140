"""What is looked at before a run starts: nothing starts on a machine where it cannot end well."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.http import ClientSettings
from cartridge_distill.util.command_line import nearest
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, RolloutError
from cartridge_distill.util.files import check_writable
from cartridge_distill.util.next_command import program
from cartridge_distill.util.processes import say
from verl_patches.launching.settings import Run
from verl_patches.manage import State, find_tree, status
from verl_patches.packages import PatchError


class NotReady(CartridgeDistillError):
    """Something that a run needs is missing; the message says what, and the fix."""


def check(run: Run) -> None:
    """veRL and every server: what a login node without a GPU can tell, before the data are there.

    Raises:
        NotReady: with the fix.
    """
    check_verl()
    check_servers(run)


def check_first(run: Run) -> None:
    """What is known at once: before a server is waited for, and before the settings are read.

    Raises:
        ConfigError, NotReady: with the fix.
    """
    check_loggers(run)
    check_folder(run)
    check_data(run)
    if not may_be_elsewhere(run):
        check_model_name(run.model)
    check_device(run)


def check_here(run: Run) -> None:
    """The machine that trains: data, settings, device, and the run's folder.

    Raises:
        ConfigError, NotReady: with the fix.
    """
    check_first(run)
    check_settings(run)
    check_prompts(run)


def check_loggers(run: Run) -> None:
    """Are those of ``--log-to`` installed?

    Raises:
        NotReady: one is not.
    """
    missing = [name for name in run.loggers if importlib.util.find_spec(name) is None]
    if missing:
        raise NotReady(
            f"--log-to {run.log_to}: not installed here: {', '.join(missing)}; fix: "
            f"pip install {' '.join(missing)}"
        )


def check_model_name(model: str) -> None:
    """Can it be a model's? Known at once; reading it takes seconds of imports.

    Raises:
        ConfigError: it looks like a path, and nothing is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        raise ConfigError(
            f"--model {model}: the folder has no config.json; fix: name the folder of a model, or "
            "a hub id"
        )
    if not (path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        return  # a hub id, or a name that the reading will not find
    near = near_names(path)
    raise ConfigError(
        f"--model {model}: there is no such folder; fix: "
        + (f"did you mean {' or '.join(near)}?" if near else "name a model's folder, or a hub id")
    )


def near_names(path: Path) -> list[str]:
    """What lies beside a path that is not there, and is called almost as it is."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.with_name(name)) for name in nearest(path.name, beside)]


def check_verl() -> None:
    """Is veRL there, of the right version, with all patches on?

    Raises:
        NotReady: it is not, with the fix.
    """
    fix = "python -m verl_patches apply"
    try:
        found = status(find_tree())
    except PatchError as error:
        raise NotReady(f"veRL is not ready for cartridges: {error}") from error  # with its fix
    wrong = [f"  {item.name}: {item.state.value}" for item in found if item.state != State.APPLIED]
    if wrong:
        raise NotReady(
            "\n".join(["veRL is not ready for cartridges:", *wrong, f"fix: {fix}"])
            + " (in a checkout, make setup does it, too)"
        )


def may_be_elsewhere(run: Run, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the run joins a cluster, whose machines may have what this one has not."""
    named = ("ray_kwargs.ray_init.address=", "trainer.nnodes=")
    return bool(environ.get("RAY_ADDRESS")) or any(o.startswith(named) for o in run.overrides)


def check_device(run: Run, environ: Mapping[str, str] = os.environ) -> None:
    """Is there a GPU for ``--device cuda``, unless the run joins a cluster that may have one?

    Raises:
        NotReady: there is none.
    """
    if run.device != "cuda" or may_be_elsewhere(run, environ):
        return
    import torch  # seconds, which a run on a CPU need not wait for

    if not torch.cuda.is_available():
        raise NotReady(
            f"--device cuda: torch {torch.__version__} sees no GPU here (nvidia-smi shows whether "
            "there is one); fix: --device cpu"
        )


def check_servers(run: Run) -> None:
    """As :func:`look_at_servers`, and where something is wrong, how to get a server.

    Raises:
        NotReady: no server is named, or one that cannot be used; with the fix.
    """
    check_server_named(run)
    try:
        look_at_servers(run)
    except NotReady as error:
        raise NotReady(f"{error}\n{how_to_serve(run)}") from error


def check_server_named(run: Run) -> None:
    """Does anything say which server writes the rollouts?

    Raises:
        NotReady: nothing does.
    """
    if not run.server:
        raise NotReady(
            f"no server to write the rollouts; fix: give --server URL\n{how_to_serve(run)}"
        )


def look_at_servers(run: Run) -> None:
    """Does every server answer, and is there a way to it for new versions?

    Raises:
        NotReady: one does not answer, or takes no versions; with the fix.
    """
    if run.sync_dir is not None:
        folder = run.sync_dir.expanduser().absolute()
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise NotReady(
                f"--sync-dir {folder} is no directory that can be written to; fix: mount the "
                "server's cartridge directory there, or leave it out and upload to a gateway"
            )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # "waiting for the ..."
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for url in run.server:
        try:
            asyncio.run(_look(url, run))
        except RolloutError as error:
            raise NotReady(str(error)) from error


async def _look(url: str, run: Run) -> None:
    async with TokasaurusClient(url, ClientSettings(startup_timeout_s=run.wait)) as client:
        await client.wait_until_ready()
        served = ", ".join(await client.models())
        say(f"server {client.url} serves {served}; to be trained: {run.model}")
        if run.sync_dir is None:
            await client.check_takes_uploads()


def how_to_serve(run: Run) -> str:
    """Three ways to a rollout server, ready to paste."""
    model = shlex.quote(run.model)
    dtype = " --device cuda --dtype bfloat16" if run.device == "cuda" else ""
    if run.device == "cpu" and run.dtype == "bfloat16":
        dtype = " --dtype bfloat16"
    return f"""\
how to get a server (docs/serving.md has more; TOKASAURUS_API_KEY is the same here and there):
  the embedded server behind the gateway, on any machine:
    {program()} serve --model {model} --host 0.0.0.0{dtype}
  Tokasaurus behind the gateway, on a GPU machine:
    python -m cartridge_distill.gateway --backend tokasaurus --model {model} --host 0.0.0.0
  the same on Modal:
    modal deploy modal/modal_tokasaurus.py      # prints the URL
  then: --server http://that-machine:10210"""


def missing_data(run: Run) -> list[Path]:
    """The data's files that are not there.

    Raises:
        ConfigError: no data was named.
    """
    if run.data is None:
        raise ConfigError(
            "no data; fix: give --data FOLDER, which `cartridge-distill prepare` writes"
        )
    names = ["train.parquet", "val.parquet", "documents.jsonl"]
    if run.test_every:
        names.append("eval.json")
    folder = run.data.expanduser().absolute()
    return [folder / name for name in names if not (folder / name).is_file()]


def check_data(run: Run) -> None:
    """Are the data's files there?

    Raises:
        NotReady: some are not.
    """
    if missing := missing_data(run):
        write = f"{program()} prepare --data DOCUMENTS --tokenizer {shlex.quote(run.model)}"
        raise NotReady(
            f"the data are not whole: {', '.join(map(str, missing))} not found; fix: write them "
            f"with `{write} --out {shlex.quote(str(missing[0].parent))}`"
        )


def check_settings(run: Run) -> None:
    """Can veRL's settings, as the run has them, train a cartridge and end with its last step?

    veRL's driver asks the same, half a minute later.

    Raises:
        ConfigError: every problem found.
    """
    from verl_patches.config.checks import check_run_config  # it imports torch, which takes seconds
    from verl_patches.launching.configured import configuration

    check_run_config(configuration(run))


def check_length(run: Run) -> None:
    """Of the settings, what is true on every machine: does the run reach its last step?

    Raises:
        ConfigError: rows, batch, epochs, steps and saving do not go together.
    """
    from verl_patches.config.run_length import run_length
    from verl_patches.launching.configured import configuration

    if problems := run_length(configuration(run)).problems():
        raise ConfigError("\n- ".join(["the run would not end as asked:", *problems]))


def check_prompts(run: Run) -> None:
    """Is every prompt within ``data.max_prompt_length``, as the rollouts will count it?

    Raises:
        ConfigError: some are not, or the model's tokenizer cannot be read.
    """
    from cartridge_distill.data.prompt_length import PromptLimit, prompts_of
    from cartridge_distill.model.reading import read_tokenizer
    from verl_patches.config.data_files import path_of
    from verl_patches.launching.configured import configuration
    from verl_patches.platform.cluster import joins_a_cluster

    config = configuration(run)
    try:
        tokenizer = read_tokenizer(config.actor_rollout_ref.model.path)
    except ConfigError:
        if joins_a_cluster(config):
            return  # its machines may have the model, and this one not
        raise
    limit = PromptLimit(tokenizer, config.data.max_prompt_length)
    fix = "write the data with this `prepare --prompt-tokens`, or train with --prompt-tokens"
    files = config.data.train_files
    for file in [files] if isinstance(files, str) else files:
        path = path_of(file)
        limit.check(prompts_of(path, config.data.prompt_key), str(path), fix)


def check_folder(run: Run) -> None:
    """Can the run's folder be made and written to? Nothing is made here.

    Raises:
        NotReady: it cannot.
    """
    check_writable(run.folder, "--out")
