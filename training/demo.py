"""The whole loop on a CPU or one GPU: `make demo`.

A real pretrained model (SmolLM2-135M-Instruct) distils a fictional patient record into a cartridge,
on-policy: an embedded server that speaks Tokasaurus' protocol writes the rollouts, veRL trains, a
new cartridge version reaches the server after every step. At the end a table says what the
cartridge is worth. Everything started here is stopped here, also on Ctrl-C and on failure.

`make demo DEMO="--device cuda"` puts server and trainer on the one GPU, in bfloat16. A run of your
own is the same command with other numbers: see run_cartridge_distill.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from cartridge_distill.report.page import write_report  # noqa: E402
from cartridge_distill.report.recipe import write_recipe  # noqa: E402
from cartridge_distill.util.node import missing_settings  # noqa: E402
from cartridge_distill.util.openmp import spinning  # noqa: E402
from cartridge_distill.util.processes import (  # noqa: E402
    ChildFailed,
    Supervisor,
    follow,
    tail,
    wait_for,
)

# A bfloat16 server and trainer round differently; the engine's check of a whole step is for that.
# In float32 only the order of their sums differs: by 1e-4 on a CPU. No GPU has been measured.
_CUDA_FLOAT32_BOUND = 1e-2
# Counted by Ray, not used: TransferQueue's actors take a CPU each, and wait for ever without.
_CUDA_RAY_CPUS = 16
_ERROR = re.compile(r"(?:cartridge_distill\.errors\.)?\w*(?:Error|Unreachable)\b.*: \S")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    option(
        "--data", default=str(HERE / "data" / "demo.json"), help="records in LongHealth's schema"
    )
    option("--model", help="folder or hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    option(
        "--out",
        type=Path,
        default=ROOT / "runs" / "demo",
        help="everything goes here (%(default)s)",
    )
    option("--name", default="demo", help="of this recipe in a report of several (%(default)s)")
    option("--threads", type=int, default=os.cpu_count() or 2, help="CPU threads (%(default)s)")
    option("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
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
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.arguments = typed
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    out: Path = options.out.resolve()
    if out.exists():
        shutil.rmtree(out)
    (out / "cartridges").mkdir(parents=True)
    try:
        with Supervisor() as supervisor:
            run(options, out, supervisor)
    except KeyboardInterrupt:
        print("\nstopped; every process of the demo was ended", flush=True)
        return 130
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
    train(options, model, url, out, supervisor)
    supervisor.stop()  # the evaluation gets the whole machine
    print_proof(out, options.steps)
    evaluate(options, model, out, supervisor)
    report = write_report([out], out / "report.html")
    cartridge = out / "cartridge"
    print(f"\ncartridge: {cartridge}")
    print(
        f"chat:      {python()} -m cartridge_distill.cli.chat "
        f"--model {model} --cartridge {cartridge}"
    )
    print(f"logs:      {out}/*.log, metrics: {out}/metrics.jsonl")
    print(f"report:    {report}")


def record(options: argparse.Namespace, model: str, out: Path) -> None:
    """What repeats this run, for its report. The server's address is another one each time."""
    command = [python(), "training/demo.py", *options.arguments]
    settings = overrides(options, model, "http://127.0.0.1", out)
    write_recipe(out, command, settings, options.seed, name=options.name, model=model)


def python() -> str:
    """The interpreter as a person would type it."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(ROOT) else str(path)


def environment(options: argparse.Namespace, out: Path) -> dict[str, str]:
    gpu = options.device == "cuda"
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VERL_PLATFORM": "" if gpu else "cpu",  # empty: veRL looks which card there is
        "VERL_USE_EXTERNAL_MODULES": "verl_patches.plugin",
        "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
        "VERL_LOGGING_LEVEL": os.environ.get("VERL_LOGGING_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": str(options.threads),
        **spinning(os.environ),
        # Activations come and go by the megabyte. glibc would give them back to the system each
        # time and take clean pages again: a tenth of the trainer's step.
        "MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(2**30)),
        "MALLOC_TRIM_THRESHOLD_": os.environ.get("MALLOC_TRIM_THRESHOLD_", str(2**32)),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": "0",
        **{setting.name: setting.value for setting in missing_settings(os.environ, gpu)},
    }


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
    printed = stage([str(HERE / "get_demo_model.py")], "model", out, supervisor, {})
    return printed.strip().splitlines()[-1]


def prepare_data(
    options: argparse.Namespace, model: str, out: Path, supervisor: Supervisor
) -> None:
    print("== data", flush=True)
    command = [str(HERE / "prepare_data.py"), "--data", options.data, "--tokenizer", model]
    command += ["--out", str(out / "data"), "--seed", str(options.seed)]
    command += ["--rows", str(options.steps * options.prompts)]
    stage(command, "data", out, supervisor, environment(options, out))


def start_server(options: argparse.Namespace, model: str, out: Path, supervisor: Supervisor) -> str:
    """Starts the embedded server on a free port; returns its URL."""
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
    server = supervisor.start(command, log, environment(options, out))

    # One client: httpx.get() makes a TLS context, 60 ms of the server's cores, at every look.
    with httpx.Client(base_url=url, timeout=2) as http:

        def answers() -> bool:
            try:
                return http.get("/ping").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, server, log, "server", timeout_s=180)
    print(f"   {url} speaks Tokasaurus' protocol; cartridges from {out / 'cartridges'}", flush=True)
    return url


def overrides(options: argparse.Namespace, model: str, url: str, out: Path) -> list[str]:
    """The run in Hydra's words: what differs from training/config/cartridge_distill.yaml."""
    data, actor = out / "data", "actor_rollout_ref.actor"
    return [
        *platform_overrides(options),
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/val.parquet",
        f"data.train_batch_size={options.prompts}",
        "data.max_prompt_length=192",
        f"data.max_response_length={options.response}",
        f"data.seed={options.seed}",
        f"actor_rollout_ref.model.path={model}",
        f"{actor}.cartridge.num_tokens={options.tokens}",
        f"{actor}.cartridge.lr={options.lr}",
        # At a constant rate the held-out KL jumps between steps, and the last one decides.
        f"{actor}.optim.lr_scheduler_type=cosine",
        f"{actor}.optim.min_lr_ratio=0.1",
        f"{actor}.cartridge.documents={data}/documents.jsonl",
        f"{actor}.cartridge.eval_questions={data}/eval.json",
        f"{actor}.cartridge.sync_dir={out}/cartridges",
        f"{actor}.cartridge.run_name=demo",
        f"actor_rollout_ref.rollout.custom.tokasaurus_url={url}",
        "trainer.logger=[console,file]",
        f"trainer.total_training_steps={options.steps}",
        f"trainer.save_freq={options.steps}",
        f"trainer.test_freq={options.test_every or -1}",
        f"trainer.val_before_train={options.test_every > 0}",
        f"trainer.default_local_dir={out}/checkpoints",
        *options.override,
    ]


def platform_overrides(options: argparse.Namespace) -> list[str]:
    """What device and dtype change."""
    found = [f"platform={options.device}"]
    if options.device == "cuda":
        found.append(f"actor_rollout_ref.actor.fsdp_config.model_dtype={options.dtype}")
        cpus = max(_CUDA_RAY_CPUS, os.cpu_count() or 1)
        found.append(f"ray_kwargs.ray_init.num_cpus={cpus}")
        if options.dtype == "float32":
            bound = f"actor_rollout_ref.actor.cartridge.max_logprob_diff={_CUDA_FLOAT32_BOUND}"
            found.append(bound)
    return found


def train(
    options: argparse.Namespace, model: str, url: str, out: Path, supervisor: Supervisor
) -> None:
    """veRL, with one line a step shown.

    Raises:
        ChildFailed: it ended with an error; the cause is named.
    """
    print(
        "== training with veRL (a minute or so until the first step: Ray and its workers)",
        flush=True,
    )
    log = out / "train.log"
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += ["--config-path", str(HERE / "config"), "--config-name", "cartridge_distill"]
    child = supervisor.start(
        [*command, *overrides(options, model, url, out)], log, environment(options, out)
    )

    def show(line: str) -> str | None:
        return f"   {line.split('[cartridge] ', 1)[1]}" if "[cartridge] " in line else None

    status = follow(child, log, show, "veRL")
    if status != 0:
        causes = dict.fromkeys(
            line.strip()
            for line in log.read_text(errors="replace").splitlines()
            if _ERROR.match(line)
        )
        named = "\n".join(list(causes)[-3:])
        raise ChildFailed(f"veRL ended with status {status}.\n{named}\n{tail(log)}")
    saved = out / "checkpoints" / f"global_step_{options.steps}" / "actor" / "cartridge"
    shutil.copytree(saved, out / "cartridge")


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
    stage(command, "evaluation", out, supervisor, environment(options, out))


if __name__ == "__main__":
    sys.exit(main())
