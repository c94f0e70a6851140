"""The engine's own micro-batch on a GPU that is not there: the host waits once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from verl.utils.tensordict_utils import assign_non_tensor

from cartridge_distill.model import flex
from tests.fake_gpu import FakeGpu, dense_of_a_block_mask
from tests.verl.engine_rig import DOCUMENTS, rollouts
from verl_patches.hooks import distill_loss


@pytest.mark.parametrize("bound", [1e-3, None], ids=["a bound", "by the rounding"])
def test_the_host_waits_once_a_micro_batch(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bound: float | None
) -> None:
    monkeypatch.setattr(flex, "compile_and_call", dense_of_a_block_mask)
    engine = build(attention="dense")
    data = rollouts(engine)
    # As veRL's forward_backward_batch does for each micro-batch.
    tokens = int(data["loss_mask"].values().sum())
    assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens)
    expected, _ = engine.forward_step(data, distill_loss, True)

    # Another: nothing of the CPU's step is left.
    engine = build(attention="flex", max_logprob_diff=bound)
    with FakeGpu() as gpu:
        gpu.put(engine.module)
        gpu.put(engine.cartridge)
        with gpu.quiet():
            for name in DOCUMENTS:
                engine.teacher.prefix(name)
            engine.checks.remember(engine.version - 1, engine.cartridge.prefix())
            engine.forward_step(data, distill_loss, False)  # measures the rounding, once
            engine.checks.begin_batch()
        loss, output = engine.forward_step(data, distill_loss, False)
        loss.backward()
    said = "\n".join(map(str, gpu.waits))
    assert [wait.what for wait in gpu.waits] == ["read"] and "run > fetch" in said, said
    assert np.isclose(output["loss"], expected.item(), atol=1e-5)
    assert ("logprob_diff/version_decided" in output["metrics"]) == (bound is None)
