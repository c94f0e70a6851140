"""A gateway of one's own for a script: a small model made on the spot, a real process, one token.

The model has random weights and the shape that is asked for, so nothing is downloaded and the
cartridges can have the size of those of a large model. Knows nothing of what is measured with it.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.gateway.settings import TOKEN_VARIABLE
from cartridge_distill.rollout.http import auth_headers
from cartridge_distill.util.processes import Supervisor, wait_for

BASE_MODEL = "tiny"
_START_SECONDS = 180.0
_URL = re.compile(r"gateway on (http://[0-9.]+:\d+)")


@dataclass(frozen=True)
class Shape:
    """A Llama's shape. What a cartridge depends on is its layers, KV heads and head size."""

    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    query_heads: int = 4
    hidden: int = 64
    vocabulary: int = 256
    context: int = 16_384


def make_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """Random weights, float32, no end token: every answer has as many tokens as asked for."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation: distributions far from uniform, so that another
            # cartridge, or another prompt, gives other log-probs.
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """As transformers saves it, with :func:`byte_tokenizer`."""
    disable_progress_bar()  # it would be the first line of every report
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def random_cartridge(shape: Shape, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """A cartridge's float32 state dict, one frozen token; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn((1, shape.kv_heads, count, shape.head_dim), generator=generator)

    return {
        f"{part}_{kind}.{layer}": draw(count)
        for part, count in (("frozen", 1), ("trainable", tokens - 1))
        for kind in ("keys", "values")
        for layer in range(shape.layers)
    }


def random_version(shape: Shape, tokens: int, seed: int) -> Snapshot:
    """The same as a float32 snapshot."""
    return Snapshot.take(random_cartridge(shape, tokens, seed), torch.float32)


class RunningGateway:
    """The gateway as a child process, with the embedded server as its own child.

    Args:
        supervisor: ends it.
        model: folder of the model.
        scratch: cartridges and the log go here.
        arguments: further ones of the gateway.
        server_arguments: of the embedded server.

    Raises:
        ChildFailed: it did not come up; the message has the end of its log.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        model: Path,
        scratch: Path,
        arguments: Sequence[str] = (),
        server_arguments: Sequence[str] = (),
    ) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.log, self.cartridges = scratch / "gateway.log", scratch / "cartridges"
        # The client of this process reads it, too; a second gateway of a script keeps it.
        os.environ.setdefault(TOKEN_VARIABLE, secrets.token_urlsafe(32))
        self._process = supervisor.start(
            [
                *(sys.executable, "-m", "cartridge_distill.gateway"),
                *("--model", str(model), "--model-name", BASE_MODEL, "--port", "0"),
                *("--cartridge-dir", str(self.cartridges), "--drain-s", "3"),
                *arguments,
                "--",
                *server_arguments,
            ],
            self.log,
            child_environment(),
        )
        self.url = ""
        self._http = httpx.Client(headers=auth_headers(), timeout=10.0)
        wait_for(self._answers, self._process, self.log, "the gateway", _START_SECONDS)

    def _answers(self) -> bool:
        if not self.url and (found := _URL.search(self.log.read_text(errors="replace"))):
            self.url = found[1]
        return bool(self.url) and self.is_up()

    def is_up(self) -> bool:
        """Does the server behind the gateway answer?"""
        try:
            return self._http.get(self.url + "/ping").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def alive(self) -> bool:
        """Is the gateway's own process there?"""
        return self._process.poll() is None

    @property
    def process(self) -> psutil.Process:
        """The gateway's own process."""
        return psutil.Process(self._process.pid)

    def server_process(self) -> psutil.Process | None:
        """The server that the gateway has started; None between two of them."""
        for child in self.process.children():
            try:
                if "cartridge_distill.server" in child.cmdline():
                    return child
            except psutil.NoSuchProcess:
                pass  # it ended between two looks
        return None

    def server_url(self) -> str:
        """Where the server itself listens, to ask it without the gateway.

        Raises:
            RuntimeError: it is not there now.
        """
        server = self.server_process()
        if server is None:
            raise RuntimeError("the gateway has no server process now")
        command = server.cmdline()
        return f"http://127.0.0.1:{command[command.index('--port') + 1]}"

    def metrics(self) -> dict[tuple[str, ...], float]:
        """``/metrics``, by name (without prefix) and label values in order of the label names."""
        response = self._http.get(self.url + "/metrics")
        response.raise_for_status()
        return {
            (
                sample.name.removeprefix("cartridge_gateway_"),
                *(sample.labels[name] for name in sorted(sample.labels)),
            ): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }


def child_environment() -> dict[str, str]:
    """For processes of this project: they find the code, and ask no hub for anything."""
    root = str(Path(__file__).resolve().parents[2])
    path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def megabytes(process: psutil.Process | None) -> float:
    """Resident memory; NaN for a process that is not there."""
    try:
        return process.memory_info().rss / 1e6 if process is not None else float("nan")
    except psutil.NoSuchProcess:
        return float("nan")


def machine() -> str:
    """CPUs and load, for the top of a report."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} CPUs, load {os.getloadavg()[0]:.1f} at the start"
