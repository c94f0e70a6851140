"""What an evaluation's rows depend on, in the few letters that a journal keeps of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers

import cartridge_distill


def digest(value: Any) -> str:
    """SHA-256 of a JSON value; keys in any order give the same."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries whose rounding stands in the rows."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cartridge_distill": cartridge_distill.__version__,
    }
