"""Cartridges over vLLM's ``LLM``, without a server. Long, and skipped where there is no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from cartridge_distill.cartridge.checkpoint import write_cartridge
from cartridge_distill.cartridge.formats.stored_cartridge import CartridgeMeta, StoredCartridge
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.engines.vllm.launch import PackagePath
from cartridge_distill.model.prompts import render_prompt
from tests.engines.vllm.rigs import model, vllm_python
from tests.tiny import byte_tokenizer, plain_distributions, random_cartridge, save_model

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(900)]

_SCRIPT = """
import json, sys
from cartridge_distill.engines.vllm.offline import CartridgeLLM
from cartridge_distill.engines.vllm.catalogue import NoCartridge
from cartridge_distill.engines.vllm.wanted import Misused

if __name__ == "__main__":
    from vllm import SamplingParams

    model, cartridge, question = sys.argv[1:]
    llm = CartridgeLLM(model, {"anna": cartridge}, dtype="float32", enforce_eager=True)
    said = {"answer": llm.ask("anna", question, max_tokens=16), "refused": []}
    for names, sampling in ((["bert"], {}), (["anna"], {"prompt_logprobs": 0})):
        try:
            llm.generate(names, [[10, 20]], SamplingParams(max_tokens=2, **sampling))
        except (NoCartridge, Misused) as error:
            said["refused"].append(str(error))
    print("SAID " + json.dumps(said))
"""


def test_an_answer_behind_a_cartridge(tmp_path: Path) -> None:
    python, source = vllm_python(), model("llama")
    save_model(source, tmp_path / "model")
    cartridge = random_cartridge(source, 32, seed=3)
    state = Snapshot.take(cartridge.state_dict(), torch.float32)
    meta = CartridgeMeta(str(tmp_path / "model"))
    write_cartridge(StoredCartridge(state, meta), tmp_path / "anna", "native")
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    package = PackagePath()
    given = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [python, script, tmp_path / "model", tmp_path / "anna", "Who?"],
        env=package.environment(given) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    package.remove()
    assert done.returncode == 0, done.stderr[-4000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    said = json.loads(line.removeprefix("SAID "))
    tokenizer = byte_tokenizer()
    ids = render_prompt(tokenizer, [{"role": "user", "content": "Who?"}])
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 16 and tokenizer.eos_token_id not in new:
            # A last token of any kind: what follows it is not asked for.
            scores = plain_distributions(source, cartridge.prefix(), ids, [*new, 0])
            new.append(int(scores[-1].argmax()))
    assert said["answer"] == tokenizer.decode(new, skip_special_tokens=True)
    assert "'bert'" in said["refused"][0] and "prompt_logprobs" in said["refused"][1]
