"""Every kind of file that is read here, and what reads it: for a fuzzer over files.

Run as a program, it damages the files of one kind again and again in a process whose memory is
limited, and prints what became of it as a line of JSON (``all`` for a line each)::

    python -m tests.attack.files native FOLDER --count 200 --seed 0

Each outcome is either exactly what was written, or an error of the project that names the file.
What else happens ends the program with what was done.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # the others reserve gigabytes

import pyarrow as pa
import torch

from cartridge_distill.cartridge.checkpoint import read_cartridge, write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.snapshot import PARTS, Snapshot
from cartridge_distill.data.document_store import DocumentStore
from cartridge_distill.data.records import Document, save_documents
from cartridge_distill.distill.training_state import (
    TrainingState,
    load_state,
    rng_state,
    save_state,
)
from cartridge_distill.evaluation.results import QuestionResult, Results
from cartridge_distill.gateway.metrics import Metrics
from cartridge_distill.gateway.store import VersionStore
from cartridge_distill.report.questions import read_questions
from cartridge_distill.report.reading import _read_json
from cartridge_distill.report.recipe import Recipe, write_recipe
from cartridge_distill.sync.upload import encode
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.journal import Journal
from cartridge_distill.util.parquet import write_table
from cartridge_distill.util.tracker import tracked_step
from tests.attack.damage import damages, structural
from verl_patches.trainer import run_folder
from verl_patches.trainer.history import History

MORE_BYTES = 2**29
"""Of address space that reading may add."""
_SETTINGS = {"seed": 0, "models": ["m"]}
_DATA = {"data rows": 12}
_STEPS = (3, 5, 7)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        write: writes right files into a folder that is there.
        read: reads them; what it gives can be compared.
        files: of the folder, those that are damaged.
        also: whether something else than the truth is right too, e.g. its beginning.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    also: Callable[[Any, Any], bool] = lambda found, truth: False


def small(seed: int = 0) -> StoredCartridge:
    """A cartridge of a kilobyte."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        name: [
            torch.randn(1, 1, 1 if name.startswith("frozen") else 15, 4, generator=generator)
            for _ in range(2)
        ]
        for name in PARTS
    }
    meta = CartridgeMeta(
        "owner/tiny",
        step=7,
        document_sha256="ab" * 32,
        recipe={"lr": 0.02, "loss": "kl"},
        metrics={"curve": [{"step": 1, "loss": 1.25}]},
    )
    return StoredCartridge(Snapshot(parts), meta)


def _cartridge(format: Any, name: str, with_meta: bool) -> tuple[Any, Any]:
    def write(folder: Path) -> None:
        write_cartridge(small(), folder / name, format, overwrite=True)

    def read(folder: Path) -> Any:
        stored = read_cartridge(folder / name)
        tensors = [(n, t.dtype, t.shape, t.numpy().tobytes()) for n, t in stored.snapshot.items()]
        return tensors, asdict(stored.meta) if with_meta else None

    return write, read


def _state(folder: Path) -> None:
    tensors = {"step": torch.tensor(7.0), "exp_avg": torch.randn(1, 1, 3, 4)}
    tensors["exp_avg_sq"] = torch.rand(1, 1, 3, 4)
    optimizer = {"trainable_keys.0": tensors}
    save_state(TrainingState(7, 7, 7, optimizer, rng_state(), {"optim.lr": 0.02}), folder)


def _read_state(folder: Path) -> Any:
    state = load_state(folder)
    flat = {
        **{f"rng {name}": tensor for name, tensor in state.rng.items()},
        **{f"{p} {n}": t for p, found in state.optimizer.items() for n, t in found.items()},
    }
    numbers = (state.step, state.version, state.schedule, state.settings)
    return numbers, {n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in flat.items()}


def _position(folder: Path) -> None:
    state = {"_num_yielded": 3, "generator": torch.arange(32, dtype=torch.uint8)}
    run_folder.write_data_position(folder, state, _DATA)


def _read_position(folder: Path) -> Any:
    found = run_folder.read_data_position(folder, _DATA)
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


def _run(folder: Path) -> None:
    """A run with three checkpoints."""
    history = History()
    for step in range(1, _STEPS[-1] + 1):
        history.add(step, f"run-step-{step:06d}", {"actor/loss": 1.5 / step})
        if step in _STEPS:
            place = run_folder.step_folder(folder, step)
            (place / "actor").mkdir(parents=True, exist_ok=True)
            (place / run_folder.DATA_FILE).write_bytes(b"")
            history.write(folder)
            run_folder.mark_complete(folder, step)


def _journal(folder: Path) -> None:
    (folder / "rows.jsonl").unlink(missing_ok=True)
    with Journal(folder / "rows.jsonl", _SETTINGS) as journal:
        journal.append({"kind": "question", "index": 0, "kl": 1.5}, {"kind": "x", "text": "Größe"})


def _read_journal(folder: Path) -> Any:
    with Journal(folder / "rows.jsonl", _SETTINGS) as journal:
        return list(journal.rows)


_DOCUMENTS = (
    Document.of("red", "The red house stands by the sea. " * 3, "A title"),
    Document.of("blue", "The blue boat is new: 12.5 m."),
)


def _documents_table(folder: Path) -> None:
    rows = [{"document_id": d.document_id, "text": d.text, "sha256": d.sha256} for d in _DOCUMENTS]
    write_table(pa.Table.from_pylist(rows), folder / "documents.parquet")


def _read_documents(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        store = DocumentStore.from_file(folder / name)
        return {document_id: store.text(document_id) for document_id in store.ids}

    return read


def _texts_are_right(found: Any, truth: Any) -> bool:
    """A document less, or under another id: prompts name it, and are refused."""
    return set(found.values()) <= set(truth.values())


def _questions(folder: Path) -> None:
    row = {
        **{"condition": "trained cartridge", "document_id": "red", "question": "?"},
        **{"right_answer": "a", "seed": 0, "kl_sum": 1.5, "kl_tokens": 3, "log_loss": 0.25},
    }
    fields = QuestionResult.SCHEMA.names
    rows = [
        QuestionResult(**{**dict.fromkeys(fields), **row, "question_index": number})
        for number in range(3)
    ]
    Results(rows, []).write(folder)


def _read_questions(folder: Path) -> Any:
    found = read_questions(folder / "evaluation.parquet")
    assert found is not None
    # As text: a field that is not there is NaN, which equals nothing.
    return {name: table.to_csv() for name, table in found.tables.items()}


def _versions(folder: Path) -> None:
    store = VersionStore(folder, keep=9, max_bytes=10**9, metrics=Metrics())
    store.open()
    if (folder / "v").is_dir():
        return
    snapshot = small().snapshot
    staging = store.staging_folder()
    torch.save(snapshot.parts, staging / "cartridge.pt")
    store.place("v", encode(snapshot, "owner/tiny", 7).header, staging)


def _read_versions(folder: Path) -> Any:
    store = VersionStore(folder, keep=9, max_bytes=10**9, metrics=Metrics())
    store.open()
    asyncio.run(store.check())
    info = store.info("v")  # refused by the name of the version
    weights = read_cartridge(folder / "v").snapshot
    return info.model_dump(), [tensor.numpy().tobytes() for _, tensor in weights.items()]


def _recipe(folder: Path) -> None:
    write_recipe(folder, ["train", "--lr", "0.02"], ["a=1"], 3, model="owner/tiny")


KINDS: dict[str, Kind] = {
    "native": Kind(
        *_cartridge("native", "c", True), ("c/cartridge.safetensors", "c/cartridge.json")
    ),
    "hazyresearch": Kind(*_cartridge("hazyresearch", "c.pt", False), ("c.pt",)),
    "tokasaurus": Kind(*_cartridge("tokasaurus", "c", False), ("c/cartridge.pt", "c/config.yaml")),
    "peft": Kind(
        *_cartridge("peft", "c", False),
        ("c/adapter_model.safetensors", "c/adapter_config.json"),
    ),
    "training state": Kind(
        _state, _read_state, ("training_state.safetensors", "training_state.json")
    ),
    "data position": Kind(_position, _read_position, (run_folder.DATA_FILE,)),
    "tracker": Kind(_run, tracked_step, (run_folder.TRACKER,)),
    "history": Kind(
        _run,
        lambda folder: History.read(folder, 7).lines,
        ("history.jsonl",),
        lambda found, truth: found == truth[: len(found)],  # steps that no log has
    ),
    "recipe": Kind(
        _recipe, lambda folder: _read_json(folder / "recipe.json", Recipe), ("recipe.json",)
    ),
    "journal": Kind(
        _journal,
        _read_journal,
        ("rows.jsonl",),
        lambda found, truth: found == truth[: len(found)],  # the rest is done again
    ),
    "documents": Kind(
        lambda folder: save_documents(folder / "documents.jsonl", _DOCUMENTS),
        _read_documents("documents.jsonl"),
        ("documents.jsonl",),
        _texts_are_right,
    ),
    "documents table": Kind(
        _documents_table,
        _read_documents("documents.parquet"),
        ("documents.parquet",),
        _texts_are_right,
    ),
    "evaluation table": Kind(_questions, _read_questions, ("evaluation.parquet",)),
    "versions": Kind(
        _versions, _read_versions, ("v/cartridge.pt", "v/config.yaml", "v/version.json")
    ),
}


class Wrong(Exception):
    """What must never happen, happened."""


def outcome(kind: Kind, folder: Path, truth: Any) -> str:
    """``right`` or ``refused``.

    Raises:
        Wrong: anything else.
    """
    try:
        found = kind.read(folder)
    except CartridgeDistillError as error:
        names = [Path(name).name for name in kind.files]
        if not any(name in str(error) for name in (*names, str(folder), "'v'")):
            raise Wrong(f"no file is named: {error}") from error
        return "refused"
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        raise Wrong(f"a foreign exception: {text[-3000:]}") from error
    if found == truth or kind.also(found, truth):
        return "right"
    raise Wrong(f"other content: {str(found)[:1500]}")


def attack(name: str, folder: Path, count: int | None, seed: int) -> Counter[str]:
    """Damages the files of a kind and reads them.

    Args:
        count: of damages of each file, drawn with the seed; None for all of them.

    Raises:
        Wrong: with the damage.
    """
    kind = KINDS[name]
    torch.manual_seed(0)
    kind.write(folder)
    whole = {file: (folder / file).read_bytes() for file in kind.files}
    truth = kind.read(folder)
    before = _limit_memory()
    counts: Counter[str] = Counter()
    for file, data in whole.items():
        for damage in itertools.chain(structural(file, data), damages(data, count, seed)):
            (folder / file).write_bytes(damage.data)
            try:
                found = outcome(kind, folder, truth)
            except Wrong as error:
                raise Wrong(f"{name}, {file}, {damage.what}: {error}") from error
            counts[f"{damage.kind}: {found}"] += 1
        (folder / file).write_bytes(data)
    assert kind.read(folder) == truth
    resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def _limit_memory() -> tuple[int, int]:
    """Returns the limit that was."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    return before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["all", *KINDS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, help="damages of each file (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in KINDS if options.kind == "all" else [options.kind]:
        folder = options.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            counts = attack(name, folder, options.count, options.seed)
        except Wrong as error:
            print(error, file=sys.stderr)
            return 1
        print(json.dumps({"of": name, **dict(sorted(counts.items()))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
