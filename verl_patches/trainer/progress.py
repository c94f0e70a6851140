"""What a step says of itself: how long its samples are, and one line for whoever waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def length_metrics(tags: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tokens of prompts and answers.

    Args:
        tags: the queue's, one a sample.
    """
    prompt = np.array([tag["prompt_len"] for tag in tags])
    response = np.array([tag["response_len"] for tag in tags])
    return {
        "prompt_length/mean": float(prompt.mean()),
        "prompt_length/max": int(prompt.max()),
        "response_length/mean": float(response.mean()),
        "response_length/max": int(response.max()),
        "response_length/min": int(response.min()),
        "perf/tokens": int(prompt.sum() + response.sum()),
    }


def progress_line(metrics: Mapping[str, Any], step: int, last: int, mixed: bool) -> str:
    """One line a person can follow, beside veRL's own loggers.

    Args:
        metrics: of the step, with its seconds.
        mixed: whether the teacher ever writes.
    """
    share = f"  by student {metrics['actor/on_policy_fraction']:.0%}" if mixed else ""
    return (
        f"[cartridge] step {step}/{last}"
        f"  loss {metrics['actor/loss']:.4f}"
        f"  grad {metrics['actor/grad_norm']:.3g}"
        f"  server/trainer log-prob diff {metrics['actor/logprob_diff/max']:.1e}"
        f"{share}"
        f"  rollout {metrics['timing_s/rollout']:.1f}s"
        f"  update {metrics['timing_s/update']:.1f}s"
        f"  sync {metrics['timing_s/update_weights']:.1f}s"
    )
