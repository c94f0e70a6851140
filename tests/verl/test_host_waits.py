"""The engine's own micro-batch on a GPU that is not there: the host waits once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from verl.utils.tensordict_utils import assign_non_tensor

from cartridge_distill import attention
from tests.fake_gpu import FakeGpu, dense_behind_a_block_mask
from tests.verl.engine_rig import DOCUMENTS, rollouts
from verl_patches import engine as engine_module
from verl_patches.hooks import distill_loss


def test_the_host_waits_once_a_micro_batch(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention._IMPLEMENTATIONS, "flex", dense_behind_a_block_mask)
    engine = build(attention="dense")
    data = rollouts(engine)
    # As veRL's forward_backward_batch does for each micro-batch.
    tokens = int(data["loss_mask"].values().sum())
    assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens)
    expected, _ = engine.forward_step(data, distill_loss, True)

    engine = build(attention="flex")  # another: nothing of the CPU's step is left
    monkeypatch.setattr(engine_module, "get_device_id", lambda: torch.device("cuda", 0))
    with FakeGpu() as gpu:
        gpu.put(engine.module)
        gpu.put(engine.cartridge)
        with gpu.quiet():
            for name in DOCUMENTS:
                engine.teacher.prefix(name)
        loss, output = engine.forward_step(data, distill_loss, False)
        loss.backward()
    waits = [wait for wait in gpu.waits if wait.what != "staged"]
    said = "\n".join(map(str, waits))
    assert [wait.what for wait in waits] == ["read"] and "_check > fetch" in said, said
    assert np.isclose(output["loss"], expected.item(), atol=1e-5)
