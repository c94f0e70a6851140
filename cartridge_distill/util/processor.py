"""What a CPU multiplies fast in bfloat16, by the flags that Linux writes down; and what follows.

With one of these instructions a base in bfloat16 is trained faster than one in float32. Server and
trainer then round, each in its own way, so the choice is one of the whole run. "auto" takes
bfloat16 only where a run was measured to end where float32 ends (:data:`MEASURED`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Flags of ``/proc/cpuinfo``, the faster instruction first, and what they are called."""

MEASURED: frozenset[str] = frozenset()
"""Instructions with which the demo's table was measured in bfloat16; none yet."""

CPUINFO = Path("/proc/cpuinfo")


def bfloat16_instruction(cpuinfo: Path = CPUINFO) -> str | None:
    """What the processor multiplies bfloat16 with: "AMX", "AVX512-BF16", or None.

    Args:
        cpuinfo: as Linux writes it; where there is none, the answer is None.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return None
    flags: set[str] = set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":  # of the first core; all have the same
            flags = set(value.split())
            break
    return next((name for flag, name in INSTRUCTIONS.items() if flag in flags), None)


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of a frozen base on a CPU.

    Attributes:
        dtype: "float32" or "bfloat16".
        why: in a few words, for the one line that a run says.
    """

    dtype: str
    why: str


def choose_dtype(asked: str, cpuinfo: Path = CPUINFO) -> DtypeChoice:
    """What a base on this CPU is computed in.

    Args:
        asked: "float32", "bfloat16" or "auto".
    """
    instruction = bfloat16_instruction(cpuinfo)
    if asked == "float32":
        return DtypeChoice(asked, "as asked")
    if asked == "bfloat16":
        if instruction is None:
            return DtypeChoice(asked, "as asked; this CPU has no instruction for it and is slow")
        return DtypeChoice(asked, f"as asked; this CPU has {instruction}")
    if instruction is None:
        return DtypeChoice("float32", "this CPU has no instruction for bfloat16")
    if instruction in MEASURED:
        return DtypeChoice("bfloat16", f"this CPU has {instruction}; --dtype float32 rounds less")
    return DtypeChoice("float32", f"this CPU has {instruction}: --dtype bfloat16 is faster")
