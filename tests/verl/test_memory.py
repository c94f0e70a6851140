"""The engine's prediction at start: one line, a refusal, a warning; each says veRL's keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cartridge_distill.util.errors import ConfigError
from verl_patches.actor import memory

LIMIT = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


def said(engine: Any, row: int | None = 4096) -> str:
    engine.engine_config.use_dynamic_bsz = row is not None
    engine.engine_config.max_token_len_per_gpu = row
    lines: list[str] = []
    memory.check_memory(engine, engine.module, lines.append)
    [line] = lines
    return line


@pytest.fixture
def engine(build: Callable[..., Any]) -> Any:
    return build(init="random", teacher_cache_prompt_mib=32)


def with_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: size)


def test_on_a_cpu_nothing_is_said(engine: Any) -> None:
    lines: list[str] = []
    memory.check_memory(engine, engine.module, lines.append)
    assert lines == []


def test_a_row_without_a_bound_is_not_predicted(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 80 * 2**30)
    assert "no bound in tokens" in said(engine, None)


def test_what_fits_and_what_may_not(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 80 * 2**30)
    line = said(engine)
    assert line.startswith("a step takes at most 0.")
    assert line.endswith("the GPU has 80.00 GiB for it")
    with_free(monkeypatch, 2**20)
    with pytest.raises(ConfigError, match=f"{LIMIT} 4096 -> 2048") as refused:
        said(engine)
    assert "actor.cartridge.teacher_cache_prompt_mib 32 -> 0: 0.03 GiB less" in str(refused.value)


def test_a_row_of_which_all_is_trained_may_not_fit(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = memory.predict_step

    def predict(model: Any, step: Any) -> Any:
        plan = real(model, step)
        sizes.append(plan.peak)
        return plan

    monkeypatch.setattr(memory, "predict_step", predict)
    with_free(monkeypatch, 80 * 2**30)
    said(engine)
    most, least = sizes
    assert least < most
    with_free(monkeypatch, (least + most) // 2)
    line = said(engine)
    assert "may not do when all tokens of a row are trained on" in line and LIMIT in line
