"""``cartridge-distill doctor``: what is there, what fits together, and the fix for what does not.

Every line is one check: ``ok``, ``--`` for what was not asked about, or ``BAD`` with the fix. veRL
is looked at from outside, in a process of its own: importing it takes seconds, and the core does
not know it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cartridge_distill.cartridge.run_folder import resolve_cartridge
from cartridge_distill.data.limits import PROMPT_TOKENS
from cartridge_distill.util.errors import CartridgeDistillError, RolloutError, ServerRefused
from cartridge_distill.util.extras import ExtraMissing, require
from cartridge_distill.util.node import missing_settings

PROJECT = Path(__file__).resolve().parents[2]
_NAME = "cartridge-distill"
# Named, with the extra that asks for them; None for the light core.
_PACKAGES = {
    "torch": None,
    "transformers": None,
    "verl": "train",
    "ray": "train",
    "TransferQueue": "train",
    "peft": "train",
    "plotly": "report",
    "bm25s": "data",
    "pypdf": "data",
    "aiohttp": None,
}
_INSTALL = "make setup installs the tested set (requirements/lock.txt)"


@dataclass(frozen=True)
class Finding:
    """One check. ``good`` is None for what could not be looked at, because nobody named it."""

    what: str
    good: bool | None
    said: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {True: "ok ", False: "BAD", None: "-- "}[self.good]
        lines = [f"{mark} {self.what}: {self.said}"]
        if self.fix:
            lines.append(f"      -> {self.fix}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Subject:
    """What to look at; None leaves that check out."""

    url: str | None = None
    model: str | None = None
    cartridge: str | None = None
    data: Path | None = None
    row_tokens: int | None = None
    tokens: int = 2048
    document_tokens: int = 10_000
    prompt_tokens: int = PROMPT_TOKENS


def examine(subject: Subject) -> Iterator[Finding]:
    """All checks, as they are made."""
    yield _python()
    yield from _packages()
    yield _patches()
    yield _gpu()
    yield from _environment()
    yield _memory(subject)
    yield _server(subject.url)
    yield from _cartridge(subject.cartridge, subject.model)
    yield from _data(subject)


def _python() -> Finding:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    fix = "" if good else "use Python 3.11 or 3.12: make setup PYTHON=/path/to/python3.11"
    return Finding("Python", good, version, fix)


def requirements(project: Path = PROJECT) -> list[str]:
    """What the project asks for, extras with their marker: of this checkout, or as installed.

    A checkout comes first: its bounds may be newer than those of its last installation, and on a
    node without network it is not installed at all.
    """
    file = project / "pyproject.toml"
    if file.is_file():
        described = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if described.get("name") == _NAME:
            extras = described.get("optional-dependencies", {})
            return [
                *described["dependencies"],
                *(f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines),
            ]
    try:
        return importlib.metadata.requires(_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _packages() -> Iterator[Finding]:
    """Versions. What an extra brings may be missing; where it is there, its bounds count."""
    asked = [Requirement(line) for line in requirements()]
    for name, extra in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            get = f"pip install 'cartridge-distill[{extra}]'" if extra else _INSTALL
            what = f"not installed; [{extra}] brings it" if extra else "not installed"
            yield Finding(name, None if extra else False, what, get)
            continue
        bound = SpecifierSet()
        for requirement in asked:
            if requirement.name.lower() == name.lower() and _counts(requirement):
                bound &= requirement.specifier
        if bound.contains(version, prereleases=True):
            yield Finding(name, True, version)
        else:
            fix = f"this project needs {name}{bound}; {_INSTALL}"
            yield Finding(name, False, version, fix)


def _counts(requirement: Requirement) -> bool:
    """Whether it is the core's, or of an extra that is installed: [train] is when veRL is."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return True
    extras = {extra for extra in _PACKAGES.values() if extra is not None}
    named = {extra for extra in extras if marker.evaluate({"extra": extra})}
    return bool(named - {"train"}) or ("train" in named and _is_installed("verl"))


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _patches() -> Finding:
    if not _is_installed("verl"):
        return Finding("veRL's patches", None, "veRL is not installed; only training needs it")
    done = subprocess.run(
        [sys.executable, "-m", "verl_patches", "check"], capture_output=True, text=True, timeout=120
    )
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return Finding("veRL's patches", True, lines[-1] if lines else "applied")
    fix = "python -m verl_patches apply"
    if any("No module named verl_patches" in line for line in lines):
        fix = "run this from the project's folder, or install it: pip install --no-deps -e ."
    return Finding("veRL's patches", False, "\n      ".join(lines), fix)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", True, "none; train and serve with --device cpu")
    devices = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return Finding("GPU", True, "; ".join(devices))


def _environment() -> Iterator[Finding]:
    """What NCCL and Ray miss; on a GPU node alone, for elsewhere the defaults work."""
    import torch

    if not torch.cuda.is_available():
        return
    missing = missing_settings(os.environ, gpu=True)
    for setting in missing:
        fix = f"export {setting.name}={setting.value} (make demo sets it by itself)"
        yield Finding(setting.name, False, f"not set: {setting.why}", fix)
    if not missing:
        yield Finding("environment", True, "NCCL and Ray need nothing more")


def _memory(subject: Subject) -> Finding:
    """A training step in bfloat16 on a GPU, and whether the GPU here has as much."""
    if subject.model is None or subject.row_tokens is None:
        return Finding("memory", None, "not looked at: name --model and --row-tokens")
    import torch

    from cartridge_distill.distill.memory_plan import predict_step
    from cartridge_distill.distill.step_shape import StepShape
    from cartridge_distill.model.reading import read_model_config
    from cartridge_distill.model.shape import DecoderShape

    try:
        step = StepShape(
            cartridge_tokens=subject.tokens,
            row_tokens=subject.row_tokens,
            document_tokens=subject.document_tokens,
        )
        plan = predict_step(DecoderShape.of(read_model_config(subject.model)), step)
    except (CartridgeDistillError, OSError, ValueError) as error:
        return Finding("memory", False, str(error).splitlines()[0])
    said = f"{plan.line()}\n{plan.describe()}".replace("\n", "\n      ")
    advice = "what makes it smaller: " + "; ".join(plan.advice())
    if not torch.cuda.is_available():
        return Finding("memory", None, f"{said}\n      no GPU here to hold it against")
    free = min(torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count()))
    said += f"\n      free on the GPU: {free / 2**30:.2f} GiB"
    return Finding("memory", plan.peak <= free, said, "" if plan.peak <= free else advice)


def _server(url: str | None) -> Finding:
    if url is None:
        return Finding("server", None, "not looked at: name it with --url")
    from cartridge_distill.rollout.client import TokasaurusClient
    from cartridge_distill.rollout.http import ClientSettings

    settings = ClientSettings(max_attempts=1, startup_timeout_s=5.0, connect_timeout_s=3.0)

    async def look() -> str:
        async with TokasaurusClient(url, settings) as client:
            await client.wait_until_ready()
            models = ", ".join(await client.models())
            try:
                await client.check_takes_uploads()
                return f"{url} serves {models} and takes uploads"
            except ServerRefused:
                raise
            except RolloutError:
                return f"{url} serves {models}; it takes no uploads: train with --sync-dir"

    try:
        return Finding("server", True, asyncio.run(look()))
    except RolloutError as error:
        said, _, fix = str(error).partition("; fix: ")
        return Finding("server", False, said, fix or "see docs/serving.md")


def _cartridge(cartridge: str | None, model: str | None) -> Iterator[Finding]:
    if model is None:
        yield Finding("model", None, "not looked at: name it with --model")
    else:
        yield _try("model", lambda: _describe_model(model), "give a folder or a hub id")
    if cartridge is None:
        yield Finding("cartridge", None, "not looked at: name it with --cartridge")
        return
    yield _try("cartridge", lambda: _describe_cartridge(cartridge, model), "")
    if model is not None:
        yield _weights(cartridge, model)


def _weights(cartridge: str, model: str) -> Finding:
    """Whether the cartridge was trained with these weights: the shape alone does not tell."""
    from cartridge_distill.cartridge.checkpoint import read_cartridge
    from cartridge_distill.model.identity import check_same_weights

    what = "cartridge's model"
    try:
        stored = read_cartridge(resolve_cartridge(cartridge))
        told = check_same_weights(stored.meta, cartridge, model)
    except (CartridgeDistillError, OSError, ValueError) as error:
        return Finding(what, False, str(error).splitlines()[0])
    if told is not None:
        return Finding(what, None, told)
    return Finding(what, True, f"it was trained with the weights of {model}")


def _try(what: str, look: Callable[[], str], fix: str) -> Finding:
    try:
        return Finding(what, True, look())
    except (CartridgeDistillError, OSError, ValueError) as error:
        return Finding(what, False, str(error).splitlines()[0], fix)


def _describe_model(model: str) -> str:
    from cartridge_distill.cartridge.kv_shape import text_config
    from cartridge_distill.model.reading import read_model_config

    config = text_config(read_model_config(model))
    context = getattr(config, "max_position_embeddings", None)
    return f"{model}: {config.model_type}, {config.num_hidden_layers} layers, context {context}"


def _describe_cartridge(source: str, model: str | None) -> str:
    from cartridge_distill.cartridge.checkpoint import read_cartridge
    from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
    from cartridge_distill.model.reading import read_model_config

    config = None if model is None else read_model_config(model)
    cartridge = read_cartridge(resolve_cartridge(source), config).snapshot
    said = f"{source}: {cartridge.num_tokens} tokens, {cartridge.num_frozen_tokens} frozen"
    if model is not None:
        said += f", fits {model}"
    if cartridge.num_tokens % PAGE_TOKENS:
        said += f"; no multiple of {PAGE_TOKENS}: Tokasaurus cannot serve it"
    return said


def _data(subject: Subject) -> Iterator[Finding]:
    data = subject.data
    if data is None:
        yield Finding("data", None, "not looked at: name its folder with --data")
        return
    try:
        require("doctor --data")
    except ExtraMissing as error:
        yield Finding("data", False, str(error))
        return
    fix = "write it: cartridge-distill prepare --help"
    rows = data / "train.parquet" if data.is_dir() else data
    documents = rows.parent / "documents.jsonl"
    yield _try("documents", lambda: _describe_documents(documents), fix)
    yield _try("training data", lambda: _describe_rows(rows, documents), fix)
    if subject.model is None:
        yield Finding("prompts", None, "their lengths are not looked at: name --model")
        return
    model, limit = subject.model, subject.prompt_tokens
    fix = "train with a larger --prompt-tokens (doctor takes it too), or write the data anew"
    yield _try("prompts", lambda: _describe_lengths(rows, model, limit), fix)


def _describe_lengths(rows: Path, model: str, tokens: int) -> str:
    """As the training counts them."""
    from cartridge_distill.data.prompt_length import PromptLimit, prompts_of
    from cartridge_distill.model.reading import read_tokenizer

    prompts = prompts_of(rows)
    PromptLimit(read_tokenizer(model), tokens).check(prompts, str(rows), "the longest has")
    return f"none of {len(prompts)} has more than {tokens} tokens"


def _describe_documents(path: Path) -> str:
    from cartridge_distill.data.document_store import DocumentStore

    ids = DocumentStore.from_file(path).ids
    return f"{path}: {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def _describe_rows(path: Path, documents: Path) -> str:
    from cartridge_distill.data.document_store import DocumentStore
    from cartridge_distill.data.general import is_general
    from cartridge_distill.util.errors import ConfigError
    from cartridge_distill.util.parquet import read_rows

    rows = read_rows(path)
    missing = [name for name in ("prompt", "data_source", "extra_info") if name not in rows]
    if missing:
        raise ConfigError(f"{path} lacks the columns {missing}; it has {list(rows.columns)}")
    about = [info or {} for info in rows["extra_info"] if not is_general(info)]
    general = [info for info in rows["extra_info"] if is_general(info)]
    if both := sum(info.get("document_id") is not None for info in general):
        raise ConfigError(f"{path}: {both} rows are labelled general and name a document")
    ids = [info.get("document_id") for info in about]
    without = sum(document is None for document in ids)
    if without:
        raise ConfigError(
            f"{path}: {without} of {len(rows)} rows have no extra_info.document_id; the teacher "
            "would not know what to read"
        )
    known = set(DocumentStore.from_file(documents).ids)
    strange = sorted({str(document) for document in ids if document not in known})
    if strange:
        raise ConfigError(f"{path} names documents that {documents} lacks: {strange[:3]}")
    more = f", and {len(general)} general ones" if general else ""
    return f"{path}: {len(about)} prompts about {len(set(ids))} documents{more}"
