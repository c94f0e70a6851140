"""The whole loop on a CPU or one GPU: `make demo`, `cartridge-distill demo`.

A real pretrained model (SmolLM2-135M-Instruct) distils a fictional patient record into a cartridge,
on-policy: an embedded server that speaks Tokasaurus' protocol writes the rollouts, veRL trains, a
new cartridge version reaches the server after every step. At the end a table says what the
cartridge is worth. Everything started here is stopped here, also on Ctrl-C and on failure.

With --device cuda server and trainer share the one GPU, in bfloat16. A run of your own has its
steps as commands: `cartridge-distill prepare`, `serve`, `train`, `eval`.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path

import httpx

from cartridge_distill.data.command import DEFAULT_DATA
from cartridge_distill.engines.vllm.launch import PackagePath, ServeCommand, check_python
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.report.recipe import write_recipe
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.files import fresh_folder
from cartridge_distill.util.next_command import next_command, program, say_next, shorter
from cartridge_distill.util.processes import ChildFailed, Supervisor, follow, tail, wait_for
from verl_patches import launch
from verl_patches.launching.command import environment, overrides, python_path
from verl_patches.launching.settings import Run

PROGRAM = "cartridge-distill demo"
# A bfloat16 server and trainer round differently; the engine's check of a whole step is for that.
# In float32 only the order of their sums differs: by 1e-4 on a CPU, by 3e-5 on an H200 (outside
# veRL: `make gpu-check`, stage differences).
_CUDA_FLOAT32_BOUND = 1e-2
# Counted by Ray, not used: TransferQueue's actors take a CPU each, and wait for ever without.
_CUDA_RAY_CPUS = 16
_PROMPT_TOKENS = 192
_SPARE_TOKENS = 64  # of the context: a validation asks for longer answers


def parse(arguments: list[str] | None = None, name: str = PROGRAM) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--steps", type=int, default=36, help="optimizer steps (%(default)s)")
    option("--prompts", type=int, default=48, help="rollouts per step (%(default)s)")
    option("--response", type=int, default=6, help="tokens per rollout at most (%(default)s)")
    option(
        "--lr",
        type=float,
        default=0.03,
        help="learning rate of the first step; it falls to a tenth along a cosine (%(default)s)",
    )
    option("--tokens", type=int, default=128, help="cartridge tokens (%(default)s)")
    option(
        "--test-every",
        type=int,
        default=9,
        help="steps between validations on the held-out questions, 0 for none (%(default)s)",
    )
    option("--seed", type=int, default=0, help="of data, sampling and order (%(default)s)")
    option("--data", default=str(DEFAULT_DATA), help="records in LongHealth's schema")
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    option(
        "--out",
        type=Path,
        default=Path("runs") / "demo",
        help="everything goes here (%(default)s)",
    )
    option("--name", default="demo", help="of this recipe in a report of several (%(default)s)")
    option("--threads", type=int, default=os.cpu_count() or 2, help="CPU threads (%(default)s)")
    option("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    option(
        "--engine",
        default="embedded",
        choices=["embedded", "vllm"],
        help="what writes the rollouts (%(default)s)",
    )
    option("--engine-python", help="with vllm: the Python of its environment (docs/vllm.md)")
    option(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of the model in server and trainer (bfloat16 on cuda; float32 alone on a CPU)",
    )
    option(
        "override",
        nargs="*",
        help="further Hydra overrides, e.g. actor_rollout_ref.actor.cartridge.topk=50",
    )
    typed = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(typed)
    if options.device == "cuda":
        import torch  # seconds, which a demo on a CPU need not wait for

        if not torch.cuda.is_available():
            parser.error(
                f"--device cuda: torch {torch.__version__} sees no GPU here (nvidia-smi shows "
                "whether there is one); use --device cpu"
            )
    elif options.dtype == "bfloat16":
        parser.error("--dtype bfloat16 needs --device cuda; on a CPU the demo is in float32")
    if (options.engine == "vllm") != (options.engine_python is not None):
        parser.error("--engine vllm and --engine-python PATH go together")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.arguments = typed
    return options


def main(arguments: list[str] | None = None, name: str = PROGRAM) -> int:
    """Runs the demo; returns its exit status."""
    options = parse(arguments, name)
    start = time.monotonic()
    out: Path = options.out.resolve()
    try:
        fresh_folder(out)
        (out / "cartridges").mkdir()
        with Supervisor() as supervisor:
            run(options, out, supervisor)
    except KeyboardInterrupt:
        print("\nstopped; every process of the demo was ended", flush=True)
        return 130
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ChildFailed as error:
        print(f"\nthe demo failed: {error}\nall logs: {out}", file=sys.stderr)
        return 1
    print(f"\n{time.monotonic() - start:.0f} s in all, installation not counted")
    return 0


def run(options: argparse.Namespace, out: Path, supervisor: Supervisor) -> None:
    """The stages, one after the other."""
    model = options.model or get_model(out, supervisor)
    record(options, model, out)
    prepare_data(options, model, out, supervisor)
    url = start_server(options, model, out, supervisor)
    train(training(options, model, url, out), supervisor)
    supervisor.stop()  # the evaluation gets the whole machine
    print_proof(out, options.steps)
    evaluate(options, model, out, supervisor)
    from cartridge_distill.report.page import write_report  # --help needs no plotly

    report = write_report([out], out / "report.html")
    cartridge = shorter(out / "cartridge")
    print(f"\ncartridge: {cartridge}")
    print(f"logs:      {out}/*.log, metrics: {out}/metrics.jsonl")
    print(f"report:    {report}")
    say_next(
        next_command("chat", "--model", model, "--cartridge", cartridge),
        next_command("serve", "--model", model, "--cartridge", f"demo={cartridge}"),
    )


def record(options: argparse.Namespace, model: str, out: Path) -> None:
    """What repeats this run, for its report. The server's address is another one each time."""
    typed = [*shlex.split(program()), "demo", *options.arguments]
    settings = overrides(training(options, model, "http://127.0.0.1", out))
    write_recipe(out, typed, settings, options.seed, name=options.name, model=model)


def training(options: argparse.Namespace, model: str, url: str, out: Path) -> Run:
    """The run that veRL is asked for."""
    actor = "actor_rollout_ref.actor"
    return Run(
        model=model,
        data=out / "data",
        server=(url,),
        out=out,
        name="demo",
        sync_dir=out / "cartridges",
        tokens=options.tokens,
        lr=options.lr,
        batch=options.prompts,
        steps=options.steps,
        prompt_tokens=_PROMPT_TOKENS,
        response_tokens=options.response,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        save_every=options.steps,
        test_every=options.test_every or None,
        overrides=(
            # At a constant rate the held-out KL jumps between steps, and the last one decides.
            f"{actor}.optim.lr_scheduler_type=cosine",
            f"{actor}.optim.min_lr_ratio=0.1",
            *on_a_gpu(options),
            *options.override,
        ),
    )


def on_a_gpu(options: argparse.Namespace) -> list[str]:
    """Settings that --device cuda needs."""
    if options.device != "cuda":
        return []
    cpus = max(_CUDA_RAY_CPUS, os.cpu_count() or 1)
    found = [f"ray_kwargs.ray_init.num_cpus={cpus}"]
    if options.dtype == "float32":
        found.append(f"actor_rollout_ref.actor.cartridge.max_logprob_diff={_CUDA_FLOAT32_BOUND}")
    return found


def settings_of(options: argparse.Namespace, out: Path) -> dict[str, str]:
    """The environment of the stages beside the training, as the training has it."""
    return environment(training(options, "", "http://127.0.0.1", out))


def stage(
    command: list[str], name: str, out: Path, supervisor: Supervisor, env: dict[str, str]
) -> str:
    """Runs a short stage with its output shown; returns what it printed.

    Raises:
        ChildFailed: it ended with an error.
    """
    log = out / f"{name}.log"
    child = supervisor.start([sys.executable, *command], log, env)
    status = follow(child, log, lambda line: f"   {line}" if line.strip() else None, name)
    if status != 0:
        raise ChildFailed(f"{name} ended with status {status}.\n{tail(log)}")
    return log.read_text()


def get_model(out: Path, supervisor: Supervisor) -> str:
    print("== model", flush=True)
    printed = stage(
        ["-m", "cartridge_distill.model.demo_model"],
        "model",
        out,
        supervisor,
        python_path(os.environ),
    )
    return printed.strip().splitlines()[-1]


def prepare_data(
    options: argparse.Namespace, model: str, out: Path, supervisor: Supervisor
) -> None:
    print("== data", flush=True)
    command = ["-m", "cartridge_distill.data.command", "--data", options.data]
    command += ["--tokenizer", model]
    command += ["--out", str(out / "data"), "--seed", str(options.seed)]
    command += ["--rows", str(options.steps * options.prompts)]
    command += ["--prompt-tokens", str(_PROMPT_TOKENS), "--response-tokens", str(options.response)]
    stage(command, "data", out, supervisor, settings_of(options, out))


def start_server(options: argparse.Namespace, model: str, out: Path, supervisor: Supervisor) -> str:
    """Starts the embedded server or vLLM on a free port; returns its URL."""
    print("== rollout server", flush=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = out / "server.log"
    command = [sys.executable, "-m", "cartridge_distill.server", "--model", model]
    command += ["--port", str(port), "--cartridge-dir", str(out / "cartridges")]
    command += ["--threads", str(options.threads), "--seed", str(options.seed)]
    command += ["--device", options.device, "--dtype", options.dtype]
    settings = settings_of(options, out)
    if options.engine == "vllm":
        command, settings = vllm_server(options, model, port, out, settings)
    server = supervisor.start(command, log, settings)

    # One client: httpx.get() makes a TLS context, 60 ms of the server's cores, at every look.
    with httpx.Client(base_url=url, timeout=2) as http:

        def answers() -> bool:
            try:
                return http.get("/ping").status_code == 200
            except httpx.TransportError:
                return False

        # vLLM imports and compiles for a minute or two before it looks at the model.
        patience = 900 if options.engine == "vllm" else 180
        wait_for(answers, server, log, "server", timeout_s=patience)
    print(f"   {url} speaks Tokasaurus' protocol; cartridges from {out / 'cartridges'}", flush=True)
    return url


def vllm_server(
    options: argparse.Namespace, model: str, port: int, out: Path, settings: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command of a vLLM that reads the run's cartridges, and its environment.

    Raises:
        ConfigError: there is no such Python.
    """
    command = ServeCommand(
        model=model,
        options=Options(cartridge_dir=out / "cartridges", seed=options.seed),
        host="127.0.0.1",
        port=port,
        max_model_len=options.tokens + _PROMPT_TOKENS + options.response + _SPARE_TOKENS,
        dtype=options.dtype,
        more=("--seed", str(options.seed)),
    )
    package = PackagePath()
    # It must outlive this function, and is gone with this process.
    atexit.register(package.remove)
    return command.own(check_python(options.engine_python)), package.environment(settings)


def train(run: Run, supervisor: Supervisor) -> None:
    """veRL, with one line a step shown; the cartridge of the last step is copied out.

    Raises:
        ChildFailed: it ended with an error; the cause is named.
    """
    print("== training with veRL", flush=True)
    saved = launch.train(run, supervisor)
    assert saved is not None  # the last step is saved
    shutil.copytree(saved, run.folder / "cartridge")


def print_proof(out: Path, steps: int) -> None:
    """What shows that the run was what it says, from the server's log and the trainer's metrics."""
    loaded = re.findall(r"loaded cartridge (\S+):", (out / "server.log").read_text())
    logged = [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    # The line before the first step has the validation alone.
    metrics = [step for step in logged if "actor/loss" in step]
    worst = max(step["actor/logprob_diff/max"] for step in metrics)
    changed = sum(step["actor/frozen_tokens_changed"] for step in metrics)
    print("== proof", flush=True)
    print(
        f"   versions the server loaded: {len(set(loaded))} "
        f"(the initial one and one for each of {steps} steps)"
    )
    print(f"   largest server/trainer log-prob difference of {len(metrics)} steps: {worst:.1e}")
    # The engine does not save a cartridge over a base that changed, and this one was saved.
    print(f"   steps in which a frozen token changed: {changed:.0f}; base weights: unchanged")


def evaluate(options: argparse.Namespace, model: str, out: Path, supervisor: Supervisor) -> None:
    print("== evaluation on questions that were not trained on", flush=True)
    command = ["-m", "cartridge_distill.cli.main", "eval", "--model", model]
    command += ["--data", str(out / "data"), "--cartridge", str(out / "cartridge")]
    command += ["--out", str(out / "evaluation"), "--seed", str(options.seed)]
    stage(command, "evaluation", out, supervisor, settings_of(options, out))


if __name__ == "__main__":
    sys.exit(main())
