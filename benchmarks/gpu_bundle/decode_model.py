"""The demo's model folder on a node without network: from its GGUF file and its small files.

    python -m benchmarks.gpu_bundle.decode_model FILES FOLDER

The same bytes as training/get_demo_model.py wrote where the bundle was made; its manifest travels
along and is checked. transformers is not needed, and no version of it can stand in the way.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from cartridge_distill.model.decode_gguf import decode_llama
from cartridge_distill.model.demo_model import MANIFEST, verify


def decode(files: Path, folder: Path) -> str | None:
    """Makes ``folder``; what is wrong with it, or None."""
    [gguf] = files.glob("*.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files.iterdir():
        if file != gguf:
            shutil.copy(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    weights = decode_llama(gguf, config["num_attention_heads"], config["num_key_value_heads"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return verify(folder)


def main() -> int:
    """The command line; returns the exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    files, folder = map(Path, sys.argv[1:])
    problem = decode(files, folder)
    if problem is not None:
        print(f"error: {folder} is not what was packed: {problem} ({MANIFEST})", file=sys.stderr)
        return 1
    print(f"the model is there and verified: {folder}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
