"""All ids that a model's files call an end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cartridge_distill.model.end_tokens import possible_end_ids


def test_of_every_file(model_folder: Path, tmp_path: Path) -> None:
    assert possible_end_ids(str(model_folder)) == {257}
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert possible_end_ids(str(copy)) == {3, 4, 257}
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text()) | {"eos_token_id": 9}
    (copy / "config.json").write_text(json.dumps(config))
    assert possible_end_ids(str(copy)) == {9, 257}
