"""The dtype on a CPU follows from the processor's flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from cartridge_distill.util import processor
from cartridge_distill.util.processor import bfloat16_instruction, choose_dtype

PLAIN = "fpu vme avx2 avx512f avx512_vnni"


def cpuinfo(folder: Path, flags: str) -> Path:
    """Of two cores, with lines before and after the flags, as Linux writes them."""
    core = f"processor\t: 0\nmodel name\t: flags amx_bf16\nflags\t\t: {flags}\nbugs\t\t: none\n\n"
    file = folder / "cpuinfo"
    file.write_text(core * 2)
    return file


@pytest.mark.parametrize(
    ("flags", "instruction"),
    [
        (PLAIN, None),
        (f"{PLAIN} avx512_bf16", "AVX512-BF16"),
        (f"{PLAIN} avx512_bf16 amx_tile amx_bf16", "AMX"),
        (f"{PLAIN} amx_int8 avx512_bf16x", None),
    ],
)
def test_the_instruction_is_read_from_the_flags(
    flags: str, instruction: str | None, tmp_path: Path
) -> None:
    assert bfloat16_instruction(cpuinfo(tmp_path, flags)) == instruction


def test_a_system_without_the_file_has_none(tmp_path: Path) -> None:
    assert bfloat16_instruction(tmp_path / "none") is None


def test_auto_takes_bfloat16_only_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_amx = cpuinfo(tmp_path, f"{PLAIN} avx512_bf16 amx_bf16")
    assert choose_dtype("auto", with_amx) == processor.DtypeChoice(
        "float32", "this CPU has AMX: --dtype bfloat16 is faster"
    )
    monkeypatch.setattr(processor, "MEASURED", frozenset({"AMX"}))
    assert choose_dtype("auto", with_amx).dtype == "bfloat16"
    assert choose_dtype("float32", with_amx).dtype == "float32"
    with_avx = cpuinfo(tmp_path, f"{PLAIN} avx512_bf16")
    assert choose_dtype("auto", with_avx).dtype == "float32"
    assert choose_dtype("bfloat16", with_avx).why == "as asked; this CPU has AVX512-BF16"
    without = cpuinfo(tmp_path, PLAIN)
    assert choose_dtype("auto", without).dtype == "float32"
    assert "no instruction" in choose_dtype("bfloat16", without).why
