"""Directories and files are the old ones or the new ones, wherever the writer is killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cartridge_distill.util import files
from cartridge_distill.util.errors import ConfigError

# In a process without threads, for it forks: one child is killed before each line of the writer.
KILLED_AT_EVERY_LINE = """
import importlib.util, os, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
target = Path(sys.argv[2]) / "target"

def write(text):
    def fill(folder):
        for name in ("a", "b"):
            (folder / name).write_text(text)
    files.replace_directory(target, fill, overwrite=True)

def killed_before(line):
    count = 0
    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != sys.argv[1]:
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

write("old")
found = []
for line in range(1, 1000):
    child = os.fork()
    if not child:
        killed_before(line)
        write("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    held = [(target / name).read_text() for name in ("a", "b")]
    assert held in (["old", "old"], ["new", "new"]), (line, held)
    found.append(held[0])
    if os.WIFEXITED(status):
        break
    write("old")
assert os.WEXITSTATUS(status) == 0
print(found.count("old"), found.count("new"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="directories are exchanged on Linux alone")
def test_a_directory_is_the_old_or_the_new_one_wherever_its_writer_is_killed(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_LINE, files.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    old, new = map(int, done.stdout.split())
    assert old > 10 and new > 2  # killed before the exchange, and after it


def test_where_directories_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(text: str) -> None:
        files.replace_directory(
            tmp_path / "target", lambda folder: _fill(folder, text), overwrite=True
        )

    write("old")
    monkeypatch.setattr(files, "_RENAME_EXCHANGE", 2**20)  # a flag that no kernel knows: EINVAL
    write("new")
    assert (tmp_path / "target" / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_other_errors_are_not_taken_for_that(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(OSError) as caught:
        files._exchange(tmp_path / "one", tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT


def _fill(folder: Path, text: str) -> None:
    (folder / "a").write_text(text)


def test_a_folder_is_made_anew_only_by_who_made_it(tmp_path: Path) -> None:
    run, thesis = tmp_path / "run", tmp_path / "thesis"
    written = ("*.log", "data/*.json", "checkpoints/**")
    files.fresh_folder(run, written)
    for name in ("old.log", "data/a.json", "checkpoints/global_step_1/deep/x.bin"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    files.fresh_folder(run, written)
    assert [path.name for path in run.iterdir()] == [files.OWNED]
    thesis.mkdir()
    files.fresh_folder(thesis, written)  # empty: nothing is lost
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(FileExistsError, match="did not write"):
            files.fresh_folder(target, written)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("name", ["thesis.tex", "data/notes.md", "data/deep/a.json", "logs/a.log"])
def test_what_somebody_put_into_a_folder_of_ours_is_not_deleted(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    files.fresh_folder(run, ())
    (run / "ours.log").write_text("ours")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("precious")
    with pytest.raises(FileExistsError, match=name):
        files.fresh_folder(run, ("*.log", "data/*.json"))
    assert (run / name).read_text() == "precious" and (run / "ours.log").exists()


def test_a_link_in_a_folder_of_ours_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = tmp_path / "run"
    files.fresh_folder(run, ())
    (run / "data").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="data"):
        files.fresh_folder(run, ("data/*.json",))
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(FileExistsError, match="did not write"):
        files.fresh_folder(tmp_path / "link", ("data/*.json",))


def test_a_folder_that_cannot_be_written_to_is_known_before_the_work(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "deeper", "--out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder; fix: give another --out"):
        files.check_writable(tmp_path / "file" / "below", "--out")
    for place in ("/proc/none", "/proc/sys/none"):  # root has the right to, and yet cannot
        with pytest.raises(ConfigError, match=r"cannot be written to \(.*\); fix: give another"):
            files.check_writable(Path(place), "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
