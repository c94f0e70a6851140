"""What a gateway tells of one version, and why it refuses one."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cartridge_distill.rollout.protocol import sanitise_cartridge_id
from cartridge_distill.sync.upload import UploadHeader
from cartridge_distill.util.errors import CartridgeDistillError, CartridgeFormatError
from cartridge_distill.util.sealed import BrokenSeal, sealed, unsealed
from cartridge_distill.util.strict_json import BadJson, loads

VERSION_FILE = "version.json"


class NoRoom(CartridgeDistillError):
    """The disk bound does not allow another version. Becomes HTTP 507."""


class Conflict(CartridgeDistillError):
    """An id stands for something else, or is in use. Becomes HTTP 409."""


class Unknown(CartridgeDistillError):
    """An id that is not there. Becomes HTTP 404."""


class VersionInfo(BaseModel):
    """One version, as ``GET /cartridges/{id}`` tells it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    created_at: float
    num_bytes: int
    header: UploadHeader


def write_info(info: VersionInfo, folder: Path) -> None:
    """Writes ``version.json`` beside a version's files.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(sealed(info.model_dump(mode="json")), indent=2)
    (folder / VERSION_FILE).write_text(text + "\n")


def read_info(folder: Path) -> VersionInfo:
    """Reads ``version.json``.

    Raises:
        FileNotFoundError: there is none: no gateway put the folder there.
        OSError: it cannot be read.
        CartridgeFormatError: it is not as a gateway wrote it.
    """
    try:
        entries = loads((folder / VERSION_FILE).read_bytes())
        if not isinstance(entries, dict):
            raise BadJson(f"it is a {type(entries).__name__}")
        info = VersionInfo.model_validate(unsealed(entries))
        folder_name = sanitise_cartridge_id(info.id)
    except ValidationError as error:
        found = error.errors(include_input=False)[0]  # in words, without the value
        place = ".".join(map(str, found["loc"]))
        raise CartridgeFormatError(f"{VERSION_FILE}: {place}: {found['msg']}") from error
    except (BadJson, BrokenSeal, ValueError) as error:
        raise CartridgeFormatError(f"{VERSION_FILE}: {error}") from None
    if folder_name != folder.name or info.num_bytes != info.header.data_bytes:
        raise CartridgeFormatError(f"{VERSION_FILE} is of another version, {info.id!r}")
    return info
