"""Folders of runs in the exact format of real ones, with made-up numbers of a plausible size.

The keys of ``metrics.jsonl`` are those that veRL's file log has after a run of this project.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd

from cartridge_distill.report.recipe import write_recipe

SAMPLES = [
    {
        "question": "Which antibiotic was Anna Sample given on admission?",
        "right_answer": "Ceftriaxone 2 g once daily",
        "answers": {
            "no document": "I'm sorry, but I have no information about a patient of that name.",
            "trained cartridge": "She was given ceftriaxone, 2 g once a day, from 4 March.",
            "full document": "On admission, ceftriaxone 2 g once daily was started.",
        },
    },
    {
        "question": "What did the echocardiogram of 12 March show?",
        "right_answer": "A left ventricular ejection fraction of 35 %",
        "answers": {
            "no document": "An echocardiogram is an ultrasound examination of the heart.",
            "trained cartridge": "The ejection fraction of the left ventricle was 35 %.",
            "full document": "It showed a reduced left ventricular ejection fraction of 35 %.",
        },
    },
    {
        "question": "Why was metformin stopped?",
        "right_answer": "Because of the contrast agent and a falling eGFR",
        "answers": {
            "no document": "Metformin is often stopped because of side effects.",
            "trained cartridge": "It was stopped because of the contrast agent.",
            "full document": "It was paused before the contrast CT, as her eGFR had fallen to 38.",
        },
    },
]


def interval(mean: float, half: float, n: int = 30) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def condition(
    name: str, kv_tokens: int, kl: float, log_loss: float, accuracy: float
) -> dict[str, Any]:
    return {
        "condition": name,
        "kv_tokens": kv_tokens,
        "metrics": {
            "kl": interval(kl, 0.08 * kl),
            "log_loss": interval(log_loss, 0.06 * log_loss),
            "accuracy": {**interval(accuracy, 0.13), "high": min(1.0, accuracy + 0.13)},
            "generated_accuracy": None,
        },
    }


def evaluation(
    kl: float = 0.637, log_loss: float = 2.07, accuracy: float = 0.8, **more: Any
) -> dict[str, Any]:
    """``evaluation.json``; the three numbers are the trained cartridge's."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "model_revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "cartridge": "cartridge",
        "seed": 0,
        "confidence": 0.95,
        "versions": {"torch": "2.13.0"},
        "conditions": [
            condition("no document", 0, 1.412, 5.29, 0.27),
            condition("best chunk", 124, 0.871, 3.11, 0.53),
            condition("untrained cartridge", 128, 0.905, 3.92, 0.37),
            condition("trained cartridge", 128, kl, log_loss, accuracy),
            condition("full document", 591, 0.0, 1.27, 0.9),
        ],
        "samples": SAMPLES,
        **more,
    }


def metrics(
    steps: int = 32, seed: int = 0, kl: float = 0.637, log_loss: float = 2.07, on: float = 1.0
) -> list[dict[str, Any]]:
    """The log's lines; validation before the first step and after every fourth."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = [{"step": 0, "data": _validation(0.0, kl, log_loss, draw)}]
    trained = 0
    for step in range(1, steps + 1):
        share = 1 - math.exp(-3.5 * step / steps)
        trained += 190 + draw.randrange(4)
        data = {
            "actor/loss": 1.26 - 0.75 * share + draw.gauss(0, 0.03),
            "actor/grad_norm": 0.12 * math.exp(-step / steps),
            "actor/lr": 0.02,
            "actor/logprob_diff/max": 2.4e-5 * math.exp(draw.gauss(0, 0.25)),
            "actor/logprob_diff/mean": 3.1e-6,
            "actor/logprob_diff/bound": 1e-3,
            "actor/on_policy_fraction": on if on in (0.0, 1.0) else min(1.0, 2 * on * step / steps),
            "training/staleness": 0,
            "tokens/trained": 190,
            "tokens/generated": 192,
            "tokens/total_trained": trained,
            "perf/tokens": 6100,
            "timing_s/rollout": 5.3 + draw.gauss(0, 0.3),
            "timing_s/update": 11.5 + draw.gauss(0, 0.7),
            "timing_s/update_weights": 0.25,
            "timing_s/step": 18.1 + (12 if step == 1 else 0) + (4.1 if step % 4 == 0 else 0),
        }
        if step % 4 == 0:
            data |= {**_validation(share, kl, log_loss, draw), "timing_s/testing": 4.0}
        lines.append({"step": step, "data": data})
    return lines


def _validation(share: float, kl: float, log_loss: float, draw: random.Random) -> dict[str, float]:
    share /= 1 - math.exp(-3.5)
    return {
        "val/kl": 0.905 + (kl - 0.905) * share + draw.gauss(0, 0.004),
        "val/log_loss": 3.92 + (log_loss - 3.92) * share + draw.gauss(0, 0.03),
        "val/accuracy": round((0.37 + 0.43 * share) * 30) / 30,
    }


def write_run(
    folder: Path,
    *,
    name: str = "demo",
    seed: int = 0,
    lines: list[dict[str, Any]] | None = None,
    evaluated: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = ("platform=cpu", "actor_rollout_ref.actor.cartridge.lr=0.02"),
) -> Path:
    """A whole run's folder. ``evaluated`` may be ``{}`` for none."""
    write_recipe(
        folder,
        ["python", "training/demo.py", "--seed", str(seed), "--out", str(folder)],
        [*overrides, f"data.seed={seed}", f"trainer.default_local_dir={folder}/checkpoints"],
        seed,
        name=name,
        model="SmolLM2-135M-Instruct",
    )
    text = "".join(json.dumps(line) + "\n" for line in lines or metrics(seed=seed))
    (folder / "metrics.jsonl").write_text(text)
    found = evaluation(seed=seed) if evaluated is None else evaluated
    if found:
        (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


def write_questions(folder: Path, count: int = 30, seed: int = 0) -> Path:
    """``evaluation.parquet``: some questions are harder than others, for every condition."""
    draw = random.Random(seed)
    hard = [draw.gauss(0, 0.8) for _ in range(count)]
    rows = [
        {
            "condition": row["condition"],
            "document_id": "record",
            "question_index": place,
            "question": f"What is fact {place}?",
            "right_answer": f"answer {place}",
            "likelihood_correct": place % 5 < row["metrics"]["accuracy"]["mean"] * 5,
            "log_loss": row["metrics"]["log_loss"]["mean"] + hard[place] + draw.gauss(0, 0.3),
            "kl_sum": 12 * row["metrics"]["kl"]["mean"] * draw.uniform(0.8, 1.2),
            "kl_tokens": 12,
        }
        for row in evaluation()["conditions"]
        for place in range(count)
    ]
    draw.shuffle(rows)
    path = folder / "evaluation.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def write_shading(folder: Path) -> Path:
    """``document_kl.json``: a short document, the end of which the cartridge has wrong."""
    tokens = [["The", 0.02], [" lighthouse", 0.3], [" was", 0.0], [" built\nin", 0.6], [" ", None]]
    tokens += [["1871", 5.1, "1872"], [" by", 1.2], [" Holt", 2.5, " <b>"], [".", 0.02]]
    path = folder / "document_kl.json"
    path.write_text(
        json.dumps({"documents": [{"document_id": "light", "whole": True, "tokens": tokens}]})
    )
    return path


def write_recipes(folder: Path, seeds: int = 3) -> list[Path]:
    """Three recipes of some seeds each: written by the teacher, by the student, and a schedule."""
    runs = []
    recipes = (
        ("off-policy", 0.602, 1.93, 0.0),
        ("on-policy", 0.661, 2.2, 1.0),
        ("mixed", 0.548, 1.79, 0.6),
    )
    for name, kl, log_loss, on in recipes:
        for seed in range(seeds):
            shifted = kl + 0.012 * (seed - 1), log_loss + 0.05 * (seed - 1)
            runs.append(
                write_run(
                    folder / f"{name}-{seed}",
                    name=name,
                    seed=seed,
                    lines=metrics(32, 10 * seed + len(runs), *shifted, on),
                    evaluated=evaluation(*shifted, seed=seed),
                    overrides=(f"on_policy_fraction={on}",),
                )
            )
    return runs


ATTACK = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def attacked(folder: Path) -> Path:
    """A run whose every text from outside is an attack."""
    sample = {
        "question": ATTACK,
        "right_answer": ATTACK,
        "answers": {"trained cartridge": ATTACK, ATTACK: ATTACK},
    }
    conditions = [*evaluation()["conditions"], condition(ATTACK, 3, 1, 1, 0.5)]
    return write_run(
        folder,
        name=ATTACK,
        overrides=(ATTACK,),
        evaluated=evaluation(samples=[sample], conditions=conditions, model=ATTACK),
    )
