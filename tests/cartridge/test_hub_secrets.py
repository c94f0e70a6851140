"""The Hub's token and what is pushed stay with the Hub; a pushed cartridge tells no secret.

huggingface_hub reads its endpoint when it is imported, so each case is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cartridge_distill.cartridge.checkpoint import read_cartridge, record, write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta
from cartridge_distill.cartridge.hub import push
from cartridge_distill.util.sealed import ENTRIES
from cartridge_distill.util.secrecy import HIDDEN
from tests.cartridge.formats.made import META, stored
from tests.two_servers import Answer, Asked, TestServer, serving

TOKEN = "hf_HushHushHushHushHushHushHush1234"


@pytest.fixture
def elsewhere() -> Iterator[TestServer]:
    with serving() as server:
        yield server


def hub(code: str, endpoint: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    script = f"from cartridge_distill.cartridge.hub import pull, push\n{code}"
    asked = [sys.executable, "-c", script]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("status", [307, 308])
def test_what_is_pushed_is_not_sent_on(status: int, tmp_path: Path, elsewhere: TestServer) -> None:
    source = write_cartridge(stored(), tmp_path / "source", "native")

    def answers(asked: Asked) -> Answer:
        return status, {"Location": elsewhere.url + asked.path}, b""

    with serving(answers) as server:
        done = hub(f"push({str(source)!r}, 'owner/name')", server.url, tmp_path)
    assert done.returncode != 0
    assert "HubError" in done.stderr and "redirect" in done.stderr
    assert "POST" in [asked.method for asked in server.asked]
    # The library looks for other things with GET, without the token.
    assert {asked.method for asked in elsewhere.asked} <= {"GET"}
    assert TOKEN not in str([asked.headers for asked in elsewhere.asked])
    assert TOKEN not in done.stderr + done.stdout


def test_what_is_fetched_elsewhere_is_fetched_without_the_token(
    tmp_path: Path, elsewhere: TestServer
) -> None:
    def answers(asked: Asked) -> Answer:
        return 302, {"Location": elsewhere.url + asked.path}, b""

    with serving(answers) as server:
        done = hub("pull('owner/name')", server.url, tmp_path)
    assert done.returncode != 0 and "HubError" in done.stderr
    assert TOKEN in str([asked.headers for asked in server.asked])
    assert elsewhere.asked  # the Hub keeps large files on other hosts
    assert TOKEN not in str([asked.headers for asked in elsewhere.asked])


SECRETS = {
    "modal_key": "hush",
    "server": {"api_key": "hush", "url": "http://anna:hush@host:1/x?token=hush"},
    "command": ["curl", "-H", "X-Api-Key: hush", "--token", "hush"],
    "note": "Authorization: Bearer hush",
}


def test_a_pushed_cartridge_tells_no_secret_of_its_recipe(tmp_path: Path) -> None:
    """Also one whose JSON another tool wrote."""
    source = write_cartridge(stored(), tmp_path / "source", "native")
    file = source / "cartridge.json"
    told = {name: value for name, value in json.loads(file.read_text()).items() if name != ENTRIES}
    told["recipe"] |= SECRETS
    told["metrics"] |= {"results": [], "last_step": {"step": 1}, "password": "hush"}
    told["document_title"] = "http://anna:hush@host/record"
    file.write_text(json.dumps(told))
    there = Path(push(source, tmp_path / "pushed"))
    for path in there.iterdir():
        assert b"hush" not in path.read_bytes(), path.name
    kept = read_cartridge(there).meta
    assert kept.recipe["modal_key"] == HIDDEN and kept.recipe["lr"] == META.recipe["lr"]
    assert kept.document_title == "http://host/record"


def test_a_cartridge_is_written_without_secrets(tmp_path: Path) -> None:
    meta: CartridgeMeta = replace(META, recipe={**META.recipe, **SECRETS})
    source = write_cartridge(replace(stored(), meta=meta), tmp_path / "source", "native")
    record(source, recipe={"hub_token": "hush"}, metrics={"note": "password=hush"})
    assert "hush" not in (source / "cartridge.json").read_text()
    assert read_cartridge(source).meta.metrics["curve"] == META.metrics["curve"]
