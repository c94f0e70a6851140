"""Cartridges on the Hugging Face Hub, or in a directory that looks like a repository of it.

A pushed repository holds the cartridge in several formats at once, so that each tool reads it as it
is: this one, ``PeftModel.from_pretrained(base, "owner/name")``, and a Tokasaurus server with
``{"id": "owner/name", "source": "huggingface"}``. A generated model card says how.

What comes from the Hub is only ever read with the readers of
:mod:`cartridge_distill.cartridge.formats`, and only the files of one format are fetched. The token
is the one huggingface_hub finds by itself (``HF_TOKEN``, or ``hf auth login``); it does not pass
through here. A redirect to another server never gets it, and what is sent is never sent on to
another server; files that the Hub keeps elsewhere are fetched from there, without the token.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, get_session, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from cartridge_distill.cartridge.formats import native, peft, tokasaurus
from cartridge_distill.cartridge.formats.detect import (
    Format,
    check_replaceable,
    find,
    locate,
    read_local,
    write_local,
)
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.hub_id import is_hub_id
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.cartridge.model_card import CARD_FILE, card
from cartridge_distill.util.errors import (
    CartridgeDistillError,
    CartridgeFormatError,
    ConfigError,
    HubError,
    with_fix,
)
from cartridge_distill.util.files import replace_directory

_KNOWN_FILES = (*native.FILES, *peft.FILES, *tokasaurus.FILES)
PUSHED: tuple[Format, ...] = ("native", "peft", "tokasaurus")
"""The formats a repository can hold side by side; a second ``.pt`` would be ambiguous."""


def push(
    source: str | Path,
    target: str | Path,
    *,
    formats: Sequence[Format] | None = None,
    base_model: str | None = None,
    private: bool = True,
    branch: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
) -> str:
    """Puts a cartridge, in several formats and with a model card, on the Hub or in a directory.

    Args:
        source: a file or directory of any format.
        target: a hub id ``owner/name``, made when it is not there; or a directory, given as an
            absolute path or with ``./`` before it.
        formats: of :data:`PUSHED`; by default all that can hold it (Tokasaurus needs a multiple of
            16 tokens).
        base_model: hub id of the base model, where the cartridge names a folder of this machine.
        private: of a new repository. The default, because a cartridge holds what its document says.
        branch: of the repository; its main one by default.
        message: of the commit.
        overwrite: replace a directory that holds a cartridge. (On the Hub a push is a commit, and
            what was there remains in the history.)

    Returns:
        The commit's address, or the directory.

    Raises:
        CartridgeFormatError: the source cannot be read, or a format cannot hold it.
        ConfigError: formats that cannot be pushed, or a base model that nobody else can find.
        FileExistsError: the directory is there and ``overwrite`` is false.
        HubError: the Hub does not take it.
    """
    cartridge = _portable(read_local(Path(source).expanduser()).for_model(base_model))
    chosen = _chosen(formats, cartridge)
    if isinstance(target, Path) or not is_hub_id(target) or Path(target).is_dir():
        if branch is not None:
            raise ConfigError(
                f"branch={branch!r} is for the Hub, and {target} is a directory; fix: leave it out"
            )
        directory = Path(target).expanduser()
        if overwrite:
            check_replaceable(directory)
        replace_directory(
            directory, lambda scratch: _fill(scratch, cartridge, chosen, str(directory)), overwrite
        )
        return str(directory)
    if _is_folder(cartridge.base_model()):
        raise ConfigError(
            f"the cartridge is for {cartridge.base_model()}, a folder of this machine; fix: name "
            "the model as others find it, with base_model=owner/name"
        )
    if "@" in target:
        raise ConfigError(
            f"{target}: a push makes a new revision; fix: choose the branch with branch=, and name "
            "owner/name alone"
        )
    with tempfile.TemporaryDirectory() as scratch, _hub_errors("push to", target):
        _fill(Path(scratch), cartridge, chosen, target)
        api = HfApi()
        api.create_repo(target, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(target, branch=branch, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=target,
            folder_path=scratch,
            revision=branch,
            commit_message=message or f"Cartridge, step {cartridge.meta.step}",
            # A format that is no longer pushed must not stay behind with old weights.
            delete_patterns=list(_KNOWN_FILES),
        )
        return str(commit.commit_url)


def pull(
    source: str | Path,
    target: str | Path | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Gets a cartridge from the Hub, or from a directory, and makes sure that it can be read.

    Args:
        source: a hub id ``owner/name``, ``@revision`` after it or not; or a directory.
        target: where to put it; by default the Hub's cache, or the directory itself.
        revision: branch, tag or commit. Only a commit stands for one content for ever.
        overwrite: replace a target that holds a cartridge.

    Returns:
        The directory with the files of one format, the best of those that are there.

    Raises:
        CartridgeFormatError: no cartridge is there, or none that can be read safely.
        ConfigError: a revision of a directory, or two revisions.
        FileExistsError: the target is there and ``overwrite`` is false.
        HubError: the Hub does not give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for the Hub, and {source} is a directory; fix: leave it "
                "out"
            )
    elif is_hub_id(str(source)):
        name, _, pinned = str(source).partition("@")
        if pinned and revision is not None:
            raise ConfigError(
                f"two revisions, {pinned!r} in {source} and {revision!r}; fix: give one"
            )
        path = _download(name, pinned or revision)
    else:
        raise CartridgeFormatError(
            f"{source} is no directory and no hub id (owner/name); fix: name either"
        )
    read_local(path)
    if target is None:
        return path
    directory = Path(target).expanduser()
    if overwrite:
        check_replaceable(directory)
    replace_directory(directory, lambda scratch: _copy(path, scratch), overwrite)
    return directory


def _download(repo: str, revision: str | None) -> Path:
    """The files of the best format, in the Hub's cache."""
    with _hub_errors("pull", repo):
        try:
            names = HfApi().list_repo_files(repo, revision=revision)
        except OfflineModeIsEnabled:
            try:
                return Path(snapshot_download(repo, revision=revision, local_files_only=True))
            except LocalEntryNotFoundError as error:
                raise HubError(
                    f"{repo} is not in the cache, and HF_HUB_OFFLINE is set; fix: unset it, or "
                    "name a folder"
                ) from error
        try:
            found = find(names)
        except CartridgeFormatError as error:
            raise CartridgeFormatError(
                with_fix(f"{repo}: {error}", "name another revision")
            ) from None
        if found is None:
            raise CartridgeFormatError(
                f"{repo} holds no cartridge (it has {sorted(names)[:8]}); fix: name another "
                "repository or revision"
            )
        wanted = [*found[1], CARD_FILE]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


@contextmanager
def _hub_errors(what: str, repo: str) -> Iterator[None]:
    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {**hooks, "response": [*hooks["response"], _keep_what_is_sent]}
    try:
        yield
    except CartridgeDistillError:
        raise
    except Exception as error:  # what is no Hub may answer anything
        # The Hub's own messages name the fix (log in, ask for access).
        said = str(error) if isinstance(error, (httpx.HTTPError, OSError, ValueError)) else ""
        said = said or f"the answer is none of the Hub's ({type(error).__name__}: {error})"
        raise HubError(f"cannot {what} {repo}: {said}") from error
    finally:
        session.event_hooks = hooks


def _keep_what_is_sent(answer: httpx.Response) -> None:
    """A request with a body goes to the server that was asked, and nowhere else."""
    if answer.request.method in ("GET", "HEAD") or not answer.has_redirect_location:
        return
    here = answer.request.url
    there = here.join(answer.headers["Location"])
    if (there.scheme, there.host, there.port) != (here.scheme, here.host, here.port):
        raise HubError(
            f"{here.host} answered {answer.request.method} with a redirect (HTTP "
            f"{answer.status_code}) to {there.scheme}://{there.host}, another host, port or "
            "scheme; what is pushed is not sent there; fix: look at HF_ENDPOINT"
        )


def _chosen(formats: Sequence[Format] | None, cartridge: StoredCartridge) -> tuple[Format, ...]:
    if formats is None:
        pages = cartridge.snapshot.num_tokens % PAGE_TOKENS == 0
        return tuple(name for name in PUSHED if pages or name != "tokasaurus")
    strange = [name for name in formats if name not in PUSHED]
    if strange or not formats:
        raise ConfigError(
            f"formats={list(formats)}: a repository holds others; fix: choose some of "
            f"{list(PUSHED)}"
        )
    return tuple(name for name in PUSHED if name in formats)


def _fill(
    directory: Path, cartridge: StoredCartridge, formats: Sequence[Format], target: str
) -> None:
    """All files of a repository."""
    for name in formats:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            write_local(cartridge, Path(scratch) / name, name)
            for file in (Path(scratch) / name).iterdir():
                file.replace(directory / file.name)
    (directory / CARD_FILE).write_text(card(cartridge, formats, target), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    """The files that :func:`find` knows, and the card; nothing else that lies there."""
    format, _ = locate(source)
    names = sorted(file.name for file in source.iterdir() if file.is_file())
    found = find(names)
    assert found is not None, format
    for name in (*found[1], *(name for name in names if name == CARD_FILE)):
        shutil.copyfile(source / name, target / name)


def _portable(cartridge: StoredCartridge) -> StoredCartridge:
    """Without the settings that are paths of this machine, which are of no use elsewhere, and
    without credentials, whoever wrote them there."""
    clean = cartridge.meta.cleaned()
    recipe = {
        name: value
        for name, value in clean.recipe.items()
        if not (isinstance(value, str) and _is_folder(value))
    }
    return replace(cartridge, meta=replace(clean, recipe=recipe))


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or (not is_hub_id(name) and "/" in name)
