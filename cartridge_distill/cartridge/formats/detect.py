"""Which format a path or a list of file names is, and reading and writing by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from cartridge_distill.cartridge.formats import hazyresearch, native, peft, tokasaurus
from cartridge_distill.cartridge.formats.stored_cartridge import StoredCartridge
from cartridge_distill.cartridge.model_card import CARD_FILE, is_written_here
from cartridge_distill.util.errors import CartridgeFormatError, with_fix

Format = Literal["native", "hazyresearch", "tokasaurus", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ANOTHER_COPY = "take another copy of it, or save it anew with what wrote it"

# Best first: a repository may hold several, and ours says most.
_DIRECTORIES: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("native", native.FILES),
    ("peft", peft.FILES),
    ("tokasaurus", tokasaurus.FILES),
)
_WRITTEN = {*native.FILES, *peft.FILES, *tokasaurus.FILES, CARD_FILE}
_UPSTREAM_NAME = re.compile(r"cache-(?:step|epoch)(\d+)\.pt")


def find(names: Iterable[str]) -> tuple[Format, tuple[str, ...]] | None:
    """The format of a directory that has these files, and those of them that belong to it.

    Of several ``cache-step<n>.pt``, as upstream's training leaves them, the one with the largest
    n is meant.

    Returns:
        None where there is no cartridge.

    Raises:
        CartridgeFormatError: several ``.pt`` files with other names.
    """
    there = {name for name in names if "/" not in name}
    # One file is enough to know it: the format's reader then says what is missing.
    for format, files in _DIRECTORIES:
        if files[0] in there:
            return format, tuple(name for name in files if name in there)
    if peft.ADAPTER_CONFIG in there:
        return "peft", (peft.ADAPTER_CONFIG,)
    pickles = sorted(name for name in there if name.endswith(".pt"))
    if not pickles:
        return None
    numbered = [
        (int(match[1]), match[0]) for match in map(_UPSTREAM_NAME.fullmatch, pickles) if match
    ]
    if len(pickles) > 1 and len(numbered) < len(pickles):
        raise CartridgeFormatError(f"several .pt files, {', '.join(pickles)}; fix: name the one")
    newest = max(numbered)[1] if numbered else pickles[0]
    config = (tokasaurus.TOKASAURUS_CONFIG,) if tokasaurus.TOKASAURUS_CONFIG in there else ()
    return "hazyresearch", (newest, *config)


def locate(path: Path) -> tuple[Format, Path]:
    """The format of a file or directory, and what its reader takes.

    Raises:
        CartridgeFormatError: there is no cartridge.
    """
    if path.is_file():
        for format, files in _DIRECTORIES:
            if path.name == files[0] and format != "tokasaurus":
                return format, path.parent
        return "hazyresearch", path
    if not path.is_dir():
        raise CartridgeFormatError(
            f"{path} is no file and no directory; fix: name the one of a cartridge"
        )
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    try:
        found = find(names)
    except CartridgeFormatError as error:
        raise CartridgeFormatError(f"{path}: {error}") from None
    if found is None:
        raise CartridgeFormatError(
            f"{path} holds no cartridge: neither {native.WEIGHTS_FILE} nor "
            f"{peft.ADAPTER_WEIGHTS} nor a .pt file (it has {', '.join(names[:8]) or 'no files'}); "
            "fix: name the folder that does"
        )
    format, files = found
    return format, path / files[0] if format == "hazyresearch" else path


def read_local(path: Path) -> StoredCartridge:
    """Reads a file or a directory of any format.

    Raises:
        CartridgeFormatError: it cannot be read, with the reason.
    """
    format, place = locate(path)
    try:
        return _read(path, format, place)
    except CartridgeFormatError as error:
        raise CartridgeFormatError(with_fix(error, _ANOTHER_COPY)) from error


def _read(path: Path, format: Format, place: Path) -> StoredCartridge:
    if format == "native":
        return native.read(place)
    if format == "peft":
        return peft.read(place)
    if format == "tokasaurus":
        return tokasaurus.read(place)
    cartridge = hazyresearch.read(place)
    config = place.parent / tokasaurus.TOKASAURUS_CONFIG
    if path.is_dir() and config.is_file():  # upstream's training leaves it beside the file
        cartridge = cartridge.for_model(tokasaurus.base_model_of(tokasaurus.read_config(config)))
    return cartridge


def write_local(
    cartridge: StoredCartridge, target: Path, format: Format, overwrite: bool = False
) -> None:
    """Writes a file or a directory in one format.

    Raises:
        CartridgeFormatError: the format cannot hold it, there is no such format, or what is to be
            replaced is no cartridge.
        FileExistsError: the target is there and ``overwrite`` is false.
    """
    writers = {
        "native": native.write,
        "hazyresearch": hazyresearch.write,
        "tokasaurus": tokasaurus.write,
        "peft": peft.write,
    }
    if format not in writers:
        raise CartridgeFormatError(f"no format {format!r}; fix: choose one of {', '.join(FORMATS)}")
    if overwrite:
        check_replaceable(target)
    writers[format](cartridge, target, overwrite)


def check_replaceable(target: Path) -> None:
    """A mistyped target must not cost anybody a file that no command here wrote.

    Raises:
        CartridgeFormatError: the file is no cartridge, or the directory holds other things than
            one. A model card counts as such a thing when somebody has written in it.
    """
    if target.is_symlink():
        raise CartridgeFormatError(
            f"{target} is a link, and is not replaced; fix: name what it leads to"
        )
    if target.is_file():
        try:
            hazyresearch.check_keys(target)
        except CartridgeFormatError as error:
            raise CartridgeFormatError(
                with_fix(f"{target} is not replaced: {error}", "name another target")
            ) from None
    if not target.is_dir() or not any(target.iterdir()):
        return
    if any(entry.is_dir() for entry in target.iterdir()):
        raise CartridgeFormatError(
            f"{target} has folders in it, and is not replaced; fix: name another target"
        )
    locate(target)
    strange = sorted(entry.name for entry in target.iterdir() if entry.name not in _WRITTEN)
    if strange:
        raise CartridgeFormatError(
            f"{target} holds more than a cartridge: {', '.join(strange[:4])}; it is not replaced; "
            "fix: move that away, or name another target"
        )
    card = target / CARD_FILE
    if card.is_file() and not is_written_here(card.read_text(encoding="utf-8", errors="replace")):
        raise CartridgeFormatError(
            f"{card} is not as it was written here: somebody has changed it. {target} is not "
            "replaced; fix: move the card away, or name another target"
        )
