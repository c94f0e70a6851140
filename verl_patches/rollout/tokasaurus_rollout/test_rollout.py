"""The rollout end to end, without a trainer: Ray, the replica, the HTTP proxy and a server.

A script, not a pytest file. It composes the project's own configuration, builds
``TokasaurusReplica`` from veRL's registry as veRL's server manager does, waits for the server,
publishes and activates a cartridge version, and asks for a few prompts at once as an agent loop
does. Every answer is checked: tokens, log-probs, version label; with ``--compare`` also the
log-probs against the trainer's own forward over the same cartridge. Nothing is trained.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from verl.workers.rollout.replica import TokenOutput, get_rollout_replica_class

from cartridge_distill.cartridge.checkpoint import load_cartridge
from cartridge_distill.cartridge.kv_shape import text_config
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.cartridge.trainable import TrainableCache
from cartridge_distill.distill.on_policy import ONLY_STEP
from cartridge_distill.model.forward import packed_forward
from cartridge_distill.model.loading import load_model
from cartridge_distill.model.logprobs import chosen_logprobs
from cartridge_distill.model.packing import pack
from cartridge_distill.model.prompts import render_prompt
from cartridge_distill.server.running import BackgroundServer
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.shared_dir import CartridgePublisher, SharedDirectoryPublisher
from cartridge_distill.sync.versions import new_run_id, step_of, version_id
from cartridge_distill.util.errors import CartridgeDistillError, ConfigError, SyncError
from cartridge_distill.util.standard_output import guard_output
from verl_patches.rollout.tokasaurus_rollout.direct import DirectClient

PROMPTS = (
    "What is the patient's name?",
    "Describe the medication.",
    "Which operations were there, and when?",
    "Hello",
)
CONFIG = Path(__file__).resolve().parents[2] / "config"
# The versions are published in float32: what is left is the order of the sums.
LARGEST_DIFFERENCE = 1e-3
EXAMPLES = """\
examples:
  # everything on this machine; the embedded server is started and stopped
  python -m verl_patches.rollout.tokasaurus_rollout.test_rollout --model path/to/model --compare

  # a gateway that runs already: the version is uploaded (TOKASAURUS_API_KEY is its token)
  ... --url http://gpu-box:10210 --model meta-llama/Llama-3.2-3B-Instruct

  # a server without one; DIR is its --cartridge-dir as this machine sees it
  ... --url http://gpu-box:10210 --cartridge-dir DIR --model meta-llama/Llama-3.2-3B-Instruct

  # a version that the server has already, nothing is published
  ... --url http://gpu-box:10210 --version demo-20260101120000-ab12-step-000032 --model ...

exit status: 0 all answers are good, 1 an error or a bad answer, which is named
"""


@dataclass(frozen=True)
class Rollout:
    """One answer, with what was asked."""

    prompt: str
    prompt_ids: list[int]
    output: TokenOutput


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m verl_patches.rollout.tokasaurus_rollout.test_rollout",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--url", help="of a running server (default: the embedded one is started here)")
    option("--model", required=True, help="folder or hub id of the model that is served")
    option("--cartridge", help="to publish: directory, .pt file, hub id (default: random numbers)")
    option("--cartridge-dir", type=Path, help="the server's, with --url (default: upload)")
    option("--served-model", help="what the gateway calls the model (default: --model)")
    option("--version", help="a version id that the server has already; nothing is published")
    option("--prompt", action="append", metavar="TEXT", help="may be repeated (default: four)")
    option("--copies", type=int, default=2, help="rollouts of each prompt (%(default)s)")
    option("--max-tokens", type=int, default=8, help="tokens of a rollout (%(default)s)")
    option("--temperature", type=float, default=0.7, help="of sampling (%(default)s)")
    option("--tokens", type=int, default=32, help="of the random cartridge (%(default)s)")
    option("--wait", type=float, default=120.0, help="seconds to wait for the server (%(default)s)")
    option("--compare", action="store_true", help="load the model here and compare log-probs")
    options = parser.parse_args(arguments)
    if options.cartridge_dir and options.version:
        parser.error("--cartridge-dir publishes a version, --version takes one that is there")
    if not options.url and options.version:
        parser.error("--version needs --url: the embedded server starts with no cartridge")
    if options.version and options.compare and not options.cartridge:
        parser.error("--compare with --version needs --cartridge: what that version holds")
    return options


def say(line: str) -> None:
    print(line, flush=True)


# ---------------------------------------------------------------- what the replica talks to


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[tuple[str, CartridgePublisher]]:
    """URL of the server to test, and the way to it; an embedded one ends with the block."""
    base_model = options.served_model or options.model
    if options.url:
        if options.cartridge_dir:
            yield options.url, SharedDirectoryPublisher(options.cartridge_dir, base_model)
        else:
            yield options.url, HttpPublisher([options.url], base_model)
        return
    with tempfile.TemporaryDirectory(prefix="cartridges-") as folder:
        say(f"starting the embedded server with {options.model} ...")
        model = load_model(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        settings = ServerSettings(cartridge_dir=Path(folder), model_name=options.model)
        with BackgroundServer(model, tokenizer, settings) as running:
            yield running.url, SharedDirectoryPublisher(folder, base_model)


def make_cartridge(options: argparse.Namespace) -> TrainableCache:
    """The cartridge to be served: the one named, or random numbers of the model's shape."""
    if options.cartridge:
        return load_cartridge(options.cartridge)
    config = AutoConfig.from_pretrained(options.model)
    return TrainableCache.from_random(config, options.tokens, std=1.0)


def publish(cartridge: TrainableCache, publisher: CartridgePublisher) -> str:
    """Publishes a version 0 of a run of its own; returns its id."""
    version = version_id(new_run_id("test"), 0)
    snapshot = Snapshot.take(cartridge.state_dict(), torch.float32)
    publisher.publish(version, snapshot)
    return version


# ---------------------------------------------------------------- through veRL


def compose_config(options: argparse.Namespace, url: str) -> DictConfig:
    """The project's configuration, with this run's numbers."""
    rollout = "actor_rollout_ref.rollout"
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(
            "cartridge_distill",
            overrides=[
                "platform=cpu",
                f"data.max_response_length={options.max_tokens}",
                f"actor_rollout_ref.model.path={options.model}",
                f"{rollout}.custom.tokasaurus_url={url}",
                f"{rollout}.custom.client.startup_timeout_s={options.wait}",
            ],
        )


def build_replica(config: DictConfig) -> Any:
    """As ``LLMServerManager`` of veRL does.

    Raises:
        ConfigError: veRL's registry does not know the name.
    """
    rollout = config.actor_rollout_ref.rollout
    try:
        replica_class = get_rollout_replica_class(rollout.name)
    except ValueError as error:
        raise ConfigError(f"{error}; fix: python -m verl_patches apply") from error
    return replica_class(
        replica_rank=0,
        config=rollout,
        model_config=config.actor_rollout_ref.model,
        gpus_per_node=1,
    )


async def roll_out(
    replica: Any, version: str, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> list[Rollout]:
    """Launches the proxy, activates the version, and asks for all prompts at once as an agent loop
    does."""
    await replica.launch_servers()
    proxy = replica.server_handle
    say(f"the replica's proxy is up, the server at {replica.server_address} answers")
    await proxy.expect.remote(version)
    await proxy.activate.remote(version)
    say(f"active version: {version}")
    texts = [text for text in (options.prompt or PROMPTS) for _ in range(options.copies)]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    sampling = {"temperature": options.temperature, "top_p": 1.0, "top_k": -1}
    sampling[ONLY_STEP] = step_of(version)
    client = DirectClient(lambda: [proxy])
    start = time.perf_counter()
    outputs = await asyncio.gather(
        *[
            client.generate(f"test-{number}", prompt_ids=ids, sampling_params=sampling)
            for number, ids in enumerate(prompts)
        ]
    )
    seconds = time.perf_counter() - start
    await client.close()
    tokens = sum(len(output.token_ids) for output in outputs)
    say(f"{len(outputs)} rollouts at once: {tokens} tokens in {seconds:.2f} s")
    return [
        Rollout(text, ids, output)
        for text, ids, output in zip(texts, prompts, outputs, strict=True)
    ]


# ---------------------------------------------------------------- judging


def problems(rollout: Rollout, version: str, max_tokens: int, vocabulary: int) -> list[str]:
    """What is wrong with an answer; empty when nothing is."""
    output, found = rollout.output, []
    tokens, logprobs = output.token_ids, output.log_probs or []
    if not 1 <= len(tokens) <= max_tokens:
        found.append(f"{len(tokens)} tokens, asked for 1 to {max_tokens}")
    if any(not 0 <= token < vocabulary for token in tokens):
        found.append(f"token ids outside 0..{vocabulary - 1}: {tokens}")
    if len(logprobs) != len(tokens):
        found.append(f"{len(logprobs)} log-probs for {len(tokens)} tokens")
    if any(not math.isfinite(p) or p > 1e-4 for p in logprobs):
        found.append(f"log-probs that are none: {logprobs}")
    labels = output.extra_fields
    labelled = labels.get("cartridge_version")
    if labelled != version or labels.get("global_steps") != step_of(version):
        found.append(f"labelled {labelled!r}, active is {version!r}")
    return found


@torch.no_grad()
def differences(
    rollouts: Sequence[Rollout], cartridge: TrainableCache, model_name: str, temperature: float
) -> list[float]:
    """The largest |server - trainer| log-prob of each rollout, by the trainer's own forward."""
    model = load_model(model_name)
    sequences = [torch.tensor(r.prompt_ids + list(r.output.token_ids)) for r in rollouts]
    batch = pack(sequences)
    response_mask = torch.cat(
        [
            torch.arange(len(sequence)) >= len(rollout.prompt_ids)
            for sequence, rollout in zip(sequences, rollouts, strict=True)
        ]
    )
    logits = packed_forward(model, cartridge.prefix(), batch, batch.predicts(response_mask))
    trainer = chosen_logprobs(logits, batch.tokens(response_mask), temperature)
    counts = [len(rollout.output.token_ids) for rollout in rollouts]
    return [
        (mine - torch.tensor(rollout.output.log_probs)).abs().max().item()
        for mine, rollout in zip(trainer.split(counts), rollouts, strict=True)
    ]


def print_table(
    rollouts: Sequence[Rollout],
    off: Sequence[float] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    say(f"\n{'prompt':<32} {'tokens':>6} {'end':>6} {'log-prob':>9} {'trainer':>8}  answer")
    for number, rollout in enumerate(rollouts):
        output = rollout.output
        text = tokenizer.decode(output.token_ids, skip_special_tokens=True)
        mean = sum(output.log_probs) / max(len(output.log_probs), 1)
        compared = f"{off[number]:.1e}" if off is not None else "-"
        say(
            f"{rollout.prompt[:32]:<32} {len(output.token_ids):>6} "
            f"{output.extra_fields['finish_reason']:>6} {mean:>9.3f} {compared:>8}  {text[:40]!r}"
        )


def run(options: argparse.Namespace) -> int:
    """All of it; returns how many answers are bad."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    vocabulary = text_config(AutoConfig.from_pretrained(options.model)).vocab_size
    cartridge = make_cartridge(options) if options.cartridge or not options.version else None
    with server(options) as (url, publisher):
        replica = build_replica(compose_config(options, url))
        if options.version:
            version = options.version
        else:
            assert cartridge is not None
            version = publish(cartridge, publisher)
        say("starting Ray ...")
        # Counted, not used: the proxy takes no CPU. Two, so that it starts on any machine.
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            rollouts = asyncio.run(roll_out(replica, version, options, tokenizer))
        finally:
            ray.shutdown()
    off = None
    if options.compare:
        assert cartridge is not None
        off = differences(rollouts, cartridge, options.model, options.temperature)
    print_table(rollouts, off, tokenizer)
    bad = 0
    for number, rollout in enumerate(rollouts):
        found = problems(rollout, version, options.max_tokens, vocabulary)
        if off is not None and not off[number] <= LARGEST_DIFFERENCE:
            found.append(
                f"log-probs differ from the trainer's by {off[number]:.2g}, over "
                f"{LARGEST_DIFFERENCE:g}: not this cartridge, model, dtype or temperature"
            )
        bad += bool(found)
        for problem in found:
            say(f"BAD rollout {number} ({rollout.prompt!r}): {problem}")
    say(f"\n{len(rollouts) - bad} of {len(rollouts)} rollouts are good")
    return bad


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    os.environ.setdefault("VERL_PLATFORM", "cpu")  # no model runs here, wherever the server is
    try:
        return 1 if run(options) else 0
    except (ray.exceptions.RayTaskError, CartridgeDistillError, OSError) as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        if isinstance(cause, SyncError):
            print("is --cartridge-dir the directory that the server reads?", file=sys.stderr)
    return 1


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
