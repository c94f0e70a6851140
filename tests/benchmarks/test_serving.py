"""benchmarks/serving.py really runs, in small."""

from __future__ import annotations

import pytest

from tests.training.conftest import Run


@pytest.mark.long
@pytest.mark.integration
def test_every_figure_is_printed(run_python: Run) -> None:
    done = run_python(
        *("benchmarks/serving.py", "--no-ray", "--repeats", 1, "--layers", 2),
        *("--kv-heads", 2, "--head-dim", 16, "--tokens", 32, "--dtype", "float32"),
        *("--requests", 5, "--burst", 16, "--inflight", 4),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "trainer blocked (copy, float32 -> bfloat16)",
        "write + fsync of the same bytes, once",
        "published: from the copy until it works",
        "described and hashed, by the client",
        "sent; hashed, checked and written meanwhile",
        "flushed to the disk and renamed",
        "loaded by the server, and one token",
        "CPU seconds of a publication: client ",
        "published / (write + fsync): ",
        "directly",
        "added by gateway: ",
    ):
        assert name in done.stdout, done.stdout
    assert done.stdout.count("(aim: under ") == 3
