"""Documents to veRL's training files: prompts, documents, and what is kept aside for evaluation.

Reads LongHealth's JSON schema (its `benchmark_v5.json`, or the fictional records of this package,
`data/examples/`), or any .txt, .md, .rst, .html and .pdf files, and writes into one folder:

    train.parquet     the prompts to train on, in veRL's schema; each names its document by id
    val.parquet       prompts of the same kind, kept aside
    documents.jsonl   what the teacher reads, each document once
    eval.json         multiple-choice questions, none of which is trained on: the records' own,
                      those of --questions, or those that the model writes

Recipes, that is, where the prompts come from:

    started      the user asks about a section, and the answer has already begun with a true
                 sentence of the document, cut at a token. This is what teaches a small model
    open         questions about the sections, from a list of wordings
    mixed        one of each in turn
    self_study   the model writes questions and tasks of five kinds itself, with a chunk of the
                 document before it; needs a server, and goes on where it was interrupted

A document longer than the teacher's context is cut on its structure into parts, and every prompt
names the part it came from. docs/data.md has the schema and the rules.
"""

# Only the command line is here; the work is in `prepare`, whose imports take seconds, and --help
# and a wrong option need none of them.

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cartridge_distill.data.limits import PROMPT_TOKENS, RESPONSE_TOKENS
from cartridge_distill.util.clean_logs import hide_secrets_in_logs
from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.next_command import next_command, say_next
from cartridge_distill.util.shown_text import printable
from cartridge_distill.util.standard_output import guard_output

PROGRAM = "cartridge-distill prepare"
EXAMPLE_RECORDS = Path(__file__).parent / "examples"
DEFAULT_DATA = EXAMPLE_RECORDS / "demo.json"
EXAMPLES = """\
examples:
  the demo's record, started answers:
    PROGRAM --tokenizer MODEL_DIR --out data/demo
  a folder of your own; MODEL is the model that will be trained:
    PROGRAM --data handbook/ --tokenizer MODEL --out data/handbook
  the same, judged by your own questions:
    PROGRAM --data handbook/ --questions questions.csv --tokenizer MODEL --out data/handbook
  the same, with prompts that the model writes itself:
    cartridge-distill serve --model MODEL &
    PROGRAM --data handbook/ --tokenizer MODEL --out data/handbook \\
        --recipe self_study --server http://127.0.0.1:10210 --rows 1024
  the same documents, which have changed since runs/handbook was trained on them:
    PROGRAM --data handbook/ --rebuild runs/handbook --tokenizer MODEL --out data/handbook-2
  two patients of LongHealth:
    PROGRAM --data longhealth --patients patient_01 patient_02 \\
        --recipe mixed --rows 8192 --tokenizer meta-llama/Llama-3.2-3B-Instruct --out data/two
"""


def parse(arguments: list[str] | None = None, program: str = PROGRAM) -> argparse.Namespace:
    """The command's options."""
    parser = Parser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES.replace("PROGRAM", program),
    )
    option = parser.add_argument
    option(
        "--data",
        default=str(DEFAULT_DATA),
        help="records: a JSON file, its URL, or `longhealth`; or documents: a folder (all below it "
        "that is .txt, .md, .rst, .html or .pdf) or one file (default: the demo's record)",
    )
    option("--tokenizer", required=True, help="folder or hub id of the model to be trained")
    option("--out", type=Path, required=True, help="folder to write to")
    option(
        "--overwrite",
        action="store_true",
        help="replace what was prepared there from other documents",
    )
    option("--patients", nargs="+", metavar="ID", help="which patients or documents (default: all)")
    option(
        "--skip-unreadable",
        action="store_true",
        help="leave files out that cannot be read, instead of stopping; each is named",
    )
    option(
        "--recipe",
        dest="prompt_recipe",
        choices=("started", "open", "mixed", "self_study"),
        default="started",
        help="where the prompts come from, see above (%(default)s)",
    )
    option(
        "--rebuild",
        type=Path,
        metavar="FROM",
        help="the documents have changed since the run FROM was trained (or the data folder FROM "
        "was prepared): half of the prompts are about the sections that changed",
    )
    option("--rows", type=int, default=1920, help="training prompts to write (%(default)s)")
    option(
        "--val-rows",
        type=int,
        help="prompts kept aside, of the prompt recipes other than self_study (16)",
    )
    option("--seed", type=int, default=0, help="same seed, same files (%(default)s)")

    group = parser.add_argument_group("questions that the cartridge is judged by")
    group.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="your own: .csv, .json or .jsonl with `question`, `answer`, and where you have them "
        "`wrong` answers, the `document`, and a `stem` (docs/data.md)",
    )
    group.add_argument(
        "--write-questions",
        type=int,
        default=0,
        metavar="N",
        help="have the server's model write and answer so many, and keep those whose answer stands "
        "in the document and is not known without it; needs --server",
    )

    group = parser.add_argument_group("rows that have nothing to do with a document")
    group.add_argument(
        "--general-fraction",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="of the training rows, added to --rows: their teacher is the bare model, so that the "
        "cartridge leaves unrelated prompts alone; 0.05 is usual (%(default)s)",
    )
    group.add_argument(
        "--general-prompts",
        type=Path,
        metavar="FILE",
        help="what they ask: .txt with a prompt a line, or .jsonl with a prompt key (default: the "
        "128 prompts of this package)",
    )

    group = parser.add_argument_group("how much the teacher reads at once")
    group.add_argument(
        "--teacher-context",
        type=int,
        metavar="TOKENS",
        help="of a document at most; a longer one is cut into parts (default: the model's "
        "max_position_embeddings less the two below)",
    )
    group.add_argument(
        "--prompt-tokens",
        type=int,
        default=PROMPT_TOKENS,
        help="of a prompt at most, --prompt-tokens of the training; longer ones are left out "
        "(%(default)s)",
    )
    group.add_argument(
        "--response-tokens",
        type=int,
        default=RESPONSE_TOKENS,
        help="of an answer at most, --response-tokens of the training (%(default)s)",
    )

    group = parser.add_argument_group("what the model writes: self_study, --write-questions")
    option = group.add_argument
    option("--server", metavar="URL", help="that serves the base model; needed for these")
    option("--wait", type=float, default=60, help="seconds to wait for it (%(default)s)")
    option(
        "--held-out",
        type=float,
        metavar="FRACTION",
        help="of the prompts, kept aside in val.parquet (0.1)",
    )
    option(
        "--chunk-tokens",
        type=int,
        default=1024,
        help="of the document, before the model when it writes (%(default)s)",
    )
    option(
        "--openings",
        action="store_true",
        help="begin each prompt with words that fit its kind (What, List, Write a poem about, "
        "...): for a model too small to follow the request alone",
    )
    option("--write-tokens", type=int, default=128, help="longest generation (%(default)s)")
    option("--temperature", type=float, default=0.8, help="of the writing (%(default)s)")
    option(
        "--attempts",
        type=int,
        default=4,
        help="generations for each one wanted, at most: bad ones are dropped (%(default)s)",
    )
    option("--concurrency", type=int, default=32, help="requests in flight (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments, program)
    hide_secrets_in_logs()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # "waiting for the server ..."
    try:
        from cartridge_distill.data.prepare import run

        run(options)
    except (CartridgeDistillError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what was written", file=sys.stderr)
        return 130
    import torch  # the command has it already

    gpu = torch.cuda.is_available()
    model = ("--model", options.tokenizer)
    serve = next_command("serve", *model, *(("--device", "cuda", "--dtype", "bfloat16") * gpu))
    train = [*model, "--data", options.out, "--server", "http://127.0.0.1:10210"]
    for name, usual in (("prompt_tokens", PROMPT_TOKENS), ("response_tokens", RESPONSE_TOKENS)):
        if (value := getattr(options, name)) != usual:
            train += [f"--{name.replace('_', '-')}", value]
    say_next(
        f"{serve}    # the rollout server, in another terminal",
        next_command("train", *train, *(("--device", "cpu") * (not gpu))),
    )
    return 0


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
