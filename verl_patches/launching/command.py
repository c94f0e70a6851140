"""A run in veRL's words: its overrides, its command, its environment."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from cartridge_distill.util.node import missing_settings
from cartridge_distill.util.openmp import spinning
from cartridge_distill.util.pasting import hydra_value
from verl_patches.config.data_files import named
from verl_patches.launching.settings import CONFIG_FOLDER, CONFIG_NAME, Run

_HOME = Path(__file__).resolve().parents[2]  # what `import verl_patches` needs on the path


def overrides(run: Run) -> list[str]:
    """Hydra's overrides; the run's own come last, so that they win."""
    data = (run.data or Path()).expanduser().absolute()
    cartridge = "actor_rollout_ref.actor.cartridge"
    custom = "actor_rollout_ref.rollout.custom"
    found = [
        f"platform={run.device}",
        f"data.train_files={hydra_value(named(data / 'train.parquet'))}",
        f"data.val_files={hydra_value(named(data / 'val.parquet'))}",
    ]
    for about in fields(run):
        key, value = about.metadata["key"], getattr(run, about.name)
        if key is not None and value is not None:
            given = model_path(value) if about.name == "model" else value
            found.append(f"{key}={hydra_value(given)}")
    if run.device == "cpu" and run.dtype == "bfloat16":
        # platform=cpu has a bound for float32. Where both round, the rounding is the measure.
        found.append(f"{cartridge}.max_logprob_diff=null")
    if run.steps is not None:
        # veRL stops at whichever comes first, and an epoch has at least one step.
        found.append(f"trainer.total_epochs={run.steps}")
    found.append(f"{cartridge}.documents={hydra_value(data / 'documents.jsonl')}")
    if run.test_every:
        found += [
            f"{cartridge}.eval_questions={hydra_value(data / 'eval.json')}",
            f"trainer.test_freq={run.test_every}",
            "trainer.val_before_train=True",
        ]
    if run.sync_dir is None:
        found.append(f"{cartridge}.transport=http")
    else:
        folder = run.sync_dir.expanduser().absolute()
        found += [
            f"{cartridge}.transport=shared_dir",
            f"{cartridge}.sync_dir={hydra_value(folder)}",
        ]
    urls = [hydra_value(url) for url in run.server]
    url = f"[{','.join(urls)}]" if len(urls) > 1 else (urls or ["null"])[0]
    return [
        *found,
        f"{cartridge}.sync_base_model={hydra_value(run.served_model or None)}",
        f"{custom}.tokasaurus_url={url}",
        f"trainer.experiment_name={hydra_value(run.label)}",
        f"trainer.default_local_dir={hydra_value(run.folder / 'checkpoints')}",
        f"trainer.logger=[{','.join(('console', 'file', *run.loggers))}]",
        *run.overrides,
    ]


def model_path(model: str) -> str:
    """A folder as an absolute path, for workers elsewhere; a hub id as it is."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def command(run: Run) -> list[str]:
    """What trains it."""
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo"),
        *("--config-path", str(CONFIG_FOLDER), "--config-name", CONFIG_NAME),
        *overrides(run),
    ]


def environment(run: Run, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the command needs in its environment, over ``inherited``."""
    gpu = run.device == "cuda"
    return {
        **python_path(inherited),
        "VERL_PLATFORM": "" if gpu else "cpu",  # empty: veRL looks which card there is
        "VERL_USE_EXTERNAL_MODULES": "verl_patches.plugin",
        "VERL_FILE_LOGGER_PATH": str(run.folder / "metrics.jsonl"),
        **_of_loggers(run, inherited),
        **({} if run.threads is None else {"OMP_NUM_THREADS": str(run.threads)}),
        **spinning(inherited),
        # Activations come and go by the megabyte. glibc would give them back to the system each
        # time and take clean pages again: a tenth of the trainer's step.
        "MALLOC_MMAP_THRESHOLD_": inherited.get("MALLOC_MMAP_THRESHOLD_", str(2**30)),
        "MALLOC_TRIM_THRESHOLD_": inherited.get("MALLOC_TRIM_THRESHOLD_", str(2**32)),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": inherited.get("RAY_DEDUP_LOGS", "0"),  # it would fold lines of steps
        **{setting.name: setting.value for setting in missing_settings(inherited, gpu)},
    }


def _of_loggers(run: Run, inherited: Mapping[str, str]) -> dict[str, str]:
    """Where they write, unless the person has said it: into the run's folder."""
    places = {
        "tensorboard": ("TENSORBOARD_DIR", run.folder / "tensorboard"),
        "wandb": ("WANDB_DIR", run.folder),
    }
    chosen = [places[name] for name in run.loggers]
    return {name: inherited.get(name) or str(folder) for name, folder in chosen}


def python_path(inherited: Mapping[str, str]) -> dict[str, str]:
    """This package's own folder for the workers; nothing where Python finds it by itself."""
    installed = [sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()]
    if _HOME in map(Path, installed):
        return {}
    parts = [str(_HOME), *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(parts))}
