"""What of vLLM is relied on: each known release has it, and what a release lacks is named.

The releases' own files are read where they are: a folder with their wheels, or with what was
unpacked of them (``vllm-0.24.0/vllm/...``)::

    python -m pip download --no-deps --dest wheels vllm==0.24.0
    VLLM_SOURCES=$PWD/wheels pytest tests/engines/vllm/test_seams.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cartridge_distill.engines.vllm.seams import (
    SEAMS,
    Sources,
    differences,
    folder_sources,
    wheel_sources,
)
from cartridge_distill.engines.vllm.versions import SUPPORTED, known
from cartridge_distill.util.errors import ConfigError


def sources_of(version: str) -> Sources:
    """The files of a release, or a skip that says what is missing."""
    place = os.environ.get("VLLM_SOURCES")
    if place is None:
        pytest.skip("VLLM_SOURCES does not name a folder with vLLM's wheels")
    folder = Path(place)
    if (folder / f"vllm-{version}" / "vllm").is_dir():
        return folder_sources(folder / f"vllm-{version}")
    wheels = sorted(folder.glob(f"vllm-{version}-*.whl"))
    if not wheels:
        pytest.skip(f"{folder} has no wheel of vllm {version}")
    return wheel_sources(wheels[0])


@pytest.mark.parametrize("version", SUPPORTED)
def test_each_known_release_has_what_is_relied_on(version: str) -> None:
    assert differences(version, sources_of(version)) == []


@pytest.mark.parametrize("version", SUPPORTED)
def test_what_a_release_lacks_is_named(version: str) -> None:
    """Each function is taken out of its file in turn: the test above can fail."""
    sources = sources_of(version)
    for seam in SEAMS:
        if seam.since_failing_requests and not known(version).fails_requests:
            continue
        word = (seam.name or seam.text[0]).rpartition(".")[2]

        def without(path: str, files: tuple[str, ...] = seam.files, word: str = word) -> str | None:
            text = sources(path)
            return text.replace(word, "renamed") if text is not None and path in files else text

        found = differences(version, without)
        assert any(line.startswith(seam.use + ":") for line in found), seam


def made_up(arguments: str) -> Sources:
    text = f"class KVConnectorBase_V1:\n    def on_new_request(self, {arguments}):\n        pass\n"
    return lambda path: text if path.endswith("v1/base.py") else None


def test_arguments_are_compared_by_name() -> None:
    said = [line for line in differences("0.32.0", made_up("req")) if "comes in" in line]
    assert len(said) == 1 and "takes self, req" in said[0]
    assert not [line for line in differences("0.32.0", made_up("request")) if "comes in" in line]


def test_files_that_are_not_there_are_named() -> None:
    found = differences("0.32.0", lambda path: None)
    assert len(found) == len(SEAMS)
    assert all("is not there" in line for line in found)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "1.0.0"])
def test_an_unknown_release_is_refused_by_name(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"vLLM {version} is not known.*0\.24\.0"):
        known(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0.post1"])
def test_builds_of_a_release_are_it(version: str) -> None:
    assert known(version) is SUPPORTED["0.32.0"]
