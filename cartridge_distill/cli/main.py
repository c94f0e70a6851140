"""``cartridge-distill``: the commands. Each is a few lines over what the library does.

What takes seconds to import is imported by the command that needs it, so that ``--help`` is there
at once.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cartridge_distill.cartridge.run_folder import resolve_cartridge
from cartridge_distill.cli import files
from cartridge_distill.cli.options import Beginning, Dtype, Model, Overwrite
from cartridge_distill.cli.program import Commands, become, echo, one_form
from cartridge_distill.data.limits import PROMPT_TOKENS
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.extras import require
from cartridge_distill.util.secrecy import clean_text

app = Commands(
    name="cartridge-distill",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Cartridges: a document's worth of context in a small trainable KV cache.

    `distill` goes from a document to a cartridge in one go, and `demo` shows it. `chat`, `serve`,
    `eval`, `report`, `info` and `push` take the folder of a run. `prepare`, `train` and `eval` are
    its steps; `doctor` says what is missing; `convert` is for the tools of others.
    """,
)
# Options that another program reads: they are passed on as they are.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Engine(enum.StrEnum):
    """What computes answers."""

    embedded = "embedded"
    vllm = "vllm"


def _needs(command: str, context: typer.Context) -> None:
    """Are the command's extras installed? Its help is there without them."""
    if not {"-h", "--help"} & set(context.args):
        require(command)


# --- before and while training ------------------------------------------------------------------


@app.command()
def doctor(
    url: Annotated[str | None, typer.Option(help="A rollout server: is it there?")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model.")] = None,
    cartridge: Annotated[str | None, typer.Option(help="Does it fit the model?")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that prepare wrote: are its columns right?")
    ] = None,
    row_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a packed row: does a step fit the GPU?")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the cartridge, for --row-tokens.")] = 2048,
    document_tokens: Annotated[
        int, typer.Option(help="Of the longest document, for --row-tokens.")
    ] = 10_000,
    prompt_tokens: Annotated[
        int, typer.Option(help="Of a prompt at most, as --prompt-tokens of train; with --data.")
    ] = PROMPT_TOKENS,
) -> None:
    """Look at everything a run needs; each line is ok, or says the fix.

    Exit status 1 when something is bad. Example:

    `cartridge-distill doctor --url http://gpu-box:10210 --model MODEL --data data/mine`
    """
    from cartridge_distill.cli.doctor import Subject, examine

    subject = Subject(
        url, model, cartridge, data, row_tokens, tokens, document_tokens, prompt_tokens
    )
    bad = 0
    for finding in examine(subject):
        echo(clean_text(str(finding)))
        bad += finding.good is False
    if bad:
        echo(f"{bad} bad")
        raise typer.Exit(1)


@app.command(context_settings=_PASSED_ON)
@one_form
def prepare(context: typer.Context) -> None:
    """Documents to training files: prompts, documents, questions. `prepare --help` has the options.

    `cartridge-distill prepare --data handbook/ --tokenizer MODEL --out data/handbook`
    """
    _needs("prepare", context)
    from cartridge_distill.data.command import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=_PASSED_ON)
@one_form
def train(context: typer.Context) -> None:
    """Train a cartridge with veRL, described by options or by one file. `train --help` has them.

    `cartridge-distill train --model MODEL --data data/mine --server http://gpu-box:10210`
    """
    _needs("train", context)
    become("verl_patches.launch", context.args)


@app.command(context_settings=_PASSED_ON)
@one_form
def distill(context: typer.Context) -> None:
    """From documents to a cartridge in one go: prepare, serve, train, evaluate, report.

    `cartridge-distill distill handbook/ --model MODEL`
    """
    _needs("distill", context)
    become("verl_patches.distill", context.args)


@app.command(context_settings=_PASSED_ON)
@one_form
def demo(context: typer.Context) -> None:
    """The whole loop on a CPU or one GPU with a small real model: ten minutes, ends in a table."""
    _needs("demo", context)
    become("verl_patches.demo", context.args)


@app.command()
@one_form
def init(
    out: Annotated[Path, typer.Argument(help="Directory of the new cartridge.")],
    model: Model,
    document: Annotated[
        Path | None,
        typer.Option(help="A part of it is the start: text, Markdown, HTML, PDF, a record."),
    ] = None,
    part: Annotated[
        Beginning,
        typer.Option(
            "--from",
            help="The part: its first tokens, spans of 16 evenly over it, or for each head the "
            "tokens that it needs to repeat the document.",
        ),
    ] = Beginning.text,
    tokens: Annotated[int, typer.Option(help="A multiple of 16 for Tokasaurus.")] = 2048,
    frozen: Annotated[int, typer.Option(help="First tokens that are never trained.")] = 1,
    random: Annotated[bool, typer.Option(help="Noise in place of a document.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make an untrained cartridge, from a part of a document or from noise."""
    if random == (document is not None):
        raise ConfigError("nothing says how it begins; fix: give --document FILE, or --random")
    if random and part is not Beginning.text:
        raise ConfigError(f"--from {part} of --random: noise has no parts; fix: give one of them")
    from cartridge_distill.cli.untrained import make

    make(out, model, document, tokens, frozen, seed, overwrite, part.value)
    echo(f"{out}: {tokens} tokens for {model}, {frozen} frozen")


# --- what there is, and what it is worth ----------------------------------------------------------


@app.command()
@one_form
def info(
    cartridge: Annotated[
        str, typer.Argument(help="Run, file, directory or hub id, of any format.")
    ],
    model: Annotated[str | None, typer.Option(help="Does it fit this model?")] = None,
) -> None:
    """Show what a cartridge is: shape, model, document; recipe, curve and figures it has."""
    from cartridge_distill.cartridge.checkpoint import read_cartridge
    from cartridge_distill.cli.describe import described

    config = None
    if model is not None:
        from cartridge_distill.model.reading import read_model_config

        config = read_model_config(model)
    stored = read_cartridge(resolve_cartridge(cartridge), config)
    for table in described(stored):
        Console().print(table)
    if model is not None:
        from cartridge_distill.model.identity import check_same_weights

        told = check_same_weights(stored.meta, cartridge, model)
        echo(f"fits {model}")
        echo(f"warning: {told}" if told else f"it was trained with the weights of {model}")


@app.command(name="eval", context_settings=_PASSED_ON)
@one_form
def evaluate(context: typer.Context) -> None:
    """What is a cartridge worth? Five conditions, with intervals: `eval --help` has the options."""
    _needs("eval", context)
    from cartridge_distill.evaluation.command import main

    raise typer.Exit(main(context.args))


@app.command(context_settings=_PASSED_ON)
def chat(context: typer.Context) -> None:
    """Talk to a cartridge in the terminal: `chat --help` has the options."""
    from cartridge_distill.cli.chat import main

    raise typer.Exit(main(context.args))


@app.command()
@one_form
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs: their metrics.jsonl.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; default, for one run: RUN/report.html.")
    ] = None,
) -> None:
    """Write one HTML file: verdict, table, curves, answers, recipe. It needs no network.

    Several runs lie on the same axes, and seeds of one recipe become a mean with its band:

    `cartridge-distill report runs/off runs/on runs/mixed --out report.html`
    """
    require("report")
    from cartridge_distill.report.page import write_report

    if out is None:
        if len(runs) > 1:
            raise ConfigError("several runs make one report; fix: say where with --out report.html")
        out = runs[0] / "report.html"
    echo(str(write_report(runs, out)))


# --- other tools ----------------------------------------------------------------------------------

files.add_to(app)


@app.command(context_settings={"allow_extra_args": True})
@one_form
def serve(
    context: typer.Context,
    run_folder: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder, or a cartridge.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model (the cartridge's own).")
    ] = None,
    cartridge: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SOURCE; the name is the model to ask for. Repeatable."),
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, the full document, to compare with (the run's). Repeatable."),
    ] = None,
    allow_other_model: Annotated[
        bool, typer.Option(help="Also cartridges of other weights of the same shape.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="0 takes a free one. [default: 10210; 8000 for chat]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the model. [default: float32; vLLM's choice]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="All sampling follows from it.")] = 0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name of this server, as clients write it; * for every name. Repeatable."
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="What computes.")] = Engine.embedded,
    engine_python: Annotated[
        str | None,
        typer.Option(
            help="With vllm: the Python of its environment. Without it, the line that starts vLLM "
            "is printed."
        ),
    ] = None,
) -> None:
    """Serve a run's cartridge: a page to ask it, and OpenAI's API. Or a model, to training.

    `cartridge-distill serve RUN` shows a page at http://127.0.0.1:8000/ that asks without document,
    with the cartridge, and with the full document.

    On a CPU, and to try things, with the embedded server; with `--engine vllm` on an unmodified
    vLLM, in an environment of its own (docs/vllm.md).

    For training, the gateway with the embedded server; what stands after -- goes to the gateway
    (`python -m cartridge_distill.gateway --help`):

    `cartridge-distill serve --model MODEL -- --keep-versions 8`

    Cartridges for any OpenAI client, each as a model of its own (base_url
    http://127.0.0.1:8000/v1, model "anna"):

    `cartridge-distill serve --cartridge anna=runs/demo/cartridge`
    """
    passed_on = list(context.args)
    if run_folder is not None and run_folder.startswith("-"):  # what stands after --
        passed_on, run_folder = [run_folder, *passed_on], None
    from cartridge_distill.cli.serve import ServeOptions, run, run_rollout_server

    options = ServeOptions(
        model,
        tuple(cartridge or ()),
        host,
        port,
        device,
        dtype.value if dtype else None,
        threads,
        seed,
        tuple(allow_host or ()),
        run_folder,
        tuple(document or ()),
        allow_other_model,
    )
    asked = bool(cartridge) or run_folder is not None
    if not asked:
        require("serve")
    if engine is Engine.vllm:
        from cartridge_distill.cli.serve_vllm import serve_vllm

        raise typer.Exit(serve_vllm(options, engine_python, passed_on))
    if engine_python is not None:
        raise ConfigError("--engine-python is vLLM's; fix: give --engine vllm, too")
    if asked:
        if passed_on:
            raise ConfigError(
                f"{' '.join(passed_on)}: only a server for training takes these; fix: leave it out"
            )
        run(options)
    elif document or allow_other_model:
        raise ConfigError(
            "--document and --allow-other-model are for cartridges; fix: name a run, too"
        )
    else:
        raise typer.Exit(run_rollout_server(options, passed_on))


if __name__ == "__main__":
    app()
