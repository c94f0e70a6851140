"""What an untrained cartridge is worth, by what it begins as: no step is taken.

    python benchmarks/beginnings.py --documents demo-record lzma-file-format --tokens 128

The documents are the study's (training/study/texts) with their questions. Each line is a cartridge
as training would begin with it; between them stand what can be had without one, and the full
document. CPU-seconds are those that the beginning takes, the reading of the document among them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.arguments import require_multiple  # noqa: E402
from cartridge_distill.cartridge.beginnings import BEGINNINGS  # noqa: E402
from cartridge_distill.util.processes import say  # noqa: E402

METRICS = ("kl", "log_loss", "accuracy")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--model", default="smollm2-135m-instruct", help="as in a study's grid (%(default)s)")
    option("--documents", nargs="+", default=["demo-record"], metavar="NAME", help="(%(default)s)")
    option("--tokens", nargs="+", type=int, default=[128], metavar="N", help="of the cartridge")
    option("--init", nargs="+", choices=BEGINNINGS, default=list(BEGINNINGS), help="(all)")
    option("--limit", type=int, help="questions of each document (all)")
    option("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    options = parser.parse_args(arguments)
    for number in options.tokens:
        require_multiple(parser, argparse.Namespace(tokens=number), tokens=16)

    import torch

    from cartridge_distill.model.loading import load_model
    from cartridge_distill.model.reading import read_tokenizer
    from training.study.documents import all_documents, prepare_data
    from training.study.grid import Grid
    from training.study.running import model_folder

    known = all_documents()
    unknown = [document for document in options.documents if document not in known]
    if unknown:
        parser.error(f"--documents {unknown[0]}: unknown; give some of {', '.join(known)}")
    torch.set_num_threads(options.threads)
    name = model_folder(options.model)
    model, tokenizer = load_model(name), read_tokenizer(name)
    lines = [
        "| document | condition | KV tokens | KL | log-loss | accuracy | CPU-seconds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for document in options.documents:
        grid = Grid((document,), (0,), {"none": {}}, model=name, steps=1, batch=1, unseen=True)
        with tempfile.TemporaryDirectory(prefix="cartridge-distill-") as folder:
            data = prepare_data(known[document], grid, name, 0, Path(folder) / "data")
            for row in _rows(model, tokenizer, data, options):
                lines.append(f"| {document} | {' | '.join(row)} |")
                say(f"   {row[0]}: measured")
    print("\n".join(lines))
    return 0


def _rows(
    model: Any, tokenizer: Any, data: Path, options: argparse.Namespace
) -> Iterator[list[str]]:
    """A line for each condition of one document."""
    from functools import partial

    import torch

    from cartridge_distill.distill.teacher import Teacher
    from cartridge_distill.evaluation.conditions import BestChunk, FullDocument, no_document
    from cartridge_distill.evaluation.conditions import untrained as untrained_cartridge
    from cartridge_distill.evaluation.data import EvaluationData
    from cartridge_distill.model.prompts import begin_of_text, render_document

    found = EvaluationData.from_folder(data, tokenizer, limit=options.limit)
    teacher = Teacher(
        model,
        found.documents,
        partial(render_document, tokenizer),
        begin=begin_of_text(tokenizer),
    )
    [document] = found.documents.ids
    full = FullDocument(teacher)
    read = len(teacher.document_ids(document))

    def row(label: str, tokens: int, condition: Any, seconds: float | None = None) -> list[str]:
        means = _means(model, tokenizer, full, condition, found.questions)
        numbers = [f"{means['kl']:.3f}", f"{means['log_loss']:.2f}", f"{means['accuracy']:.2f}"]
        return [label, str(tokens), *numbers, "" if seconds is None else f"{seconds:.1f}"]

    yield row("no document", 0, no_document(model, tokenizer))
    for tokens in options.tokens:
        yield row(f"best chunk of {tokens}", tokens, BestChunk(teacher, tokens))
        for init in options.init:
            started = time.process_time()
            with torch.no_grad():
                condition = untrained_cartridge(teacher, document, tokens, 1, init)
            yield row(init, tokens, condition, time.process_time() - started)
    yield row("full document", read, full)


def _means(
    model: Any, tokenizer: Any, document: Any, condition: Any, questions: list[Any]
) -> dict[str, float]:
    from cartridge_distill.evaluation.harness import Evaluation
    from cartridge_distill.evaluation.journal import Journal
    from cartridge_distill.evaluation.results import summarise

    with tempfile.TemporaryDirectory(prefix="cartridge-distill-") as folder:
        with Journal(Path(folder), {}, lambda line: None) as journal:
            Evaluation(model, tokenizer, document, [condition], seed=0).run(questions, [], journal)
            summary = summarise(journal.results(), {}, 0)
    [row] = summary["conditions"]
    return {name: float(row["metrics"][name]["mean"]) for name in METRICS}


if __name__ == "__main__":
    sys.exit(main())
