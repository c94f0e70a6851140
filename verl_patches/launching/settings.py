"""What describes a training run: :class:`Run`, from flags, from a YAML file, or from both.

A field of :class:`Run` is a flag, a key of the file and, mostly, one of veRL's settings. None
leaves a setting as verl_patches/config/cartridge_distill.yaml has it. Everything else of veRL's is
set by Hydra's overrides, which come last and win.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.secrecy import named_secrets
from cartridge_distill.util.server_url import checked_url

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "config"
CONFIG_NAME = "cartridge_distill"
LOGGERS = ("wandb", "tensorboard")
_OVERRIDE = re.compile(r"[~+]{0,2}[\w./@:-]+(=.*)?", re.DOTALL)


def _setting(
    words: str,
    default: Any = None,
    *,
    key: str | None = None,
    choices: tuple[str, ...] = (),
    group: str = "the recipe",
) -> Any:
    """A field of :class:`Run`.

    Args:
        words: for --help; the default is added to them.
        key: veRL's setting, where the value is passed on as it is.
        choices: allowed values.
        group: heading in --help.
    """
    about = {"words": words, "key": key, "choices": choices, "group": group}
    return field(default=default, metadata=about)


_ACTOR, _WHAT, _HOW = "actor_rollout_ref.actor", "what is trained", "how it runs"


@dataclass(frozen=True)
class Run:
    """One training run. Paths may be relative to the working directory.

    Raises:
        ConfigError: a value that cannot be.
    """

    model: str = _setting(
        "base model, folder or hub id",
        "meta-llama/Llama-3.2-3B-Instruct",
        key="actor_rollout_ref.model.path",
        group=_WHAT,
    )
    data: Path | None = _setting("folder that `prepare` wrote; needed", group=_WHAT)
    server: tuple[str, ...] = _setting(
        "the rollout server, http://host:10210; several make one replica each; needed",
        (),
        group=_WHAT,
    )
    out: Path | None = _setting(
        "folder of the run: checkpoints, metrics, log (default: runs/<name>)", group=_WHAT
    )
    name: str | None = _setting(
        "begins the version ids, and names the recipe in a report (default: the data folder's "
        "name)",
        group=_WHAT,
    )
    served_model: str | None = _setting("what the gateway calls the model (--model)", group=_WHAT)
    sync_dir: Path | None = _setting(
        "the server's cartridge directory as this machine sees it; without it, new versions are "
        "uploaded to the gateway at --server",
        group=_WHAT,
    )

    tokens: int = _setting("cartridge tokens", 2048, key=f"{_ACTOR}.cartridge.num_tokens")
    lr: float = _setting("learning rate", 0.02, key=f"{_ACTOR}.cartridge.lr")
    batch: int = _setting("prompts a step", 32, key="data.train_batch_size")
    steps: int | None = _setting(
        "optimizer steps (default: one epoch of the data)", key="trainer.total_training_steps"
    )
    temperature: float = _setting(
        "of the rollouts", 0.7, key="actor_rollout_ref.rollout.temperature"
    )
    prompt_tokens: int | None = _setting(
        "longest prompt (512); a longer one is an error", key="data.max_prompt_length"
    )
    response_tokens: int | None = _setting("longest rollout (256)", key="data.max_response_length")
    seed: int = _setting("of data order and sampling", 0, key="data.seed")

    device: str = _setting("where it is trained", "cuda", choices=("cuda", "cpu"), group=_HOW)
    dtype: str | None = _setting(
        "of the frozen model (bfloat16 on cuda, float32 on cpu)",
        key=f"{_ACTOR}.fsdp_config.model_dtype",
        choices=("bfloat16", "float32"),
        group=_HOW,
    )
    threads: int | None = _setting("CPU threads of each process", group=_HOW)
    save_every: int | None = _setting(
        "steps between checkpoints (50); the last step is always saved",
        key="trainer.save_freq",
        group=_HOW,
    )
    test_every: int | None = _setting(
        "steps between validations on the data's eval.json, one before the first step included "
        "(default: none)",
        group=_HOW,
    )
    log_to: str | None = _setting(
        "also log to these, with a comma between them: wandb, tensorboard (RUN/tensorboard)",
        group=_HOW,
    )
    wait: float = _setting(
        "seconds to wait for the server, a cold start included", 60.0, group=_HOW
    )
    overrides: tuple[str, ...] = _setting("further settings of veRL, see below", (), group=_HOW)

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "steps", "prompt_tokens", "response_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} {value} is too few; fix: give 1 or more")
        if self.tokens % PAGE_TOKENS:
            less = self.tokens // PAGE_TOKENS * PAGE_TOKENS
            near = [str(count) for count in (less, less + PAGE_TOKENS) if count]
            raise ConfigError(
                f"--tokens {self.tokens} is no multiple of {PAGE_TOKENS}, the page size of the "
                f"real server; fix: give {' or '.join(near)}"
            )
        if not self.lr > 0:
            raise ConfigError(f"--lr {self.lr} is too little; fix: give more than 0")
        if self.temperature < 0:
            raise ConfigError(
                f"--temperature {self.temperature} is too little; fix: give 0 (greedy) or more"
            )
        for about in fields(self):
            value, choices = getattr(self, about.name), about.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ConfigError(
                    f"{flag(about.name)} {value}: there is none; fix: give one of "
                    f"{', '.join(choices)}"
                )
        unknown = [name for name in self.loggers if name not in LOGGERS]
        if self.log_to is not None and (unknown or not self.loggers):
            raise ConfigError(
                f"--log-to {self.log_to}: {', '.join(unknown) or 'nothing'} is no logger here; "
                f"fix: give {' or '.join(LOGGERS)}, or both with a comma between them"
            )
        for override in self.overrides:
            if not _OVERRIDE.fullmatch(override) or not ("=" in override or override[0] == "~"):
                raise ConfigError(
                    f"{override!r} is no override of veRL's; fix: write name=value, e.g. "
                    f"{_ACTOR}.cartridge.topk=50"
                )
        for url in self.server:
            checked_url(url)
        _check_no_secrets((*self.overrides, self.model, self.served_model or "", self.name or ""))

    @property
    def loggers(self) -> tuple[str, ...]:
        """veRL's loggers beside its console and its file."""
        return tuple(filter(None, (name.strip() for name in (self.log_to or "").split(","))))

    @property
    def label(self) -> str:
        """``name``, or what begins the version ids in its place."""
        folder = "run" if self.data is None else self.data.absolute().name
        return self.name or re.sub(r"[^0-9A-Za-z]+", "-", folder).strip("-") or "run"

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return (self.out or Path("runs") / self.label).expanduser().absolute()


def _check_no_secrets(texts: Sequence[str]) -> None:
    """Arguments are seen by every process of the machine, and veRL prints its settings.

    Raises:
        ConfigError: one of them names a credential; the message does not repeat it.
    """
    for text in texts:
        if names := named_secrets(text):
            name = text.partition("=")[0] if "=" in text else "a setting"
            what = "a URL with a user or a password" if "URL" in names else names[0]
            raise ConfigError(
                f"{name}: {what} is a credential, and would stand in the list of processes, in "
                "veRL's log and in Ray's; fix: export it in the environment "
                "(TOKASAURUS_API_KEY, MODAL_PROXY_KEY, MODAL_PROXY_SECRET, HF_TOKEN, WANDB_API_KEY)"
            )


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One option for each field of :class:`Run`; those not given are absent afterwards."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for about in fields(Run):
        if about.name == "overrides":
            continue
        words = about.metadata["words"]
        if about.default not in (None, ()):
            words += f" ({about.default})"
        name = about.metadata["group"]
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        kind = _kind(about.name)
        options: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
        if about.metadata["choices"]:
            options["choices"] = about.metadata["choices"]
        else:
            options["type"] = str if kind is tuple else kind
            shown = {Path: "FOLDER", int: "N", float: "X", tuple: "URL"}
            options["metavar"] = shown.get(kind, about.name.rsplit("_", 1)[-1].upper())
        if kind is tuple:
            options["action"] = "append"
        group.add_argument(flag(about.name), **options)


def make_run(given: Mapping[str, Any], file: Path | None, overrides: Sequence[str]) -> Run:
    """A run of flags, which win, and of a file; the flags' overrides come after the file's.

    Args:
        given: values by field name.

    Raises:
        ConfigError: the file cannot be read, or a value cannot be.
    """
    settings = {} if file is None else read_file(file)
    settings |= dict(given)
    settings["overrides"] = (*settings.get("overrides", ()), *overrides)
    if "server" in settings:
        settings["server"] = tuple(settings["server"])
    return Run(**settings)


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a ``--config`` file: YAML, with the flags' names, and ``overrides``, a list.

    Raises:
        ConfigError: no such file, no YAML, an unknown name, or a value of another kind.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config {path} cannot be read: {error}; fix: name a file of YAML in UTF-8"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} holds no settings; fix: write one a line, such as `tokens: 2048`"
        )
    known = {about.name for about in fields(Run)}
    settings: dict[str, Any] = {}
    strange = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            strange.append(str(key))
        elif name in settings:
            raise ConfigError(f"--config {path}: {key} is there twice; fix: keep one")
        elif value is not None:
            settings[name] = _checked(path, name, value)
    if strange:
        names = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise ConfigError(
            f"--config {path}: unknown: {', '.join(strange)}; fix: give one of {names}; veRL's own "
            "settings stand in the list `overrides`"
        )
    return settings


def _kind(name: str) -> type:
    """int, float, str, Path or tuple."""
    hint = get_type_hints(Run)[name]
    if getattr(hint, "__origin__", None) is tuple:
        return tuple
    found = [part for part in get_args(hint) if part is not type(None)] or [hint]
    kind: type = found[0]
    return kind


def _checked(path: Path, name: str, value: Any) -> Any:
    """A value of a file, of the field's own kind."""
    kind = _kind(name)
    shown = name.replace("_", "-")
    if kind is tuple:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(item, str) for item in values):
            return tuple(values)
        raise ConfigError(
            f"--config {path}: {shown}: {value!r} is no list of texts; fix: write [one, two]"
        )
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    wanted = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}[kind]
    hint = " (YAML reads 2e-2 as a text: write 0.02)" if kind is float else ""
    raise ConfigError(f"--config {path}: {shown}: {value!r} is not {wanted}; fix: give one{hint}")
