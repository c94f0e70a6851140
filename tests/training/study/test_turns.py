"""Several processes on one study: each run is done by one of them, and none is left."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from training.study.turns import alone, share

PIECES = ("a", "b", "c", "d")


def work(folder: Path, both: Barrier) -> None:
    both.wait(60)

    def do(piece: str) -> None:
        done = folder / f"{piece}.done"
        if done.exists():
            return
        with (folder / "order").open("a") as file:
            file.write(f"{piece} {os.getpid()}\n")
        while not list(folder.glob("*.done")) and len(_order(folder)) < 2:
            time.sleep(0.01)  # until the other process has begun a piece
        done.touch()

    share(PIECES, lambda piece: folder / "locks" / piece, do)
    assert {path.stem for path in folder.glob("*.done")} == set(PIECES)


def _order(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "order").read_text().splitlines()]


def test_two_processes_share_the_pieces(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = context.Barrier(2)
    processes = [context.Process(target=work, args=(tmp_path, both)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    order = _order(tmp_path)
    assert sorted(piece for piece, _ in order) == list(PIECES)  # each once
    assert len({pid for _, pid in order}) == 2


def take_and_die(folder: Path) -> None:
    with alone(folder / "a", wait=False) as mine:
        assert mine
        os._exit(9)


def test_what_a_killed_process_held_is_anothers(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=take_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    done: list[str] = []
    share(["a"], lambda piece: tmp_path / piece, done.append)
    assert done == ["a"]


def test_a_lock_that_is_held_is_not_taken(tmp_path: Path) -> None:
    with alone(tmp_path / "a") as first, alone(tmp_path / "a", wait=False) as second:
        assert first and not second
    with alone(tmp_path / "a", wait=False) as again:
        assert again
