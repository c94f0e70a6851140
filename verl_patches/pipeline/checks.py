"""What is looked at before a distillation starts: nothing is written here.

The cheap things come first, so that a mistyped path is known at once: paths and numbers, then veRL
and the server, then what needs torch. The settings of the training as a whole are looked at when
the data are there, as :mod:`verl_patches.launching.checks` does it for every run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import check_writable
from cartridge_distill.util.next_command import shorter
from cartridge_distill.util.processes import say
from verl_patches.launching import checks
from verl_patches.launching.command import model_path
from verl_patches.launching.configured import configuration
from verl_patches.launching.result import check_place
from verl_patches.launching.resuming import check_saved
from verl_patches.pipeline.settings import Distillation, Prepared, as_run

_HEADS_UP = 50_000_000
_SURELY_ENOUGH = 16  # bytes a token: a file of so many is not looked into before the data stage
_TEMPLATE_TOKENS = 256  # that a chat template may put around a document
# Checkpoints (three times the cartridge each): three newest, the best, and one being written. The
# versions that are served, and RUN/cartridge.
_CARTRIDGES_ON_DISK = 3 * 5 + 5


def check_documents(documents: str) -> None:
    """Is there anything of that name, of a kind that is read? What is in it, reading tells.

    Raises:
        ConfigError: there is not.
        DocumentError: it is of another kind.
    """
    if documents == "longhealth" or documents.startswith(("http://", "https://")):
        return
    path = Path(documents).expanduser()
    if path.exists():
        if path.suffix.lower() != ".json":  # records
            from cartridge_distill.data.documents.reading import check_kind  # --help needs none

            check_kind(path)
        return
    near = checks.near_names(path)
    raise ConfigError(
        f"{documents}: there is no such file or folder; fix: "
        + (f"did you mean {' or '.join(near)}?" if near else "name a file or folder of documents")
    )


def check_questions(questions: str) -> None:
    """Is there a file of questions, and is each entry what it must be?

    Raises:
        ConfigError: it is not; its document is looked for when the documents are read.
    """
    path = Path(questions).expanduser()
    if not path.is_file():
        near = checks.near_names(path)
        raise ConfigError(
            f"--questions {questions}: there is no such file; fix: "
            + (f"did you mean {' or '.join(near)}?" if near else "name another, or none")
        )
    from cartridge_distill.data.questions.reading import check_file  # --help needs no reader

    check_file(path)


def check_first(settings: Distillation) -> None:
    """All that is known within a second, and then veRL and the server.

    Raises:
        ConfigError, NotReady: with the fix.
    """
    check_writable(settings.out, "--out")
    check_place(settings.out)
    checks.check_model_name(settings.model)
    check_length(settings)
    run = as_run(settings, settings.server or "http://127.0.0.1")
    checks.check_loggers(run)
    checks.check_verl()
    configuration(run)  # a mistyped setting of veRL's
    if settings.server is not None:
        try:
            checks.look_at_servers(run)
        except checks.NotReady as error:
            raise checks.NotReady(
                f"{error}; or leave --server out, and one is started here"
            ) from None


def check_length(settings: Distillation) -> None:
    """Is a document clearly shorter than the cartridge that is to begin as a part of it?

    Needs no torch: transformers' tokenizers do, for seconds. Says nothing where it cannot be sure
    (a model without ``tokenizer.json`` here, records from the network, a large file, a few tokens
    more or less); the data stage counts every token.

    Raises:
        ConfigError: all of them are.
        DocumentError: one cannot be read.
    """
    vocabulary = Path(model_path(settings.model)) / "tokenizer.json"
    place = Path(settings.documents).expanduser()
    if settings.begins_elsewhere or settings.init_document or not vocabulary.is_file():
        return
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    if not files or any(file.stat().st_size > _SURELY_ENOUGH * settings.tokens for file in files):
        return
    from tokenizers import Tokenizer

    from cartridge_distill.data.documents.source import load_sources

    count = Tokenizer.from_file(str(vocabulary))
    texts = [source.text for source in load_sources(str(place), lambda line: None)]
    longest = max(len(count.encode(text, add_special_tokens=False).ids) for text in texts)
    if longest + _TEMPLATE_TOKENS < settings.tokens:
        raise shorter_than_the_cartridge(settings, longest, "the text of the longest")


def shorter_than_the_cartridge(
    settings: Distillation, longest: int, what: str = "the longest"
) -> ConfigError:
    """The refusal of a cartridge that no document is long enough for.

    Args:
        longest: tokens of the longest document.
        what: was counted: the document as it is rendered, or its text alone.
    """
    fewer = longest // PAGE_TOKENS * PAGE_TOKENS
    fix = f"give --tokens {fewer} or fewer, or a longer document" if fewer else "give a longer one"
    return ConfigError(
        f"--tokens {settings.tokens}: the cartridge begins as a part of a document, and "
        f"{what} has {longest}; fix: {fix}"
    )


def check_model(settings: Distillation) -> Any:
    """The model's config: can a cartridge of this size be trained on it?

    Returns:
        The transformers config.

    Raises:
        ConfigError: the model, or its tokenizer, cannot be read or used.
    """
    from cartridge_distill.model.loading import check_supported
    from cartridge_distill.model.reading import read_model_config, read_tokenizer

    config = read_model_config(settings.model)
    check_supported(config)
    read_tokenizer(settings.model)
    if settings.rebuild is not None:
        check_rebuilt(settings, config)
    checks.check_device(as_run(settings))
    return config


def look_at_model(settings: Distillation) -> int:
    """Can a cartridge be trained on the model, and is there room for the run?

    Returns:
        The bytes that it takes at most, about.

    Raises:
        ConfigError: the model cannot be used, or there is no room.
    """
    return check_disk(settings, check_model(settings))


def check_rebuilt(settings: Distillation, config: Any) -> None:
    """Can the run begin with the cartridge of --rebuild?

    Raises:
        CartridgeFormatError: the run has no cartridge, or one that does not fit the model.
        ConfigError: it has another number of tokens.
    """
    from cartridge_distill.cartridge.checkpoint import read_cartridge

    tokens = read_cartridge(settings.rebuilt_cartridge, config).snapshot.num_tokens
    if tokens != settings.tokens:
        raise ConfigError(
            f"--rebuild {settings.rebuild}: its cartridge has {tokens} tokens, and --tokens is "
            f"{settings.tokens}; fix: give --tokens {tokens}"
        )


def cartridge_bytes(config: Any, tokens: int) -> int:
    """Of a cartridge in float32, as it is trained and saved."""
    from cartridge_distill.cartridge.kv_shape import KvShape

    shape = KvShape.of(config)
    heads, sizes = shape.kv_heads, shape.head_dim
    layers = shape.num_layers
    each = [heads] * layers if isinstance(heads, int) else list(heads)
    wide = [sizes] * layers if isinstance(sizes, int) else list(sizes)
    return 2 * 4 * tokens * sum(h * d for h, d in zip(each, wide, strict=True))


def disk_bytes(config: Any, tokens: int) -> int:
    """What a run takes on the disk at most, about."""
    return _CARTRIDGES_ON_DISK * cartridge_bytes(config, tokens) + _HEADS_UP


def check_disk(settings: Distillation, config: Any) -> int:
    """Is there room for the run?

    Returns:
        The bytes that it takes at most, about.

    Raises:
        ConfigError: there is not.
    """
    needed = disk_bytes(config, settings.tokens)
    there = settings.out
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ConfigError(
            f"--out {shorter(settings.out)}: the run takes up to {needed / 1e6:.0f} MB, and "
            f"{free / 1e6:.0f} MB are free there; fix: make room, or give another --out"
        )
    return needed


def check_prepared(settings: Distillation, data: Path, found: Prepared) -> None:
    """The whole run, with its data lying in ``data``: settings, rows against steps, prompts.

    Raises:
        ConfigError, NotReady: with the fix.
    """
    run = as_run(settings, settings.server or "http://127.0.0.1", found)
    checks.check_here(replace(run, data=data))
    check_saved(run)
    if found.questions == 0 and settings.test_every:
        say("   warning: the documents came without questions; --test-every has nothing to ask")
