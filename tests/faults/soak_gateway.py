"""A soak of the gateway: load, new versions and killed servers at once, for minutes.

    python tests/faults/soak_gateway.py                    # five minutes
    python tests/faults/soak_gateway.py --seconds 60 --inflight 16 --kill-every 10

Starts the gateway, with the embedded server and a tiny model of random weights, as real processes.
Then, all at once: requests are kept in flight through the client, a new cartridge version is
uploaded every second, and the server process behind the gateway is killed (SIGKILL) again and
again. Each request has a prompt of its own and names the newest published version, or the one
before it.

A violation, and exit code 1, is: a request that ends without an answer; an answer that came twice;
an answer whose log-probs are not those of the version asked for, or are also those of the version
before it (every answer is computed again, at the end); a failed upload; an attempt that failed in
another way than with HTTP 503 right after a kill; a server process that died by itself; a version
on disk that is neither one of the newest, nor in use, nor about to be asked for again after a 503.

Needs nothing but this repository: no model, no GPU, no network. Only a server that answers is
killed: one that never comes up is a fault of its own, at which the gateway gives up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.arguments import require_at_least, require_multiple  # noqa: E402
from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS  # noqa: E402
from cartridge_distill.util.processes import ChildFailed, Supervisor, say, tail  # noqa: E402
from tests.faults.soak_check import FAR, TOLERANCE, Checker, since_kill  # noqa: E402
from tests.faults.soak_load import Soak  # noqa: E402
from tests.gateway.rig import Rig, use_token  # noqa: E402
from tests.tiny import endless_model, save_model  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--seconds", type=float, default=300.0, help="of load (%(default)s)")
    option("--inflight", type=int, default=64, help="requests at once (%(default)s)")
    option("--upload-every", type=float, default=1.0, help="seconds between versions (%(default)s)")
    option("--kill-every", type=float, default=20.0, help="seconds between kills (%(default)s)")
    option("--seed", type=int, default=0, help="of weights, prompts, versions (%(default)s)")
    option("--keep", type=int, default=6, help="versions the gateway keeps (%(default)s)")
    option("--new-tokens", type=int, default=4, help="of every answer (%(default)s)")
    option(
        "--cartridge-tokens", type=int, default=16, help="a multiple of 16 (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    moment = 0.1
    require_at_least(parser, options, seconds=moment, upload_every=moment, kill_every=moment)
    # A request that is tried again a second later must still find the version before.
    require_at_least(parser, options, inflight=1, new_tokens=1, keep=3)
    require_multiple(parser, options, cartridge_tokens=PAGE_TOKENS)
    return options


def print_report(soak: Soak, checker: Checker) -> None:
    """The table, and the verdict."""
    times = sorted(soak.latencies) or [float("nan")]
    others = checker.differences.others or [float("nan")]
    (gateway_0, server_0), (gateway_1, server_1) = soak.rss[0], soak.rss[-1]
    rows = [
        ("requests", f"{soak.asked}"),
        ("answers", f"{len(soak.answers)}, {len(soak.answers) / soak.options.seconds:.0f}/s"),
        ("uploads", f"{len(soak.published)} versions"),
        ("kills of the server process", f"{len(soak.kills)}"),
        ("restarts, by /metrics", f"{soak.restarts():.0f}"),
        (
            "latency p50, p99, longest",
            f"{_at(times, 0.5)}, {_at(times, 0.99)}, {_at(times, 1)}",
        ),
        (
            "versions on disk, at most",
            f"{soak.disk.most_versions} (kept: {soak.options.keep}, and what is in use, "
            "asked for again or being written)",
        ),
        ("bytes on disk, at most", f"{soak.disk.most_bytes / 1e6:.2f} MB"),
        (
            "memory of the gateway",
            f"{gateway_0:.0f} -> {gateway_1:.0f} MB ({gateway_1 - gateway_0:+.0f})",
        ),
        (
            "memory of the server",
            f"{server_0:.0f} -> {server_1:.0f} MB ({server_1 - server_0:+.0f}; another one)",
        ),
        (
            "log-probs, version asked for",
            f"differ by {checker.differences.own:.1e} at most (bound {TOLERANCE:.0e})",
        ),
        (
            "log-probs, version before it",
            f"differ by {min(others):.1e} at least (bound {FAR:.0e})",
        ),
        ("attempts made again", f"{len(soak.retries.attempts)}"),
    ]
    say("")
    for name, value in rows:
        say(f"   {name:<30} {value}")
    reasons = Counter(reason for _, reason in soak.retries.attempts)
    for reason, count in reasons.most_common():
        after = max(since_kill(t, soak.kills) for t, why in soak.retries.attempts if why == reason)
        say(f"      {count:>6} x {reason}; {after:.1f} s after a kill at most")
    say("")
    for kind, count in soak.kinds.items():
        say(f"   violated {count} times; the first stand above: {kind} ...")
    say(
        f"verdict: {len(soak.violations)} violations in {soak.options.seconds:.0f} s"
        f"{'' if soak.violations else '; every answer is there once, of the version asked for'}"
    )


def _at(times: list[float], share: float) -> str:
    return f"{times[min(len(times) - 1, int(share * len(times)))]:.2f} s"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as name, Supervisor() as supervisor:
            scratch = Path(name)
            machine = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start"
            say(f"soak of the gateway; {machine}; all of this in {scratch}")
            model = endless_model(options.seed)
            save_model(model, scratch / "model")
            use_token()
            rig = Rig(
                scratch,
                scratch / "model",
                *("--keep-versions", options.keep, "--max-inflight", 4096, "--drain-s", 3),
                supervisor=supervisor,
            ).start()
            say(
                f"   {rig.url} is up: {options.inflight} requests in flight for "
                f"{options.seconds:.0f} s, a version every {options.upload_every:g} s, a kill "
                f"every {options.kill_every:g} s"
            )
            soak = Soak(options, rig, model)
            asyncio.run(soak.run())
            checker = soak.verify()
            print_report(soak, checker)
            if soak.violations:
                say(tail(rig.log_file))
            return 1 if soak.violations else 0
    except KeyboardInterrupt:
        print("\nstopped; every process of the soak was ended", flush=True)
        return 130
    except ChildFailed as error:
        print(f"\nthe soak failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
