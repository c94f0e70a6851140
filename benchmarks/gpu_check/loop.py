"""The whole loop at a size that people train: a 3B base, a long document, long answers.

    python -m benchmarks.gpu_check.loop --tokenizer FOLDER --out loop

The weights are random, so nothing is learned, and answers are noise of full length. What a run
costs does not depend on that: seconds of rollout, forwards, backward and sync, memory, and how far
server and trainer are apart in bfloat16. veRL, Ray, the embedded server and the sync are a run's
own. OUT/metrics.jsonl has the figures, a step a line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.bases import ROOT, SHAPES, make_base
from cartridge_distill.util.files import fresh_folder
from cartridge_distill.util.processes import ChildFailed, Supervisor, say
from verl_patches.pipeline import stages
from verl_patches.pipeline.settings import RUN_FILES, Distillation, as_run

RECORDS = ROOT / "cartridge_distill" / "data" / "examples" / "demo.json"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.json", "merges.txt")


def write_model(shape: str, tokenizer: str, dtype: str, device: str, folder: Path) -> None:
    """A model folder: random weights of the shape, and the files of another model's tokenizer."""
    folder.mkdir(parents=True)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {**SHAPES[shape], "vocab_size": max(len(tokens), SHAPES[shape]["vocab_size"])}
    model = make_base(None, shape, getattr(torch, dtype), device, vocab_size=sizes["vocab_size"])
    # save_pretrained of some versions asks the hub, and writes the tied weight twice.
    weights = {name: weight.cpu().contiguous() for name, weight in model.state_dict().items()}
    if sizes["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    config |= {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    # What attention a model runs with is no part of a model folder.
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    (folder / "config.json").write_text(json.dumps(kept, indent=2, default=str))
    for pattern in _TOKENIZER:
        for file in Path(tokenizer).glob(pattern):
            shutil.copy(file, folder / file.name)


def write_record(tokenizer: str, tokens: int, path: Path) -> int:
    """The demo's patient with as many visits as a document of ``tokens`` needs; its length."""
    count = AutoTokenizer.from_pretrained(tokenizer)
    [record] = json.loads(RECORDS.read_text()).values()
    told, texts, length = list(record["texts"].values()), dict[str, str](), 0
    while length < tokens:
        number = len(texts)
        text = f"Visit {number + 1}.\n{told[number % len(told)]}"
        texts[f"text_{number}"] = text
        length += len(count(text)["input_ids"])
    path.write_text(json.dumps({"loop": {**record, "texts": texts}}))
    return length


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--shape", choices=sorted(SHAPES), default="llama-3.2-3b", help="(%(default)s)")
    option("--tokenizer", required=True, help="model folder with the tokenizer")
    option("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    option("--document", type=int, default=10_000, help="its tokens, at least (%(default)s)")
    option("--tokens", type=int, default=2048, help="of the cartridge (%(default)s)")
    option("--prompts", type=int, default=32, help="rollouts per step (%(default)s)")
    option("--response", type=int, default=128, help="tokens per rollout (%(default)s)")
    option("--steps", type=int, default=6, help="(%(default)s)")
    option("--threads", type=int, default=4, help="CPU threads of each process (%(default)s)")
    option("--out", type=Path, required=True, help="folder of the run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    out: Path = options.out.resolve()
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    try:
        fresh_folder(out, (*RUN_FILES, "record.json", "model/**"))
        say("== model with random weights, and a document")
        model = out / "model"
        write_model(options.shape, options.tokenizer, dtype, options.device, model)
        length = write_record(options.tokenizer, options.document, out / "record.json")
        say(f"   {options.shape} in {dtype}; a document of {length} tokens")
        asked = Distillation(
            documents=str(out / "record.json"),
            model=str(model),
            out=out,
            name="loop",
            tokens=options.tokens,
            steps=options.steps,
            batch=options.prompts,
            response_tokens=options.response,
            test_every=0,
            save_every=options.steps,
            device=options.device,
            dtype=dtype,
            threads=options.threads,
        )
        with Supervisor() as supervisor:
            with stages.start_data(asked, out, supervisor) as writing:
                found = stages.finish_data(asked, writing, out, supervisor)
            url, up = stages.start_server(asked, supervisor)
            up.wait()
            stages.train(as_run(asked, url, found), supervisor)
    except (ChildFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(out / "model", ignore_errors=True)  # gigabytes that mean nothing
    return 0


if __name__ == "__main__":
    sys.exit(main())
