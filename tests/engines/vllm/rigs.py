"""Gateways over a real vLLM, for the long tests; skipped, and counted, where there is none.

``python -m cartridge_distill.engines.vllm --make-environment DIR`` makes the environment. Then::

    VLLM_PYTHON=DIR/bin/python pytest -m long tests/engines/vllm
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.cartridge.snapshot import Snapshot, split_layers
from cartridge_distill.rollout.answers import read_answer
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.sync.upload import encode
from tests.gateway.rig import COMPLETIONS, MODEL_NAME, Rig, completion
from tests.tiny import plain_logprobs, random_cartridge, save_model, tiny_model

MAX_TOKENS = 200
PROMPTS = [
    [10 + number, 20, 30 + 3 * number, 7, 5 + number][: 2 + number % 4] for number in range(16)
]


def vllm_python() -> str:
    """The Python of the environment with vLLM, or a skip that says how to make it."""
    found = os.environ.get("VLLM_PYTHON")
    if found is None:
        pytest.skip("VLLM_PYTHON is not set: there is no environment with vLLM")
    return found


def model(kind: str) -> PreTrainedModel:
    """A tiny model with heads of a size that vLLM's attention on a CPU has."""
    return tiny_model(kind, head_dim=32)


@contextmanager
def serving(
    kind: str,
    folder: Path,
    *server: object,
    dtype: str = "float32",
    options: tuple[object, ...] = (),
) -> Iterator[Rig]:
    """A gateway over vLLM with a tiny model.

    Args:
        server: further arguments of vLLM.
        dtype: of the model; vLLM itself would take a rounded one.
        options: further ones of the gateway.
    """
    python = vllm_python()
    save_model(model(kind), folder / "model")
    bounds = ("--max-request-tokens", MAX_TOKENS, "--max-cartridge-tokens", 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        # Threads that spin for a core that somebody else has make everybody slow.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        rig = Rig(
            *(folder, folder / "model", *bounds, *options),
            server=("--dtype", dtype, *server),
            engine_python=python,
        )
        with rig:
            yield rig


def prefix(source: PreTrainedModel, seed: int, tokens: int) -> Prefix:
    """Random keys and values of ordinary size."""
    with torch.no_grad():
        return random_cartridge(source, tokens, seed).prefix()


def put(
    rig: Rig, version: str, given: Prefix, dtype: torch.dtype = torch.float32
) -> httpx.Response:
    """Uploads a prefix as a version."""
    snapshot = Snapshot(split_layers(list(given.keys), list(given.values), 1))
    parts = {name: [t.to(dtype) for t in tensors] for name, tensors in snapshot.parts.items()}
    upload = encode(Snapshot(parts), MODEL_NAME, 0)
    return rig.put(version, b"".join(bytes(chunk) for chunk in upload.chunks()))


def ask(
    rig: Rig, versions: Sequence[str], prompt: list[int], max_tokens: int = 16, **more: Any
) -> list[Completion]:
    """Completions as the trainer's client reads them."""
    refs = [{"id": version, "source": "local"} for version in versions]
    body = completion(None, max_tokens, prompt=prompt, cartridges=refs, ignore_eos=True, **more)
    answer = rig.http.post(COMPLETIONS, json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return read_answer(answer.json(), more.get("n", 1), max_tokens)


def ask_all(
    rig: Rig, asked: Sequence[tuple[Sequence[str], list[int]]], **more: Any
) -> list[Completion]:
    """One completion for each (versions, prompt), all in flight at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        found = pool.map(lambda one: ask(rig, one[0], one[1], **more)[0], asked)
        return list(found)


def worst(
    source: PreTrainedModel,
    given: Prefix | None,
    prompt: list[int],
    found: Completion,
    temperature: float = 0.7,
) -> float:
    """Largest difference of an answer's log-probs from those of transformers."""
    want = plain_logprobs(source, given, prompt, found.token_ids, temperature)
    return max(abs(a - b) for a, b in zip(found.logprobs, want, strict=True))
