"""Commands about files of cartridges: other formats, joining, and the Hub."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from cartridge_distill.cartridge.run_folder import resolve_cartridge
from cartridge_distill.cli.options import BaseModel, Dtype, Overwrite
from cartridge_distill.cli.program import echo, one_form


class Kind(enum.StrEnum):
    """Formats, as `convert --to` names them."""

    native = "native"
    tokasaurus = "tokasaurus"
    hazyresearch = "hazyresearch"
    peft = "peft"


def add_to(app: typer.Typer) -> None:
    """Makes them commands of the program."""
    for command in (convert, compose, push, pull):
        app.command()(command)


@one_form
def convert(
    source: Annotated[str, typer.Argument(help="Run, file, directory or hub id, of any format.")],
    target: Annotated[Path, typer.Argument(help="Directory; a .pt file for hazyresearch.")],
    to: Annotated[Kind, typer.Option(help="Format to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="As stored by default: every bit.")] = None,
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a cartridge in another format.

    `cartridge-distill convert runs/demo/cartridge adapter --to peft --base-model owner/name`
    """
    import torch

    from cartridge_distill.cartridge import checkpoint
    from cartridge_distill.cartridge.formats.peft import VERSIONS

    written = checkpoint.convert(
        resolve_cartridge(source),
        target,
        to.value,
        base_model=base_model,
        dtype=getattr(torch, dtype.value) if dtype else None,
        overwrite=overwrite,
    )
    echo(f"{written}: {to.value}")
    if to is Kind.peft:
        echo(VERSIONS)


@one_form
def compose(
    out: Annotated[Path, typer.Argument(help="Directory of the joined cartridge.")],
    parts: Annotated[list[str], typer.Argument(help="Two or more cartridges, in this order.")],
    base_model: BaseModel = None,
    overwrite: Overwrite = False,
) -> None:
    """Join cartridges into one, as Tokasaurus joins a list of ids."""
    from cartridge_distill.cartridge.checkpoint import read_cartridge, write_cartridge
    from cartridge_distill.cartridge.compose import compose as join

    joined = join([read_cartridge(resolve_cartridge(part)) for part in parts], base_model)
    write_cartridge(joined, out, "native", overwrite)
    echo(f"{out}: {joined.snapshot.num_tokens} tokens of {len(parts)} cartridges")


@one_form
def push(
    source: Annotated[str, typer.Argument(help="Run, file or directory, of any format.")],
    target: Annotated[str, typer.Argument(help="Hub id owner/name, or a directory (./name).")],
    base_model: BaseModel = None,
    public: Annotated[bool, typer.Option(help="A cartridge tells what its document says.")] = False,
    branch: Annotated[str | None, typer.Option(help="Of the repository.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Put a cartridge on the Hub with a model card, in every format that others read.

    The token is the Hub's own (`hf auth login`, or HF_TOKEN).
    """
    from cartridge_distill.cartridge.hub import push as send

    where = send(
        resolve_cartridge(source),
        target,
        base_model=base_model,
        private=not public,
        branch=branch,
        overwrite=overwrite,
    )
    echo(where)


@one_form
def pull(
    source: Annotated[str, typer.Argument(help="Hub id owner/name, or owner/name@commit.")],
    target: Annotated[Path | None, typer.Argument(help="Directory; default: the cache.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Get a cartridge from the Hub, and make sure that it can be read safely."""
    from cartridge_distill.cartridge.hub import pull as get

    echo(str(get(source, target, overwrite=overwrite)))
