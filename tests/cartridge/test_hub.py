"""Pushing and pulling: a directory in the Hub's place, and the Hub's API, recorded."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import PeftModel

from cartridge_distill.cartridge import hub
from cartridge_distill.cartridge.checkpoint import (
    CartridgeMeta,
    convert,
    load_cartridge,
    read_cartridge,
    read_meta,
    write_cartridge,
)
from cartridge_distill.cartridge.formats import native, peft
from cartridge_distill.cartridge.hub import is_hub_id, pull, push
from cartridge_distill.cartridge.model_card import card
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError, HubError
from tests.cartridge.formats.made import META, same_bits, stored
from tests.tiny import tiny_model

ALL_FILES = {
    *("cartridge.safetensors", "cartridge.json", "README.md", "cartridge.pt", "config.yaml"),
    *("adapter_config.json", "adapter_model.safetensors"),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_cartridge(stored(), tmp_path / "source", "native")


# ---- a directory in the Hub's place


def test_one_directory_for_every_tool(source: Path, tmp_path: Path) -> None:
    target = push(source, tmp_path / "pushed")
    there = Path(target)
    assert set(os.listdir(there)) == ALL_FILES
    assert same_bits(read_cartridge(there), stored())
    assert read_cartridge(there).meta.step == 7
    assert PeftModel.from_pretrained(tiny_model(), there).peft_type == "CARTRIDGE"
    for files in (native.FILES, peft.FILES):
        for name in files:
            (there / name).unlink()
        assert same_bits(read_cartridge(there), stored())  # of what is left: PEFT, Tokasaurus
    assert set(os.listdir(there)) == {"cartridge.pt", "config.yaml", "README.md"}


def test_pull_takes_what_belongs_to_a_cartridge_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    pushed = Path(push(source, tmp_path / "pushed"))
    (pushed / "setup.py").write_text("raise SystemExit")
    (pushed / "training_args.bin").write_bytes(b"\x80\x04.")
    pulled = pull(pushed, tmp_path / "pulled")
    assert set(os.listdir(pulled)) == {"cartridge.safetensors", "cartridge.json", "README.md"}
    assert same_bits(read_cartridge(pulled), stored())
    assert pull(pushed) == pushed
    with pytest.raises(FileExistsError):
        pull(pushed, tmp_path / "pulled")
    pull(pushed, tmp_path / "pulled", overwrite=True)
    with pytest.raises(ConfigError, match="revision='main' is for the Hub"):
        pull(pushed, revision="main")


def test_a_hostile_file_is_not_pulled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    bad = tmp_path / "bad"
    bad.mkdir()
    torch.save({"frozen_keys": Hostile()}, bad / "cache-step1.pt")
    with pytest.raises(CartridgeFormatError, match="cannot be read safely"):
        pull(bad, tmp_path / "pulled")
    assert os.listdir(tmp_path) == ["bad"]


def test_pushing_again_replaces_a_cartridge_and_nothing_else(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "pushed"
    push(source, target)
    with pytest.raises(FileExistsError):
        push(source, target)
    push(source, target, formats=["native"], overwrite=True)
    assert set(os.listdir(target)) == {"cartridge.safetensors", "cartridge.json", "README.md"}
    card = target / "README.md"
    card.write_text(card.read_text() + "\nWhat I found out with it: ...\n")
    with pytest.raises(CartridgeFormatError, match="README.md is not as it was written here"):
        push(source, target, overwrite=True)
    with pytest.raises(CartridgeFormatError, match="README.md is not as it was written here"):
        pull(source, target, overwrite=True)
    assert "What I found out" in card.read_text()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CartridgeFormatError, match="holds no cartridge"):
        push(source, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").exists()


def test_formats_that_do_not_go(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hazyresearch.*; fix: choose some of"):
        push(source, tmp_path / "a", formats=["hazyresearch"])
    odd = write_cartridge(stored(tokens=20), tmp_path / "odd", "native")
    push(odd, tmp_path / "b")
    assert not (tmp_path / "b" / "cartridge.pt").exists()
    assert "Tokasaurus" not in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(CartridgeFormatError, match="multiple of 16"):
        push(odd, tmp_path / "c", formats=["native", "tokasaurus"])
    nameless = convert(source, tmp_path / "a.pt", "hazyresearch")
    with pytest.raises(CartridgeFormatError, match="which model.*base_model"):
        push(nameless, tmp_path / "d")
    push(nameless, tmp_path / "d", base_model="owner/tiny")


# ---- the card


def test_what_the_card_says(source: Path, tmp_path: Path) -> None:
    text = (Path(push(source, tmp_path / "pushed")) / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("owner/tiny", "peft")
    assert "cartridge" in data.tags
    for part in (
        "# Cartridge: A record \\| of 591 tokens",
        "| base model's revision | c0ffee |",
        f"| document's SHA-256 | {META.document_sha256} |",
        "| tokens | 32, of which 1 frozen |",
        "| layers, kv heads, head size | 2, 2, 16 |",
        "| optimizer steps | 7 |",
        "| loss | forward_kl_topk |",
        "| lr | 0.02 |",
        "| step | loss | grad_norm |",
        "| 1 | 1.275 | 0.1 |",
        "| 32 | 0.5 | 0.1 |",
        "| logprob diff max | 3e-05 |",
        "| trained cartridge | 0.637 | 2.07 | 0.8 |",
        '"source": "huggingface"',
        "### In PEFT",
    ):
        assert part in text, part
    assert "/somewhere" not in text  # a path of the machine it was trained on
    assert "documents" not in read_meta(tmp_path / "pushed")["recipe"]


def test_a_card_of_little_knowledge() -> None:
    text = card(stored(meta=CartridgeMeta("owner/tiny")), ["native"], "owner/name")
    assert "# Cartridge: a document" in text
    for absent in ("None", "## Recipe", "## Training", "## Results", "PEFT"):
        assert absent not in text
    odd = replace(META, metrics={"curve": [{"step": 1, "loss": float("nan")}], "results": [3]})
    assert "| 1 | nan |" in card(stored(meta=odd), ["native"], "owner/name")
    hostile = replace(META, document_title="a\n---\n<script>|`")
    assert "# Cartridge: a --- &lt;script>\\|'" in card(stored(meta=hostile), ["native"], "o/n")


@pytest.fixture
def cards_code(tmp_path: Path, model_folder: Path) -> str:
    """The one block of Python in a pushed cartridge's card."""
    meta = CartridgeMeta(str(model_folder))
    source = write_cartridge(stored(64, meta=meta), tmp_path / "source", "native")
    text = (Path(push(source, tmp_path / "pushed")) / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


def test_the_cards_code_ends_where_peft_ignores_the_cartridge(
    cards_code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT's generate does with newer versions of transformers: the base model answers."""

    def generate(self: Any, **inputs: Any) -> Any:
        return self.get_base_model().generate(**inputs)

    monkeypatch.setattr("peft.PeftModelForCausalLM.generate", generate)
    with pytest.raises(RuntimeError, match="ignored the cartridge"):
        exec(cards_code, {})  # noqa: S102


def test_the_cards_code_runs_as_it_stands(cards_code: str, tmp_path: Path) -> None:
    printed, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(printed):
        exec(cards_code, names)  # noqa: S102
    ids, cartridge = names["ids"], load_cartridge(tmp_path / "pushed")
    out = tiny_model().generate(
        ids,
        past_key_values=cartridge.as_cache(),
        attention_mask=torch.ones(1, 64 + ids.shape[1], dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
    )
    assert names["out"].sequences.tolist() == out.tolist()
    assert len(printed.getvalue()) > 1


# ---- the Hub, its API recorded with the signatures it has


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Hub of one directory, ``remote``; only its commits are made up."""
    remote = tmp_path / "remote"
    made = create_autospec(HfApi, instance=True)

    def upload(*, repo_id: str, folder_path: str, **more: Any) -> Any:
        shutil.copytree(folder_path, remote, dirs_exist_ok=True)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        cache = tmp_path / "cache" / (revision or "main")
        cache.mkdir(parents=True)
        for name in allow_patterns:
            shutil.copy(remote / name, cache / name)
        return str(cache)

    made.upload_folder.side_effect = upload
    made.list_repo_files.side_effect = lambda *_, **__: sorted(os.listdir(remote))
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return made


def test_to_the_hub_and_back(source: Path, api: Any, tmp_path: Path) -> None:
    assert push(source, "owner/name") == "https://hub/owner/name/commit/1"
    api.create_repo.assert_called_once_with("owner/name", private=True, exist_ok=True)
    sent = api.upload_folder.call_args.kwargs
    assert set(os.listdir(tmp_path / "remote")) == ALL_FILES
    assert sent["revision"] is None and set(sent["delete_patterns"]) == ALL_FILES - {"README.md"}
    assert same_bits(read_cartridge("owner/name@c0ffee"), stored())
    api.list_repo_files.assert_called_once_with("owner/name", revision="c0ffee")
    fetched = set(os.listdir(tmp_path / "cache" / "c0ffee"))
    assert fetched == {"cartridge.safetensors", "cartridge.json", "README.md"}
    pulled = pull("owner/name", tmp_path / "mine", revision="v1")
    assert same_bits(read_cartridge(pulled), stored())
    with pytest.raises(ConfigError, match="two revisions"):
        pull("owner/name@a", revision="b")


def test_a_branch(source: Path, api: Any) -> None:
    push(source, "owner/name", branch="step-7", private=False, message="seven")
    api.create_branch.assert_called_once_with("owner/name", branch="step-7", exist_ok=True)
    sent = api.upload_folder.call_args.kwargs
    assert (sent["revision"], sent["commit_message"]) == ("step-7", "seven")


def test_a_model_that_nobody_else_can_find_is_not_pushed(api: Any, tmp_path: Path) -> None:
    meta = CartridgeMeta("/home/me/models/tiny")
    source = write_cartridge(stored(meta=meta), tmp_path / "source", "native")
    with pytest.raises(ConfigError, match="folder of this machine.*base_model=owner/name"):
        push(source, "owner/name")
    api.create_repo.assert_not_called()
    push(source, "owner/name", base_model="owner/tiny")
    text = (tmp_path / "remote" / "README.md").read_text()
    assert "/home/me" not in text + (tmp_path / "remote" / "cartridge.json").read_text()


def test_the_hubs_refusals(source: Path, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_cached(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("nothing")

    api.create_repo.side_effect = OSError("401 Client Error: log in first")
    with pytest.raises(HubError, match="cannot push to owner/name: 401"):
        push(source, "owner/name")
    api.list_repo_files.side_effect = OfflineModeIsEnabled("offline")
    monkeypatch.setattr(hub, "snapshot_download", nothing_cached)
    with pytest.raises(HubError, match="owner/name is not in the cache, and HF_HUB_OFFLINE is set"):
        pull("owner/name")
    with pytest.raises(CartridgeFormatError, match="no directory and no hub id"):
        pull("a/b/c")


def test_a_repository_without_a_cartridge(api: Any, tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CartridgeFormatError, match="owner/name holds no cartridge"):
        pull("owner/name")


def test_what_is_a_hub_id() -> None:
    for name in ("hazyresearch/cartridge-wauoq23f", "a/b@main", "a/b.c_d@refs/pr/1"):
        assert is_hub_id(name), name
    for name in ("./a/b", "/a/b", "~/a", "a", "a/b/c", "../b", "a/b@", "a b/c"):
        assert not is_hub_id(name), name
