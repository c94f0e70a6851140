"""Options that several commands have."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Folder or hub id of the base model.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a cartridge that is there.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Hub id of the base model, where the cartridge does not say it.")
]


class Beginning(enum.StrEnum):
    """Parts of a document that a cartridge may begin as."""

    text = "text"
    spans = "spans"
    attended = "attended"


class Dtype(enum.StrEnum):
    """Number formats of a file."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
