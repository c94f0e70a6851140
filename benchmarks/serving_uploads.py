"""What an upload through the gateway costs: part (a) of `serving.py`."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.measure import verdict
from cartridge_distill.cartridge.snapshot import Snapshot
from cartridge_distill.rollout.client import TokasaurusClient
from cartridge_distill.rollout.protocol import CartridgeRef
from cartridge_distill.sync.http import HttpPublisher
from cartridge_distill.sync.upload import Upload, encode
from cartridge_distill.sync.versions import new_run_id, version_id
from cartridge_distill.util.processes import Supervisor, say
from tests.gateway.rig import MODEL_NAME, Rig
from tests.tiny import endless_model, random_cartridge, save_model

_AIM_RATIO, _AIM_BLOCKED_S = 2.0, 0.5
STAGES = ("received", "placed", "activated")  # of an upload, as the gateway's metrics name them
PROCESSES = ("client", "gateway", "server")
_WARM_UP = 4


@dataclass
class Times:
    """Seconds of each repeat, by stage."""

    stages: dict[str, list[float]] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.stages.setdefault(stage, []).append(seconds)

    def median(self, stage: str) -> float:
        return statistics.median(self.stages[stage])


def write_and_sync(upload: Upload, path: Path) -> float:
    """Seconds to write the upload's bytes to a file and to flush it to the disk."""
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for chunk in upload.chunks():
            file.write(chunk)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def upload_once(
    publisher: HttpPublisher,
    rig: Rig,
    state: Mapping[str, Tensor],
    version: str,
    times: Times,
) -> Snapshot:
    """One version by the trainer's own steps, each timed."""
    start = time.perf_counter()
    snapshot = Snapshot.take(state, torch.bfloat16)
    times.add("blocked", time.perf_counter() - start)
    # Done once more inside publish, beside the sending.
    start = time.perf_counter()
    upload = encode(snapshot, MODEL_NAME, 0)
    times.add("encode", time.perf_counter() - start)
    times.add("disk", write_and_sync(upload, rig.cartridges.parent / "baseline"))
    before, cpu_before = rig.metrics(), cpu_seconds(rig)
    start = time.perf_counter()
    publisher.publish(version, snapshot)
    times.add("publish", time.perf_counter() - start)
    for process, seconds in cpu_seconds(rig).items():
        times.add(f"cpu {process}", seconds - cpu_before[process])
    after = rig.metrics()
    for stage in STAGES:
        key = ("upload_stage_seconds_sum", stage)
        times.add(stage, after[key] - before.get(key, 0.0))
    times.add("token", asyncio.run(seconds_of_a_token(rig.server_url(), version)))
    return snapshot


def cpu_seconds(rig: Rig) -> dict[str, float]:
    """What the three processes have computed so far, their kernel's share included."""
    gateway = psutil.Process(rig.process.pid)
    found = {"client": psutil.Process(), "gateway": gateway, "server": rig.server}
    times = {name: process.cpu_times() for name, process in found.items()}
    return {name: time.user + time.system for name, time in times.items()}


async def seconds_of_a_token(url: str, version: str) -> float:
    """One more token with a version that the server has loaded."""
    refs = [CartridgeRef(id=version, source="local")]
    async with TokasaurusClient(url) as client:
        await client.ping()  # connects
        start = time.perf_counter()
        await client.complete([0], 1, 0.0, refs)
        return time.perf_counter() - start


def upload_table(options: argparse.Namespace, scratch: Path, supervisor: Supervisor) -> None:
    model = endless_model(
        num_hidden_layers=options.layers,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        num_attention_heads=options.kv_heads,
    )
    save_model(model, scratch / "model")
    state = random_cartridge(model, options.tokens).state_dict()
    width = 2 if options.dtype == "bfloat16" else 4
    memory_gb = 2.1 * width * sum(tensor.numel() for tensor in state.values()) / 2**30
    say("\n== (a) upload: starting a gateway with a model of that KV shape")
    rig = Rig(
        scratch,
        scratch / "model",
        *("--keep-versions", 2, "--drain-s", 3),
        # The server holds two versions, as the gateway does; what goes leaves its memory behind.
        server=("--dtype", options.dtype, "--cartridge-memory-gb", memory_gb),
        supervisor=supervisor,
    ).start()
    say(f"   {_WARM_UP} uploads first, until the server replaces versions as it does in a long run")
    run, times, publisher = new_run_id("bench"), Times(), HttpPublisher([rig.url], MODEL_NAME)
    for number in range(1 - _WARM_UP, options.repeats + 1):
        kept = times if number > 0 else Times()
        version = version_id(run, number + _WARM_UP)
        snapshot = upload_once(publisher, rig, state, version, kept)
        if number > 0:
            last = {stage: found[-1] for stage, found in times.stages.items()}
            say(
                f"   ... {number}/{options.repeats}: publish {last['publish']:.2f} s, "
                f"write + fsync {last['disk']:.2f} s, blocked {last['blocked']:.3f} s"
            )
    supervisor.stop()
    count, size = snapshot.num_bytes / 2e6, snapshot.num_bytes / 1e6
    disk, publish, blocked = map(times.median, ("disk", "publish", "blocked"))
    say(
        f"\n(a) upload of {count:.1f} M parameters, {size:.0f} MB in bfloat16, to a server that "
        f"computes in {options.dtype}; median of {options.repeats}"
    )
    say(f"   {'':<46}{'seconds':>9}{'MB/s':>8}")
    for name, seconds in (
        ("trainer blocked (copy, float32 -> bfloat16)", blocked),
        ("write + fsync of the same bytes, once", disk),
        ("published: from the copy until it works", publish),
        ("   sent; hashed, checked and written meanwhile", times.median("received")),
        ("   flushed to the disk and renamed", times.median("placed")),
        ("   loaded by the server, and one token", times.median("activated")),
    ):
        say(f"   {name:<46}{seconds:>9.3f}{size / seconds:>8.0f}")
    hashed, activated = times.median("encode"), times.median("activated")
    say(f"   (described and hashed, by the client, alone: {hashed:.3f} s, which it does meanwhile)")
    say(f"   (another token with it: {1000 * times.median('token'):.0f} ms)")
    spent = ", ".join(f"{name} {times.median(f'cpu {name}'):.2f}" for name in PROCESSES)
    say(f"   CPU seconds of a publication: {spent}")
    say(
        f"   one hash, and then loading and one token, cannot overlap: {hashed + activated:.3f} s, "
        f"{(hashed + activated) / disk:.2f}x"
    )
    ratio = publish / disk
    say(f"   published / (write + fsync): {ratio:.2f}x   {verdict(ratio, _AIM_RATIO, 'x')}")
    say(f"   trainer blocked: {blocked:.3f} s   {verdict(blocked, _AIM_BLOCKED_S, ' s')}")
